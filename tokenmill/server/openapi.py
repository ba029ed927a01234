"""The OpenAPI document: the route table, and the types that each route reads and writes."""

from __future__ import annotations

import inspect
import json
from typing import Any

import msgspec

from tokenmill import __version__
from tokenmill.server.app import ROUTES, Route
from tokenmill.server.schema import native, openai

BODIES: dict[tuple[str, str], tuple[Any, Any, Any]] = {
    ("POST", "/"): (native.CompatRequest, list[native.GenerateResponse], native.StreamResponse),
    ("POST", "/generate"): (native.GenerateRequest, native.GenerateResponse, None),
    ("POST", "/generate_stream"): (native.GenerateRequest, None, native.StreamResponse),
    ("POST", "/v1/chat/completions"): (openai.ChatRequest, openai.ChatCompletion, openai.ChatChunk),
    ("POST", "/v1/completions"): (openai.CompletionRequest, openai.Completion, openai.Completion),
    ("GET", "/v1/models"): (None, openai.ModelList, None),
    ("GET", "/v1/models/*"): (None, openai.Model, None),
    ("POST", "/tokenize"): (native.GenerateRequest, list[native.SimpleToken], None),
    ("GET", "/info"): (None, native.Info, None),
}
"""By route: what is read, what a plain answer is, what an event of a stream is. Other routes answer text or nothing."""

_ERRORS = {
    "native": {"422": "The request breaks a rule", "424": "Generation failed", "429": "Overloaded"},
    "openai": {"400": "The request breaks a rule", "429": "Overloaded", "500": "Generation failed"},
}


def document() -> dict[str, Any]:
    """The document, as data for JSON."""
    types = [kind for bodies in BODIES.values() for kind in bodies if kind is not None]
    types += [native.ErrorResponse, openai.ErrorResponse]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    shown = {repr(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path.replace("/*", "/{id}"), {})[route.method.lower()] = _operation(route, shown)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tokenmill",
            "description": "An LLM server that speaks Text Generation Inference's API and OpenAI's.",
            "license": {"name": "Apache 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
            "version": __version__,
        },
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def document_json() -> str:
    """The document as indented JSON."""
    return json.dumps(document(), indent=2)


def _operation(route: Route, shown: dict[str, Any]) -> dict[str, Any]:
    request, plain, event = BODIES.get((route.method, route.path), (None, None, None))
    about = (inspect.getdoc(route.handler) or "").strip()
    content = {"application/json": {"schema": shown[repr(plain)]}} if plain is not None else {}
    if event is not None:
        content["text/event-stream"] = {"schema": shown[repr(event)]}
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}_{route.path.strip('/*').replace('/', '_') or 'root'}",
        "summary": about.partition("\n")[0],
        "responses": {"200": {"description": "Done", **({"content": content} if content else {})}},
    }
    if request is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": shown[repr(request)]}}}
        error = shown[repr(openai.ErrorResponse if route.dialect == "openai" else native.ErrorResponse)]
        for status, meaning in _ERRORS[route.dialect].items():
            said = {"description": meaning, "content": {"application/json": {"schema": error}}}
            operation["responses"][status] = said
    if route.path.endswith("/*"):
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    if route.protected:
        operation["security"] = [{"key": []}]
    return operation
