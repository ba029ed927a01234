"""A JSON schema as a document: checks that every schema in it is well formed, and rewrites it for the grammar library.

Rewritten is all that the library reads loosely: lists under `items`, patterns, formats, large bounds. Keywords without
effect are removed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import NoReturn
from urllib.parse import unquote

from tokenmill.errors import GrammarError
from tokenmill.grammar import formats
from tokenmill.grammar.implied import keyword_types_of
from tokenmill.grammar.patterns import PatternError, conjuncts, rewrite
from tokenmill.grammar.values import Json, children, types

_TYPES = frozenset(("null", "boolean", "object", "array", "number", "string", "integer"))

_WITHOUT_EFFECT: dict[str, Callable[[Json], bool]] = {
    "not": lambda value: value is False,
    "uniqueItems": lambda value: value is False,
    "propertyNames": lambda value: value is True or value == {} or value == {"type": "string"},
    "dependentRequired": lambda value: value == {},
    "dependencies": lambda value: value == {},
    "unevaluatedProperties": lambda value: value is True or value == {},
    "unevaluatedItems": lambda value: value is True or value == {},
    "dependentSchemas": lambda value: value == {},
    "contains": lambda value: False,
    "minContains": lambda value: False,
    "maxContains": lambda value: False,
    "$dynamicRef": lambda value: False,
    "$recursiveRef": lambda value: False,
}
_BY_CASES = frozenset(("uniqueItems", "propertyNames", "dependentRequired", "dependencies"))
_EXACT = 2**53  # integers up to here are floats, too
_MOST_INTEGER = 2**63 - 1024  # the largest float among integers of 64 bits
_BOUNDS = (("minimum", True), ("exclusiveMinimum", True), ("maximum", False), ("exclusiveMaximum", False))
_DROPPED = ("x-guidance", "$schema", "$comment", "title", "description", "default", "examples", "deprecated",
            "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "contentSchema")  # fmt: skip


def pointer(path: str, *keys: str | int) -> str:
    """Return a JSON pointer extended by one or more keys."""
    return "/".join([path, *(str(key).replace("~", "~0").replace("/", "~1") for key in keys)])


class Document:
    """All schemas that a root schema contains or refers to. The constructor checks them and rewrites them in place.

    `nodes`: all schemas that are objects, each with its path, parents before children. `keyword_types`: the types that
    the keywords of each schema belong to, by the schema's id. `controls`: the path of a control character that JSON
    writes as \\u00XX, or "". The constructor raises GrammarError at the first fault.
    """

    def __init__(self, root: Json, param: str | None) -> None:
        self.root = root
        self.nodes: list[tuple[str, dict[str, Json]]] = []
        self.keyword_types: dict[int, frozenset[str]] = {}
        self.controls = ""
        self._param = param
        self._todo: list[tuple[str, Json]] = [("#", root)]
        seen: set[int] = set()
        while self._todo:
            path, node = self._todo.pop()
            if isinstance(node, bool) or id(node) in seen:
                continue
            if not isinstance(node, dict):
                self.refuse(path, "a schema is an object, true or false")
            seen.add(id(node))
            self.nodes.append((path, node))
            self._visit(path, node)

    def _visit(self, path: str, node: dict[str, Json]) -> None:
        self.keyword_types[id(node)] = keyword_types_of(node)
        for key in _DROPPED:
            node.pop(key, None)
        self._drop_without_effect(path, node)
        self._modernize(path, node)
        for key, value in list(node.items()):
            check = _CHECKS.get(key)
            if check is not None:
                check(self, pointer(path, key), value)
        self._patterns(path, node)

    def rewrite_for_types(self) -> None:
        """Rewrite keywords whose meaning depends on the schema's types. Call once, after types were implied."""
        for path, node in self.nodes:
            self._format(path, node)
            self._bounds(path, node)

    def _drop_without_effect(self, path: str, node: dict[str, Json]) -> None:
        if node.get("not") is True or node.get("not") == {}:  # zod's spelling of a schema without valid values
            del node["not"]
            node["allOf"] = [*_list(node.get("allOf")), False]
        if "if" not in node:
            for key in ("then", "else"):
                node.pop(key, None)
        if "contains" not in node:
            for key in ("minContains", "maxContains"):
                node.pop(key, None)
        for key in [key for key in node if key in _WITHOUT_EFFECT]:
            if _WITHOUT_EFFECT[key](node[key]):
                del node[key]
            elif key not in _BY_CASES:
                self.refuse(pointer(path, key), f"`{key}` cannot be served exactly")

    def _modernize(self, path: str, node: dict[str, Json]) -> None:
        """Translate older drafts: a list under `items` becomes `prefixItems`, and `additionalItems` becomes `items`."""
        rest = node.pop("additionalItems", None)
        if isinstance(node.get("items"), list):
            if "prefixItems" in node:
                self.refuse(pointer(path, "items"), "a list cannot stand beside `prefixItems`")
            items = node.pop("items")
            if items:
                node["prefixItems"] = items
            if rest is not None:
                node["items"] = rest

    def _patterns(self, path: str, node: dict[str, Json]) -> None:
        if "pattern" in node:
            where, given = pointer(path, "pattern"), node.pop("pattern")
            for one in conjuncts(given) if isinstance(given, str) else [given]:
                self._also_matches(node, self._pattern(where, one))
        found = node.get("patternProperties")
        if found:
            where = pointer(path, "patternProperties")
            rewritten = {self._pattern(pointer(where, key), key): value for key, value in found.items()}
            if len(rewritten) < len(found):
                self.refuse(where, "two patterns mean the same")
            node["patternProperties"] = rewritten

    def _pattern(self, path: str, pattern: Json) -> str:
        if not isinstance(pattern, str):
            self.refuse(path, "a pattern is a string")
        try:
            found = rewrite(pattern, search=True)
        except PatternError as error:
            self.refuse(path, f"the pattern cannot be served: {error}")
        if found.controls:
            self.controls = path
        return found.text

    def _format(self, path: str, node: dict[str, Json]) -> None:
        name = node.get("format")
        if name is None:
            return
        kinds = types(node)
        texts = kinds is None or "string" in kinds
        pattern_decides = "pattern" in node and name not in formats.KEPT | formats.REFUSED
        if texts and name in formats.PATTERNS:
            self._also_matches(node, rewrite(formats.PATTERNS[name], search=True).text)
        numbers_too = name in formats.OF_NUMBERS and kinds is None
        if not texts or pattern_decides or numbers_too or name in formats.PATTERNS.keys() | formats.ANY_TEXT:
            del node["format"]
        elif name not in formats.KEPT:
            supported = f"the format {name!r} is not supported. Supported: {formats.SUPPORTED}"
            self.refuse(pointer(path, "format"), supported)

    @staticmethod
    def _also_matches(node: dict[str, Json], pattern: str) -> None:
        if "pattern" not in node:
            node["pattern"] = pattern
        else:
            node["allOf"] = [*node.get("allOf", []), {"pattern": pattern}]

    def _bounds(self, path: str, node: dict[str, Json]) -> None:
        """Tighten large bounds to exact floats and 64-bit integers, which is what the library reads."""
        most = _EXACT if "number" in (types(node) or ("number",)) else _MOST_INTEGER
        for key, least in _BOUNDS:
            bound = node.get(key, 0)
            if abs(bound) <= _EXACT:
                continue
            if bound > most if least else bound < -most:
                self.refuse(pointer(path, key), f"a bound beyond {most} cannot be served exactly")
            inward = float(max(-most, min(most, bound)))
            if inward < bound if least else inward > bound:
                inward = math.nextafter(inward, math.inf if least else -math.inf)
            node[key] = int(inward)

    # Checks of keyword values. Each takes the keyword's path and value.

    def _schema(self, path: str, value: Json) -> None:
        self._todo.append((path, value))

    def _schema_list(self, path: str, value: Json) -> None:
        if not isinstance(value, list) or not value:
            self.refuse(path, "expected a list of schemas that is not empty")
        self._todo += [(pointer(path, place), one) for place, one in enumerate(value)]

    def _schema_map(self, path: str, value: Json) -> None:
        if not isinstance(value, dict):
            self.refuse(path, "expected an object of schemas")
        for key, one in value.items():
            self._text(pointer(path, key), key)
            self._todo.append((pointer(path, key), one))

    def _type(self, path: str, value: Json) -> None:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(isinstance(n, str) and n in _TYPES for n in names):
            self.refuse(path, f"expected one or more of {', '.join(sorted(_TYPES))}; given {_short(value)}")

    def _count(self, path: str, value: Json) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
            self.refuse(path, f"expected a whole number that is not negative; given {_short(value)}")

    def _number(self, path: str, value: Json) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.refuse(path, f"expected a number; given {_short(value)}")
        if path.endswith("/multipleOf") and value <= 0:
            self.refuse(path, "expected a number above 0")

    def _flag(self, path: str, value: Json) -> None:
        if not isinstance(value, bool):
            self.refuse(path, f"expected true or false; given {_short(value)}")

    def _dependents(self, path: str, value: Json) -> None:
        if not isinstance(value, dict):
            self.refuse(path, "expected an object of lists")
        for key, names in value.items():
            self._text(pointer(path, key), key)
            if path.endswith("/dependencies") and isinstance(names, dict | bool):
                self.refuse(pointer(path, key), "`dependencies` on a schema cannot be served exactly")
            self._required(pointer(path, key), names)

    def _required(self, path: str, value: Json) -> None:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.refuse(path, "expected a list of strings")
        if len(set(value)) < len(value):
            self.refuse(path, "a name is listed twice")
        for name in value:
            self._text(path, name)

    def _values(self, path: str, value: Json) -> None:
        if not isinstance(value, list) or not value:
            self.refuse(path, "expected a list of values that is not empty")
        for place, one in enumerate(value):
            self._value(pointer(path, place), one)

    def _value(self, path: str, value: Json) -> None:
        if isinstance(value, str):
            self._text(path, value)
        for child in [*(value if isinstance(value, dict) else ()), *children(value)]:
            self._value(path, child)

    def _text(self, path: str, value: str) -> None:
        if any(c < " " and c not in "\b\t\n\f\r" for c in value):
            self.controls = path

    def _string(self, path: str, value: Json) -> None:
        if not isinstance(value, str):
            self.refuse(path, f"expected a string; given {_short(value)}")

    def _ref(self, path: str, value: Json) -> None:
        self._string(path, value)
        if value.startswith("#/"):
            found = self._find(value)
            if found is _MISSING:
                self.refuse(path, f"{value!r} does not exist")
            self._todo.append((value, found))
        elif not value.startswith("#"):
            self.refuse(path, f"{value!r} is not inside this schema; only references that begin with '#' are followed")

    def resolve(self, ref: str) -> Json:
        """Return the target of a reference; None if the reference is not followed here."""
        found = self.root if ref == "#" else self._find(ref) if ref.startswith("#/") else None
        return None if found is _MISSING else found

    def _find(self, ref: str) -> Json:
        node = self.root
        for step in unquote(ref[2:]).split("/"):
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and key in node:
                node = node[key]
            elif isinstance(node, list) and key.isdigit() and int(key) < len(node):
                node = node[int(key)]
            else:
                return _MISSING
        return node

    def _id(self, path: str, value: Json) -> None:
        if path != "#/$id":
            self.refuse(path, "`$id` inside a schema is not supported")

    def refuse(self, path: str, why: str) -> NoReturn:
        """Raise GrammarError with the path and the reason."""
        raise GrammarError(f"The JSON schema cannot be used: at {path}: {why}.", self._param)


_MISSING = object()


def _list(value: Json) -> list[Json]:
    return value if isinstance(value, list) else []


def _short(value: Json) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


_Check = Callable[[Document, str, Json], None]
_CHECKS: dict[str, _Check] = {
    **dict.fromkeys(("items", "additionalProperties", "propertyNames", "if", "then", "else"), Document._schema),
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), Document._schema_list),
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), Document._schema_map),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), Document._count),
    **dict.fromkeys(("minProperties", "maxProperties"), Document._count),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), Document._number),
    "type": Document._type,
    **dict.fromkeys(("dependentRequired", "dependencies"), Document._dependents),
    "uniqueItems": Document._flag,
    "required": Document._required,
    "enum": Document._values,
    "const": Document._value,
    "format": Document._string,
    "$ref": Document._ref,
    "$id": Document._id,
}
