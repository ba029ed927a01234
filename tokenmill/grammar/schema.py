"""JSON Schemas (draft 2020-12) made canonical, and refused where a grammar could not serve them exactly.

The rule: whatever an accepted schema lets through is valid under it. A keyword that a grammar cannot express is refused
with its JSON path, unless it says nothing here (`uniqueItems: false`). What the grammar libraries read loosely is
rewritten (dates, patterns, lists under `items`). Narrower than the schema is allowed, and this is where: keys come in
the order of `properties`, then other required ones, then the rest; integers have no fraction; strings escape only
what they must.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from tokenmill.errors import GrammarError
from tokenmill.grammar.patterns import PatternError, rewrite

MAX_SCHEMA_BYTES = 256 << 10
MAX_DEPTH = 100
"""Levels of JSON, not of schemas: one schema inside another takes two or three."""

Json = Any
_TYPES = frozenset(("null", "boolean", "object", "array", "number", "string", "integer"))

_YEAR = "([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][48]|[13579][26]|[2468]0)00)"
_DATE = (
    f"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|"
    f"02-(0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+\-]([01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9\\-]{0,61}[A-Za-z0-9])?"
_REWRITTEN_FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "hostname": f"^{_LABEL}(\\.{_LABEL}){{0,3}}$",  # at most 255 characters; a name may have 253
}
_KEPT_FORMATS = frozenset(("duration", "email", "ipv4", "ipv6", "uri", "uuid"))
_NUMBER_FORMATS = frozenset(("int32", "int64", "uint32", "uint64", "float", "double", "int8", "int16", "decimal"))

_SAYS_NOTHING: dict[str, Callable[[Json], bool]] = {
    "not": lambda value: value is False,
    "uniqueItems": lambda value: value is False,
    "unevaluatedProperties": lambda value: value is True or value == {},
    "unevaluatedItems": lambda value: value is True or value == {},
    "propertyNames": lambda value: value is True or value == {} or value == {"type": "string"},
    "dependentRequired": lambda value: value == {},
    "dependentSchemas": lambda value: value == {},
    "dependencies": lambda value: value == {},
    "if": lambda value: False,
    "then": lambda value: value is True or value == {},
    "else": lambda value: value is True or value == {},
    "contains": lambda value: False,
    "minContains": lambda value: False,
    "maxContains": lambda value: False,
    "$dynamicRef": lambda value: False,
    "$recursiveRef": lambda value: False,
}
_DROPPED = ("x-guidance", "$schema", "$comment", "title", "description", "default", "examples", "deprecated",
            "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "contentSchema")  # fmt: skip


def canonical(schema: Json, param: str | None = None) -> str:
    """The schema's canonical text: equal schemas written alike have one. `schema` is decoded JSON and is not changed.

    GrammarError names keyword and path of what is malformed or cannot be served exactly.
    """
    source = _encode(schema, param)
    _check_size(len(source.encode()), param)
    if schema is False:
        raise GrammarError("The JSON schema cannot be used: at #: `false` allows nothing.", param)
    if schema is True:
        return "{}"
    walk = _Walk(json.loads(source), param)
    walk.run()
    return _encode(walk.root, param)


def decode(text: str, param: str | None = None) -> Json:
    """A schema sent as JSON text. GrammarError if it is none."""
    _check_size(len(text), param)
    try:
        return json.loads(text)
    except RecursionError:
        raise GrammarError(f"The JSON schema is nested more than {MAX_DEPTH} levels deep.", param) from None
    except ValueError as error:
        raise GrammarError(f"The JSON schema is not JSON: {error}", param) from None


def needs_unicode_escapes(source: str) -> bool:
    """Whether a canonical schema speaks of control characters that JSON writes as \\u00XX.

    Only then may the answer escape so, and no object may have keys that the schema does not name: a key of another
    spelling would go past its own schema.
    """
    return any(mark in source for mark in _CONTROL_MARKS)


_CONTROL_MARKS = tuple(
    mark
    for code in range(0x20) if code not in (8, 9, 10, 12, 13)
    for mark in (f"\\u{code:04x}", f"\\\\x{code:02X}")
)  # fmt: skip


def _check_size(size: int, param: str | None) -> None:
    if size > MAX_SCHEMA_BYTES:
        raise GrammarError(f"The JSON schema takes {size} bytes; at most {MAX_SCHEMA_BYTES} are allowed.", param)


def _encode(value: Json, param: str | None) -> str:
    if _depth(value) > MAX_DEPTH:
        raise GrammarError(f"The JSON schema is nested more than {MAX_DEPTH} levels deep.", param)
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        raise GrammarError("The JSON schema has characters that cannot be written in UTF-8.", param) from None
    except ValueError:
        raise GrammarError("The JSON schema has a number that is not finite.", param) from None
    return text


def _depth(value: Json) -> int:
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [child for node in level for child in _children(node) if isinstance(child, dict | list)]
    return depth


def _children(node: Json) -> list[Json]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def pointer(path: str, *keys: str | int) -> str:
    """A JSON pointer one or more steps further."""
    return "/".join([path, *(str(key).replace("~", "~0").replace("/", "~1") for key in keys)])


class _Walk:
    """Goes through every schema that the root holds or refers to, rewriting in place."""

    def __init__(self, root: Json, param: str | None) -> None:
        self.root = root
        self._param = param
        self._seen: set[int] = set()
        self._todo: list[tuple[str, Json]] = [("#", root)]
        self._open = ""  # where an object allows keys that are not named, besides named ones
        self._controls = ""  # where a control character is spoken of

    def run(self) -> None:
        """Visits all. GrammarError at the first fault."""
        while self._todo:
            path, node = self._todo.pop()
            if isinstance(node, bool) or id(node) in self._seen:
                continue
            if not isinstance(node, dict):
                self._refuse(path, "a schema is an object, true or false")
            self._seen.add(id(node))
            self._visit(path, node)
        if self._open and self._controls:
            self._refuse(self._controls, "a control character beside an object with `additionalProperties` "
                         f"({self._open}) is not supported")  # fmt: skip

    def _visit(self, path: str, node: dict[str, Json]) -> None:
        for key in _DROPPED:
            node.pop(key, None)
        self._drop_what_says_nothing(path, node)
        self._modernize(path, node)
        for key, value in list(node.items()):
            check = _CHECKS.get(key)
            if check is not None:
                check(self, pointer(path, key), value)
        self._patterns(path, node)
        self._format(path, node)
        self._counts(path, node)
        if node.get("additionalProperties") is not False and _names_keys(node):
            self._open = path

    def _drop_what_says_nothing(self, path: str, node: dict[str, Json]) -> None:
        if "if" not in node:
            for key in ("then", "else"):
                node.pop(key, None)
        if "contains" not in node:
            for key in ("minContains", "maxContains"):
                node.pop(key, None)
        for key in [key for key in node if key in _SAYS_NOTHING]:
            if not _SAYS_NOTHING[key](node[key]):
                self._refuse(pointer(path, key), f"`{key}` cannot be served exactly")
            del node[key]

    def _modernize(self, path: str, node: dict[str, Json]) -> None:
        """Lists under `items` are `prefixItems` since 2020-12, and what was `additionalItems` is `items`."""
        rest = node.pop("additionalItems", None)
        if isinstance(node.get("items"), list):
            if "prefixItems" in node:
                self._refuse(pointer(path, "items"), "a list cannot stand beside `prefixItems`")
            items = node.pop("items")
            if items:
                node["prefixItems"] = items
            if rest is not None:
                node["items"] = rest

    def _patterns(self, path: str, node: dict[str, Json]) -> None:
        if "pattern" in node:
            node["pattern"] = self._pattern(pointer(path, "pattern"), node["pattern"])
        found = node.get("patternProperties")
        if found:
            where = pointer(path, "patternProperties")
            rewritten = {self._pattern(pointer(where, key), key): value for key, value in found.items()}
            if len(rewritten) < len(found):
                self._refuse(where, "two patterns mean the same")
            node["patternProperties"] = rewritten

    def _pattern(self, path: str, pattern: Json) -> str:
        if not isinstance(pattern, str):
            self._refuse(path, "a pattern is a string")
        try:
            found = rewrite(pattern, search=True)
        except PatternError as error:
            self._refuse(path, f"the pattern cannot be served: {error}")
        if found.controls:
            self._controls = path
        return found.text

    def _format(self, path: str, node: dict[str, Json]) -> None:
        name = node.get("format")
        if name is None:
            return
        kinds = node.get("type")
        kinds = [kinds] if isinstance(kinds, str) else kinds
        texts = kinds is None or "string" in kinds
        if name in _REWRITTEN_FORMATS:
            del node["format"]
            if texts:
                self._also_matches(node, rewrite(_REWRITTEN_FORMATS[name], search=True).text)
        elif not texts or (name in _NUMBER_FORMATS and kinds is None):
            del node["format"]  # speaks of strings only, or of how a number is stored
        elif name not in _KEPT_FORMATS:
            known = ", ".join(sorted([*_REWRITTEN_FORMATS, *_KEPT_FORMATS]))
            self._refuse(pointer(path, "format"), f"the format {name!r} is not supported. Supported: {known}")

    @staticmethod
    def _also_matches(node: dict[str, Json], pattern: str) -> None:
        if "pattern" not in node:
            node["pattern"] = pattern
        else:
            node["allOf"] = [*node.get("allOf", []), {"pattern": pattern}]

    def _counts(self, path: str, node: dict[str, Json]) -> None:
        """Keys that the schema does not name may come twice and count twice: only one more of them can be asked for."""
        least = node.get("minProperties", 0)
        if least > len(node.get("required", ())) + 1:
            self._refuse(pointer(path, "minProperties"), "`minProperties` above the number of required keys plus one "
                         "cannot be served exactly")  # fmt: skip

    # What a keyword's value must be. Each gets the keyword's path and value.

    def _schema(self, path: str, value: Json) -> None:
        self._todo.append((path, value))

    def _schema_list(self, path: str, value: Json) -> None:
        if not isinstance(value, list) or not value:
            self._refuse(path, "expected a list of schemas that is not empty")
        self._todo += [(pointer(path, place), one) for place, one in enumerate(value)]

    def _schema_map(self, path: str, value: Json) -> None:
        if not isinstance(value, dict):
            self._refuse(path, "expected an object of schemas")
        for key, one in value.items():
            self._text(pointer(path, key), key)
            self._todo.append((pointer(path, key), one))

    def _type(self, path: str, value: Json) -> None:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(isinstance(n, str) and n in _TYPES for n in names):
            self._refuse(path, f"expected one or more of {', '.join(sorted(_TYPES))}; given {_short(value)}")

    def _count(self, path: str, value: Json) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
            self._refuse(path, f"expected a whole number that is not negative; given {_short(value)}")

    def _number(self, path: str, value: Json) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self._refuse(path, f"expected a number; given {_short(value)}")
        if path.endswith("/multipleOf") and value <= 0:
            self._refuse(path, "expected a number above 0")

    def _required(self, path: str, value: Json) -> None:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self._refuse(path, "expected a list of strings")
        if len(set(value)) < len(value):
            self._refuse(path, "a name is listed twice")
        for name in value:
            self._text(path, name)

    def _values(self, path: str, value: Json) -> None:
        if not isinstance(value, list) or not value:
            self._refuse(path, "expected a list of values that is not empty")
        for place, one in enumerate(value):
            self._value(pointer(path, place), one)

    def _value(self, path: str, value: Json) -> None:
        if isinstance(value, str):
            self._text(path, value)
        for child in [*(value if isinstance(value, dict) else ()), *_children(value)]:
            self._value(path, child)

    def _text(self, path: str, value: str) -> None:
        if any(c < " " and c not in "\b\t\n\f\r" for c in value):
            self._controls = path

    def _string(self, path: str, value: Json) -> None:
        if not isinstance(value, str):
            self._refuse(path, f"expected a string; given {_short(value)}")

    def _ref(self, path: str, value: Json) -> None:
        self._string(path, value)
        if value.startswith("#/"):
            found = self._find(value)
            if found is _MISSING:
                self._refuse(path, f"{value!r} does not exist")
            self._todo.append((value, found))
        elif not value.startswith("#"):
            self._refuse(path, f"{value!r} is not inside this schema; only references that begin with '#' are followed")

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
            self._refuse(path, "`$id` inside a schema is not supported")

    def _refuse(self, path: str, why: str) -> Any:
        raise GrammarError(f"The JSON schema cannot be used: at {path}: {why}.", self._param)


_MISSING = object()


def _names_keys(node: dict[str, Json]) -> bool:
    return any(node.get(key) for key in ("properties", "patternProperties", "required"))


def _short(value: Json) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


_Check = Callable[[_Walk, str, Json], None]
_CHECKS: dict[str, _Check] = {
    **dict.fromkeys(("items", "additionalProperties"), _Walk._schema),
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), _Walk._schema_list),
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), _Walk._schema_map),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _Walk._count),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), _Walk._number),
    "type": _Walk._type,
    "required": _Walk._required,
    "enum": _Walk._values,
    "const": _Walk._value,
    "format": _Walk._string,
    "$ref": _Walk._ref,
    "$id": _Walk._id,
}
