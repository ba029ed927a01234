"""A part of a tool's arguments, for formats that write texts without quotes, with the checks of its schema."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from tokenmill.errors import ToolError
from tokenmill.text.functions import Tool, alone, is_strict, name_of, resolved, types_of

_SAYS_NOTHING = frozenset({"type", "title", "description", "default", "examples", "deprecated", "$comment"})
_MOST_DEPTH = 8


class Part(NamedTuple):
    """A part of the arguments. `root`: the schema of all arguments, into which references of `schema` point."""

    tool: Tool
    root: Mapping[str, Any]
    schema: Any

    @property
    def types(self) -> frozenset[str]:
        """The JSON types of the part."""
        return types_of(self.schema, self.root)

    def alone(self) -> Any:
        """Return the part's schema by itself."""
        return alone(self.schema, self.root)

    def followed(self) -> Any:
        """Return the schema to which the part's refers, or its own."""
        schema = self.schema
        for _ in range(_MOST_DEPTH):
            reference = schema.get("$ref") if isinstance(schema, Mapping) else None
            if not isinstance(reference, str) or not schema.keys() <= {"$ref", *_SAYS_NOTHING}:
                break
            schema = resolved(reference, self.root)
        return schema

    def values(self) -> list[Any]:
        """Return the values that the part's schema lists, if it lists any."""
        schema = self.followed()
        if not isinstance(schema, Mapping) or not schema.keys() <= {"enum", "const", *_SAYS_NOTHING}:
            return []
        listed = [schema["const"]] if "const" in schema else schema.get("enum")
        return listed if isinstance(listed, list) else []

    def texts(self) -> list[str]:
        """Return the texts that the part's schema lists, if it lists nothing else."""
        values = self.values()
        return values if all(isinstance(value, str) for value in values) else []

    def check_object(self, path: str = "") -> None:
        """Check an object whose entries are written one by one. See `check`."""
        self.check(path, ("properties", "required", "additionalProperties", "$defs", "definitions", "x-guidance"))
        if set(self.schema.get("required") or ()) - (self.schema.get("properties") or {}).keys():
            self._refuse(path, "required")

    def check(self, path: str, served: Collection[str] = ()) -> None:
        """Raise ToolError if the function is strict and the schema has keywords that are not `served`. `path`: its
        place in the schema of the arguments."""
        found = _demand(self.schema, self.root, served)
        if found:
            self._refuse(path, found)

    def _refuse(self, path: str, keyword: str) -> None:
        if is_strict(self.tool):
            where = f"parameters.{path}.{keyword}".replace("..", ".")
            raise ToolError(
                f"The strict function {name_of(self.tool)} cannot be served exactly: {where} is not supported there in "
                "this model's tool format",
                param="tools",
            )


def _demand(schema: Any, root: Mapping[str, Any], served: Collection[str], depth: int = 0) -> str:
    """Return a keyword that constrains values and is not `served`; "" if there is none."""
    if depth > _MOST_DEPTH:
        return "$ref"
    if not isinstance(schema, Mapping):
        return ""
    for keyword, value in schema.items():
        if keyword in ("anyOf", "oneOf") and isinstance(value, list):
            inner = next(filter(None, (_demand(one, root, served, depth + 1) for one in value)), "")
        elif keyword == "$ref" and isinstance(value, str):
            inner = _demand(resolved(value, root), root, served, depth + 1)
        else:
            inner = "" if keyword in _SAYS_NOTHING or keyword in served else keyword
        if inner:
            return inner
    return ""
