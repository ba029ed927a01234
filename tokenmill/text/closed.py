"""Objects that name their properties, and say nothing of others, have no others.

JSON Schema allows further keys unless it is told not to, and hardly anybody means it: a weak model goes on inventing
keys until its tokens are spent. TGI's grammars never had any, nor do OpenAI's strict ones. An answer without them is
valid under the schema as it was sent; where that is not certain, the schema is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_DEPTH = 100  # deeper schemas are refused anyhow
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_JOINED = ("allOf", "anyOf", "$ref", "$dynamicRef")
_SPEAKS = ("properties", "required", "additionalProperties", "patternProperties", "enum", "const", "minProperties")
_OTHERWISE = ("additionalProperties", "patternProperties", "unevaluatedProperties", "enum", "const", *_JOINED)


def closed(schema: Any) -> Any:
    """The schema with `additionalProperties: false` where that only leaves keys out. Takes nothing: changed parts are
    new."""
    if not isinstance(schema, dict) or any(map(_joins, _schemas(schema, 0))):
        return schema
    return _closed(schema, 0)


def _joins(node: dict[str, Any]) -> bool:
    """True if a schema may look at one object together with another schema, which a closed one would contradict; or
    if what is invalid under one makes something valid elsewhere."""
    if any(key in node for key in ("oneOf", "not", "if", "unevaluatedProperties", "$dynamicRef")):
        return True
    many = node.get("allOf")
    if isinstance(many, list) and len(many) > 1:
        return True
    return any(key in node for key in _JOINED) and (
        sum(key in node for key in _JOINED) > 1 or any(key in node for key in _SPEAKS)
    )


def _schemas(node: Any, depth: int) -> Iterator[dict[str, Any]]:
    if not isinstance(node, dict) or depth > _DEPTH:
        return
    yield node
    for key in _MAPS:
        if isinstance(node.get(key), dict):
            for one in node[key].values():
                yield from _schemas(one, depth + 1)
    for key in _LISTS:
        if isinstance(node.get(key), list):
            for one in node[key]:
                yield from _schemas(one, depth + 1)
    for key in _SINGLE:
        yield from _schemas(node.get(key), depth + 1)


def _closed(node: Any, depth: int) -> Any:
    if not isinstance(node, dict) or depth > _DEPTH:
        return node
    made = dict(node)
    for key in _MAPS:
        if isinstance(node.get(key), dict):
            made[key] = {name: _closed(one, depth + 1) for name, one in node[key].items()}
    for key in _LISTS:
        if isinstance(node.get(key), list):
            made[key] = [_closed(one, depth + 1) for one in node[key]]
    for key in _SINGLE:
        if key in node:
            made[key] = _closed(node[key], depth + 1)
    if _may_close(node):
        made["additionalProperties"] = False
    return made


def _may_close(node: dict[str, Any]) -> bool:
    properties, required = node.get("properties"), node.get("required", [])
    if not isinstance(properties, dict) or any(key in node for key in _OTHERWISE):
        return False
    if not isinstance(required, list) or any(name not in properties for name in required if isinstance(name, str)):
        return False
    least = node.get("minProperties", 0)
    return not isinstance(least, int) or least <= len(properties)
