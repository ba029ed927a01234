"""The OpenAPI document: made of the route table, and of the types that each route reads and writes."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from math import inf
from typing import Any

import msgspec

from tokenmill import __version__
from tokenmill.server import access
from tokenmill.server.routes.route import Route
from tokenmill.server.schema import native, openai, platforms
from tokenmill.text import limits

BODIES: dict[tuple[str, str], tuple[Any, Any, Any]] = {
    ("POST", "/"): (native.CompatRequest, list[native.GenerateResponse], native.StreamResponse),
    ("POST", "/generate"): (native.GenerateRequest, native.GenerateResponse, None),
    ("POST", "/generate_stream"): (native.GenerateRequest, None, native.StreamResponse),
    ("POST", "/v1/chat/completions"): (openai.ChatRequest, openai.ChatCompletion, openai.ChatChunk),
    ("POST", "/v1/completions"): (openai.CompletionRequest, openai.Completion, openai.Completion),
    ("GET", "/v1/models"): (None, openai.ModelList, None),
    ("GET", "/v1/models/*"): (None, openai.Model, None),
    ("POST", "/invocations"): (
        (native.CompatRequest, openai.ChatRequest, openai.CompletionRequest),
        (list[native.GenerateResponse], openai.ChatCompletion, openai.Completion),
        (native.StreamResponse, openai.ChatChunk, openai.Completion),
    ),
    ("POST", "/vertex"): (platforms.VertexRequest, platforms.VertexResponse, None),
    ("POST", "/tokenize"): (native.GenerateRequest, list[native.SimpleToken], None),
    ("POST", "/chat_tokenize"): (openai.ChatRequest, native.ChatTokenizeResponse, None),
    ("GET", "/info"): (None, native.Info, None),
    ("GET", "/v2"): (None, platforms.KserveServer, None),
    ("GET", "/v2/health/live"): (None, platforms.KserveLive, None),
    ("GET", "/v2/health/ready"): (None, platforms.KserveLive, None),
    ("GET", "/v2/models/*"): (None, platforms.KserveServer, None),
    ("POST", "/v2/models/*"): (platforms.KserveRequest, platforms.KserveResponse, None),
}
"""By route: types of the body, of a whole answer, and of a stream's event; a tuple: one of these. Other routes answer
text or nothing."""

_PATHS = {
    ("GET", "/v1/models/*"): "/v1/models/{id}",
    ("GET", "/v2/models/*"): "/v2/models/{name}/versions/{version}",
    ("POST", "/v2/models/*"): "/v2/models/{name}/versions/{version}/infer",
}
_TEXTS = {
    "/metrics": "text/plain",
    "/docs/": "text/html",
    "/api-doc/openapi.json": "application/json",
}
_OPERATIONS = {
    ("GET", "/"): "root_health",
    ("GET", "/ping"): "ping",
    ("POST", "/chat_tokenize"): "get_chat_tokenize",
    ("GET", "/v1/models/*"): "openai_retrieve_model",
    ("GET", "/v2"): "kserve_server",
    ("GET", "/v2/health/live"): "kserve_live",
    ("GET", "/v2/health/ready"): "kserve_ready",
    ("GET", "/v2/models/*"): "kserve_model",
    ("POST", "/v2/models/*"): "kserve_infer",
    ("GET", "/docs/"): "docs",
    ("GET", "/api-doc/openapi.json"): "openapi_document",
}
"""Names of operations that TGI does not have; the others have TGI's names."""
_LEFT_OUT = ("/docs", "/docs/*")

_ERRORS = {
    "native": {
        "400": "The body is no JSON",
        "408": "The body took too long to arrive",
        "413": "The body is too long",
        "415": "The body's type is not JSON, or it is compressed",
        "422": "The body has the wrong shape, or breaks a rule",
        "424": "Generation failed",
        "429": "Overloaded",
        "500": "Incomplete generation",
        "503": "Not ready",
    },
    "openai": {
        "400": "The body has the wrong shape, or breaks a rule",
        "401": "The API key is missing or wrong",
        "404": "There is no such model",
        "408": "The body took too long to arrive",
        "413": "The body is too long",
        "415": "The body's type is not JSON, or it is compressed",
        "429": "Overloaded",
        "500": "Generation failed",
        "503": "Not ready",
    },
}
_DOTTED = {
    native.ErrorResponse: "ErrorResponse",
    openai.ErrorResponse: "OpenAiErrorResponse",
}  # two structs of one name get their modules' names from msgspec
_PREFIX = "#/components/schemas/"


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """Return the document of some routes, as data for JSON."""
    types = [kind for bodies in BODIES.values() for part in bodies for kind in _kinds(part)]
    types += [native.ErrorResponse, openai.ErrorResponse]
    schemas, components = msgspec.json.schema_components(types, ref_template=_PREFIX + "{name}")
    for component in components.values():  # Python 3.13 removes the indentation of docstrings itself
        if "description" in component:
            component["description"] = inspect.cleandoc(component["description"])
    shown = {repr(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if route.path not in _LEFT_OUT:
            path = _PATHS.get((route.method, route.path), route.path)
            paths.setdefault(path, {})[route.method.lower()] = _operation(route, path, shown)
    made = {
        "openapi": "3.1.0",
        "info": {
            "title": "tokenmill",
            "description": "An LLM server that speaks Text Generation Inference's API and OpenAI's.",
            "license": {"name": "Apache 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
            "version": __version__,
        },
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "tags": [{"name": "tokenmill"}],
    }
    return _with_bounds(_renamed(made))


def document_json(routes: Sequence[Route]) -> str:
    """Return the document of some routes as indented JSON."""
    return json.dumps(document(routes), indent=2)


def _kinds(part: Any) -> tuple[Any, ...]:
    return () if part is None else part if isinstance(part, tuple) else (part,)


def _operation(route: Route, path: str, shown: dict[str, Any]) -> dict[str, Any]:
    request, plain, event = BODIES.get((route.method, route.path), (None, None, None))
    about = (inspect.getdoc(route.handler) or "").strip()
    summary = about.partition("\n")[0]
    content = _content("application/json", plain, shown) | _content("text/event-stream", event, shown)
    if route.path in _TEXTS:
        content = {_TEXTS[route.path]: {"schema": {"type": "string"}}}
    name = access.handler_name(route.method, route.path.removesuffix("/*"))
    operation: dict[str, Any] = {
        "tags": ["tokenmill"],
        "operationId": _OPERATIONS.get((route.method, route.path), name),
        "summary": summary,
        "responses": {"200": {"description": "Done", **({"content": content} if content else {})}},
    }
    if summary != about:
        operation["description"] = about
    errors = _ERRORS[route.dialect]
    error = _error_schema(route, shown)
    if request is not None:
        operation["requestBody"] = {"required": True, "content": _content("application/json", request, shown)}
    elif route.path.startswith("/v1/models/"):
        errors = {status: errors[status] for status in ("401", "404", "503")}
    elif route.protected or "health" in name:
        errors = {"503": errors["503"]}
    else:
        errors = {}
    for status, meaning in errors.items():
        said = {"description": meaning, "content": {"application/json": {"schema": error}}}
        operation["responses"][status] = said
    names = re.findall(r"{(\w+)}", path)
    if names:
        operation["parameters"] = [
            {"name": one, "in": "path", "required": True, "schema": {"type": "string"}} for one in names
        ]
    if route.protected:
        operation["security"] = [{"key": []}]
        operation["responses"].setdefault("401", {"description": "The API key is missing or wrong"})
    return operation


def _error_schema(route: Route, shown: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a route's errors. On SageMaker's route it depends on the body."""
    ours, theirs = shown[repr(native.ErrorResponse)], shown[repr(openai.ErrorResponse)]
    if route.path == "/invocations":
        return {"anyOf": [ours, theirs]}
    schema: dict[str, Any] = theirs if route.dialect == "openai" else ours
    return schema


def _content(media_type: str, part: Any, shown: dict[str, Any]) -> dict[str, Any]:
    kinds = _kinds(part)
    if not kinds:
        return {}
    schemas = [shown[repr(kind)] for kind in kinds]
    return {media_type: {"schema": schemas[0] if len(schemas) == 1 else {"oneOf": schemas}}}


def _renamed(made: dict[str, Any]) -> dict[str, Any]:
    """Return the document with components under their usual names."""
    text = json.dumps(made)
    for kind, name in _DOTTED.items():
        text = text.replace(f'{_PREFIX}{kind.__module__}.{kind.__name__}"', f'{_PREFIX}{name}"')
        text = text.replace(f'"{kind.__module__}.{kind.__name__}":', f'"{name}":')
    renamed: dict[str, Any] = json.loads(text)
    return renamed


def _with_bounds(made: dict[str, Any]) -> dict[str, Any]:
    """Return the document with the bounds of numbers, from the table that checks them. Bounds that depend on the
    server's options are left out."""
    for component, dialect in (("GenerateParameters", "native"), ("ChatRequest", "openai"),
                               ("CompletionRequest", "openai")):  # fmt: skip
        properties = made["components"]["schemas"][component]["properties"]
        for limit in (*limits.TABLE, *limits.OPENAI_TABLE):
            name = limits.OPENAI_NAMES.get(limit.name, limit.name) if dialect == "openai" else limit.name
            if name in properties and not limit.unit:
                properties[name].update(_bounds(limit, dialect))
    return made


def _bounds(limit: limits.Limit, dialect: str) -> dict[str, float]:
    found: dict[str, float] = {}
    least = limit.openai_least if dialect == "openai" and limit.openai_least is not None else limit.least
    if least > -inf:
        found["exclusiveMinimum" if limit.above else "minimum"] = least
    if not isinstance(limit.most, str) and limit.most < inf:
        found["maximum"] = limit.most
    return found
