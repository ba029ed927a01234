"""The functions of a chat's tools: their names, the schemas of their arguments, and properties of these schemas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Tool = Mapping[str, Any]
"""A tool as OpenAI's API takes it: {"type": "function", "function": {"name", "parameters", …}}."""

ALL = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})
STRING = frozenset({"string"})
_MOST_REFERENCES = 8
_VALUES = ("enum", "const", "default", "examples", "x-guidance")  # keywords that hold no schemas


def function_of(tool: Tool) -> Mapping[str, Any]:
    """Return the function of a tool: in OpenAI's form, or the function alone."""
    inner = tool.get("function")
    return inner if isinstance(inner, Mapping) else tool


def name_of(tool: Tool) -> str:
    """Return the function's name."""
    return str(function_of(tool).get("name", ""))


def is_strict(tool: Tool) -> bool:
    """Return True if the function's arguments must fit their schema."""
    return bool(function_of(tool).get("strict"))


def parameters_of(tool: Tool) -> dict[str, Any]:
    """Return the schema of a function's arguments, which is an object's."""
    found = function_of(tool).get("parameters")
    return {"type": "object", **found} if isinstance(found, Mapping) else {"type": "object"}


def schemas_of(tools: Sequence[Tool]) -> dict[str, Any]:
    """Return the arguments' schemas by function."""
    return {name_of(tool): parameters_of(tool) for tool in tools}


def keys_of(schema: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the required properties of an object and its optional ones, each in the schema's order."""
    given, required = schema.get("properties"), schema.get("required")
    keys = list(given) if isinstance(given, Mapping) else []
    firm = [key for key in keys if isinstance(required, list) and key in required]
    return firm, [key for key in keys if key not in firm]


def others_of(schema: Mapping[str, Any]) -> Any:
    """Return the schema of any property, if the schema names none; else False: there are only the named ones."""
    return False if schema.get("properties") else schema.get("additionalProperties", True)


def names_of(schema: Any) -> frozenset[str]:
    """Return the names of a schema's properties."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return frozenset(properties) if isinstance(properties, Mapping) else frozenset()


def property_of(schema: Any, name: str) -> Any:
    """Return the schema of a property; {} if there is none."""
    if not isinstance(schema, Mapping):
        return {}
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return properties[name]
    others = schema.get("additionalProperties")
    return others if isinstance(others, Mapping) else {}


def moved(schema: Any, place: str) -> Any:
    """Return a schema for a place inside of another: its references begin there. `place`: a JSON pointer, as
    "#/a/b"."""
    if isinstance(schema, list):
        return [moved(one, place) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: value if key in _VALUES else place + value[1:] if _is_reference(key, value) else moved(value, place)
        for key, value in schema.items()
    }


def alone(schema: Any, root: Mapping[str, Any]) -> Any:
    """Return a schema from inside of `root` by itself: with all of `root` if it refers to a part of that, and with the
    options for grammars of `root`."""
    if not isinstance(schema, Mapping):
        return schema
    options = {"x-guidance": root["x-guidance"]} if "x-guidance" in root else {}
    if not _refers(schema):
        return {**schema, **options}
    whole = {key: value for key, value in root.items() if key != "x-guidance"}
    return {**moved(schema, "#/$defs/root"), "$defs": {"root": moved(whole, "#/$defs/root")}, **options}


def _is_reference(key: str, value: Any) -> bool:
    return key == "$ref" and isinstance(value, str) and value.startswith("#")


def _refers(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(map(_refers, schema))
    if not isinstance(schema, Mapping):
        return False
    return any(_is_reference(key, value) or (key not in _VALUES and _refers(value)) for key, value in schema.items())


def types_of(schema: Any, root: Any, depth: int = 0) -> frozenset[str]:
    """Return the JSON types that a schema allows. `root`: the schema that its references point into."""
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
        return frozenset().union(*(types_of_value(value) for value in schema["enum"])) or ALL
    if "const" in schema:
        return types_of_value(schema["const"])
    for keyword in ("anyOf", "oneOf"):
        if isinstance(schema.get(keyword), list):
            return frozenset().union(*(types_of(one, root, depth + 1) for one in schema[keyword])) or ALL
    return ALL


def types_of_value(value: Any) -> frozenset[str]:
    """Return the JSON types of a value: a whole number has two."""
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return frozenset({"integer", "number"})
    kinds: list[tuple[type, str]] = [(float, "number"), (str, "string"), (list, "array"), (dict, "object")]
    return frozenset({next((name for kind, name in kinds if isinstance(value, kind)), "null")})


def resolved(reference: str, root: Any) -> Any:
    """Return the target of a reference inside of the same schema; {} if there is none."""
    place = root
    if not reference.startswith("#"):
        return {}
    for part in reference[1:].split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        place = place.get(key, {}) if isinstance(place, Mapping) else {}
    return place
