"""The route table: every path of the server, with its handler.

The application finds handlers in it, and the OpenAPI document describes it.
"""

from __future__ import annotations

from functools import cache

from tokenmill.server import openapi
from tokenmill.server.call import Call
from tokenmill.server.routes import about, chat, completions, documentation, kserve, native, sagemaker, vertex
from tokenmill.server.routes import openai as openai_routes
from tokenmill.server.routes.route import Route


@cache
def document_json() -> str:
    """Return the OpenAPI document as indented JSON. The first call takes 50 ms."""
    return openapi.document_json(ROUTES)


async def openapi_document(call: Call) -> None:
    """GET /api-doc/openapi.json."""
    text = await call.service.in_thread(document_json)
    await call.answer(text.encode())


ROUTES: tuple[Route, ...] = (
    Route("POST", "/", native.compat_generate, generates=True),
    Route("POST", "/generate", native.generate, generates=True),
    Route("POST", "/generate_stream", native.generate_stream, generates=True),
    Route("POST", "/v1/chat/completions", chat.chat_completions, "openai", generates=True),
    Route("POST", "/v1/completions", completions.completions, "openai", generates=True),
    Route("GET", "/v1/models", openai_routes.list_models, "openai"),
    Route("GET", "/v1/models/*", openai_routes.retrieve_model, "openai"),
    Route("POST", "/invocations", sagemaker.sagemaker_compatibility, generates=True),
    Route("POST", "/vertex", vertex.vertex_compatibility, generates=True),
    Route("POST", "/tokenize", about.tokenize),
    Route("POST", "/chat_tokenize", about.get_chat_tokenize, generates=True),
    Route("GET", "/info", about.info),
    Route("GET", "/health", about.health, protected=False),
    Route("GET", "/ping", about.health, protected=False),
    Route("GET", "/", about.health, protected=False),
    Route("GET", "/metrics", about.metrics, protected=False),
    Route("GET", "/docs", documentation.to_docs, protected=False),
    Route("GET", "/docs/", documentation.docs, protected=False),
    Route("GET", "/docs/*", documentation.docs, protected=False),
    Route("GET", "/api-doc/openapi.json", openapi_document, protected=False),
    Route("GET", "/v2", kserve.server),
    Route("GET", "/v2/health/live", kserve.live),
    Route("GET", "/v2/health/ready", kserve.ready),
    Route("GET", "/v2/models/*", kserve.model),
    Route("POST", "/v2/models/*", kserve.infer, generates=True),
)


def vertex_routes(predict_path: str, health_path: str) -> tuple[Route, ...]:
    """Return routes for the paths that Vertex AI's variables name, where the table has none; "": no path is named."""
    routes = []
    if predict_path:
        routes.append(Route("POST", predict_path, vertex.vertex_compatibility, generates=True))
    if health_path:
        routes.append(Route("GET", health_path, about.health, protected=False))
    known = {(route.method, route.path) for route in ROUTES}
    return tuple(route for route in routes if (route.method, route.path) not in known)
