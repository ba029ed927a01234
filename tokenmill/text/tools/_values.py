"""Values written as plain text, turned into JSON by the schema of their parameter."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from typing import Any

from tokenmill.text.tools._json import loads
from tokenmill.text.tools._reader import Broken

ALL = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})
STRING = frozenset({"string"})
_WORDS = {"true": ("boolean", "true"), "false": ("boolean", "false"), "none": ("null", "null"),
          "null": ("null", "null")}  # fmt: skip
_MOST_REFERENCES = 8


def property_of(schema: Any, name: str) -> Any:
    """The schema of a property; {} if nothing is said about it."""
    if not isinstance(schema, Mapping):
        return {}
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return properties[name]
    others = schema.get("additionalProperties")
    return others if isinstance(others, Mapping) else {}


def types_of(schema: Any, root: Any, depth: int = 0) -> frozenset[str]:
    """The JSON types that a schema allows. `root`: the schema that its references point into."""
    if not isinstance(schema, Mapping) or depth > _MOST_REFERENCES:
        return ALL
    reference = schema.get("$ref")
    if isinstance(reference, str):
        return types_of(resolved(reference, root), root, depth + 1)
    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset({kind}) & ALL or ALL
    if isinstance(kind, list):
        return frozenset(name for name in kind if isinstance(name, str)) & ALL or ALL
    if isinstance(schema.get("enum"), list):
        return frozenset().union(*(_types_of_value(value) for value in schema["enum"])) or ALL
    if "const" in schema:
        return _types_of_value(schema["const"])
    for keyword in ("anyOf", "oneOf"):
        if isinstance(schema.get(keyword), list):
            return frozenset().union(*(types_of(one, root, depth + 1) for one in schema[keyword])) or ALL
    return ALL


def resolved(reference: str, root: Any) -> Any:
    """What a reference inside of the same schema points at; {} if there is no such thing."""
    place = root
    if not reference.startswith("#"):
        return {}
    for part in reference[1:].split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        place = place.get(key, {}) if isinstance(place, Mapping) else {}
    return place


def _types_of_value(value: Any) -> frozenset[str]:
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return frozenset({"integer", "number"})
    kinds: list[tuple[type, str]] = [(float, "number"), (str, "string"), (list, "array"), (dict, "object")]
    return frozenset({next((name for kind, name in kinds if isinstance(value, kind)), "null")})


def to_json(text: str, types: frozenset[str]) -> str:
    """JSON of a value that was written without quotes: the first reading that `types` allow."""
    if types == STRING:
        return dumps(text)
    trimmed = text.strip()
    try:
        found = _types_of_value(loads(trimmed))
        if found & types or "string" not in types:
            return trimmed
    except Broken:
        found = frozenset()
    kind, word = _WORDS.get(trimmed.lower(), ("", ""))
    if kind in types:
        return word
    if not found and types & {"array", "object"}:
        literal = _literal(trimmed)
        if _types_of_value(literal) & types & {"array", "object"}:
            return dumps(literal)
    return dumps(text)


def _literal(text: str) -> Any:
    """The value of a Python literal that JSON can express; None if it is none."""
    if text[:1] not in ("{", "[", "("):
        return None
    try:
        value = ast.literal_eval(text)
        value = list(value) if isinstance(value, tuple) else value
        dumps(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, Broken):
        return None
    return value


def number(text: str) -> str:
    """JSON of a number as Python writes it. Raises Broken."""
    try:
        value = loads(text)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return text
    except Broken:
        pass
    try:
        value = ast.literal_eval(text)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return json.dumps(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    raise Broken


def dumps(value: Any) -> str:
    """JSON text as models see it in prompts. Raises Broken for what JSON or UTF-8 cannot express."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, TypeError, RecursionError):
        raise Broken from None
    return text


def inside(text: str) -> str:
    """Text as it stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
