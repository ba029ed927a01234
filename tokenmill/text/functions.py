"""The functions that a chat's tools are: their names, the schemas of their arguments, and what those schemas say."""

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
    """The function that a tool is: OpenAI's shape, or the function alone."""
    inner = tool.get("function")
    return inner if isinstance(inner, Mapping) else tool


def name_of(tool: Tool) -> str:
    """The function's name."""
    return str(function_of(tool).get("name", ""))


def is_strict(tool: Tool) -> bool:
    """True if its arguments must fit their schema wherever it is called."""
    return bool(function_of(tool).get("strict"))


def parameters_of(tool: Tool) -> dict[str, Any]:
    """The schema of a function's arguments: always of an object."""
    found = function_of(tool).get("parameters")
    return {"type": "object", **found} if isinstance(found, Mapping) else {"type": "object"}


def schemas_of(tools: Sequence[Tool]) -> dict[str, Any]:
    """The arguments' schemas by function."""
    return {name_of(tool): parameters_of(tool) for tool in tools}


def keys_of(schema: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The properties that an object must have, and those that it may have, each in the schema's order."""
    given, required = schema.get("properties"), schema.get("required")
    keys = list(given) if isinstance(given, Mapping) else []
    firm = [key for key in keys if isinstance(required, list) and key in required]
    return firm, [key for key in keys if key not in firm]


def others_of(schema: Mapping[str, Any]) -> Any:
    """The schema of whatever an object holds, if it names no properties; else False: it holds what it names."""
    return False if schema.get("properties") else schema.get("additionalProperties", True)


def names_of(schema: Any) -> frozenset[str]:
    """The properties that a schema names."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return frozenset(properties) if isinstance(properties, Mapping) else frozenset()


def property_of(schema: Any, name: str) -> Any:
    """The schema of a property; {} if nothing is said about it."""
    if not isinstance(schema, Mapping):
        return {}
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return properties[name]
    others = schema.get("additionalProperties")
    return others if isinstance(others, Mapping) else {}


def moved(schema: Any, place: str) -> Any:
    """A schema for a place inside of another one: its references begin there. `place`: a JSON pointer, as "#/a/b"."""
    if isinstance(schema, list):
        return [moved(one, place) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: value if key in _VALUES else place + value[1:] if _is_reference(key, value) else moved(value, place)
        for key, value in schema.items()
    }


def alone(schema: Any, root: Mapping[str, Any]) -> Any:
    """A schema that stands inside of `root`, by itself: with all of `root` if it refers to a part of that, and with
    the options for grammars that all of it has."""
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
        return frozenset().union(*(types_of_value(value) for value in schema["enum"])) or ALL
    if "const" in schema:
        return types_of_value(schema["const"])
    for keyword in ("anyOf", "oneOf"):
        if isinstance(schema.get(keyword), list):
            return frozenset().union(*(types_of(one, root, depth + 1) for one in schema[keyword])) or ALL
    return ALL


def types_of_value(value: Any) -> frozenset[str]:
    """The JSON types that a value has: a whole number has two."""
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return frozenset({"integer", "number"})
    kinds: list[tuple[type, str]] = [(float, "number"), (str, "string"), (list, "array"), (dict, "object")]
    return frozenset({next((name for kind, name in kinds if isinstance(value, kind)), "null")})


def resolved(reference: str, root: Any) -> Any:
    """What a reference inside of the same schema points at; {} if there is no such thing."""
    place = root
    if not reference.startswith("#"):
        return {}
    for part in reference[1:].split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        place = place.get(key, {}) if isinstance(place, Mapping) else {}
    return place
