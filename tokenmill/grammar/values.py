"""JSON values under JSON Schema: their types and equality, and the finite set of values that a schema lists."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

Json = Any
Resolve = Callable[[str], Json]
"""A function from a `$ref` to its target; None if the target is not inside of the schema."""

ASSERTIONS = frozenset((
    "type", "enum", "const", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "$ref", "$dynamicRef",
    "$recursiveRef", "properties", "patternProperties", "additionalProperties", "propertyNames", "required",
    "unevaluatedProperties", "minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "dependencies",
    "items", "prefixItems", "additionalItems", "unevaluatedItems", "contains", "minContains", "maxContains",
    "uniqueItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format", "minimum", "maximum",
    "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
))  # fmt: skip
"""Keywords that may make a value invalid."""

_CLASSES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
_DEPTH = 8


def children(value: Json) -> list[Json]:
    """Return the values in an object or a list; none for other values."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def assertions(schema: dict[str, Json]) -> frozenset[str]:
    """Return the keywords of a schema that may make a value invalid."""
    return ASSERTIONS & schema.keys()


def is_a(value: Json, kind: str) -> bool:
    """Return whether a value is of a type of JSON Schema, for which 1.0 is an integer."""
    if kind in ("integer", "number"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kind == "number" or value == int(value))
    return isinstance(value, _CLASSES[kind])


def types(schema: dict[str, Json]) -> list[str] | None:
    """Return the value of `type` as a list; None if the schema has none."""
    kinds = schema.get("type")
    return [kinds] if isinstance(kinds, str) else kinds


def identity(value: Json) -> Hashable:
    """Return a key that is equal for values that are equal in JSON Schema: 1 and 1.0, but not 1 and true."""
    if isinstance(value, dict):
        return frozenset((key, identity(one)) for key, one in value.items())
    if isinstance(value, list):
        return tuple(map(identity, value))
    return isinstance(value, bool), value


def finite(schema: Json, resolve: Resolve, depth: int = _DEPTH) -> list[Json] | None:
    """Return the values that a well-formed schema allows, each once; None if it does not list them.

    Lists are `enum`, `const`, booleans and null, also behind `$ref` and `anyOf`.
    """
    if schema is False:
        return []
    if not isinstance(schema, dict) or depth == 0:
        return None
    used = assertions(schema)
    if used == {"$ref"}:
        return finite(resolve(schema["$ref"]), resolve, depth - 1)
    if used == {"anyOf"}:
        parts = [finite(part, resolve, depth - 1) for part in schema["anyOf"]]
        found = None if None in parts else [value for part in parts for value in part or ()]
    elif used and used <= {"type", "enum", "const"}:
        found = _listed(schema)
    else:
        return None
    return None if found is None else list({identity(value): value for value in found}.values())


def _listed(schema: dict[str, Json]) -> list[Json] | None:
    kinds = types(schema)
    if "enum" in schema:
        found = schema["enum"]
    elif "const" in schema:
        found = [schema["const"]]
    elif kinds is not None and set(kinds) <= {"boolean", "null"}:
        return [value for kind in kinds for value in ((False, True) if kind == "boolean" else (None,))]
    else:
        return None
    if "const" in schema:
        found = [value for value in found if identity(value) == identity(schema["const"])]
    return [value for value in found if kinds is None or any(is_a(value, kind) for kind in kinds)]
