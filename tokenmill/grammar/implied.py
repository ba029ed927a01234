"""Implied types: a schema that names no type gets the types that its keywords belong to.

JSON Schema reads `{"properties": …}` as allowing every number too, which clients rarely intend: TGI's guide and its
clients leave `type` out. Keywords of several types imply all of these. Invariant: the schema then allows a subset of
the values that it allowed before. A schema is left unchanged where its types are named otherwise (by `enum`, `const`,
or beside its keywords in `allOf`, `anyOf` or behind `$ref`), and where fewer values inside would mean more values
outside: under `if`, and in a `oneOf` whose alternatives are not proven exclusive.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Literal, NamedTuple

from tokenmill.grammar import formats
from tokenmill.grammar.disjoint import Prover
from tokenmill.grammar.values import Json, Resolve, assertions, is_a, types

Kinds = frozenset[str]

_KEYWORDS = {
    "object": ("properties", "patternProperties", "additionalProperties", "unevaluatedProperties", "propertyNames",
               "required", "minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "dependencies"),
    "array": ("items", "prefixItems", "additionalItems", "unevaluatedItems", "contains", "minContains", "maxContains",
              "minItems", "maxItems", "uniqueItems"),
    "string": ("pattern", "minLength", "maxLength", "contentEncoding", "contentMediaType", "contentSchema"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}  # fmt: skip
_KIND_OF = {keyword: kind for kind, keywords in _KEYWORDS.items() for keyword in keywords}
_ALL: Kinds = frozenset((*_KEYWORDS, "boolean", "null"))
_NONE: Kinds = frozenset()
_CHOICES = ("anyOf", "oneOf")
_STRICT = ("if", "propertyNames")
_DEPTH = 12


def keyword_types_of(node: dict[str, Json]) -> Kinds:
    """Return the types that a schema's own keywords belong to, without its subschemas."""
    kinds = {_KIND_OF[key] for key in node.keys() & _KIND_OF.keys()}
    name = node.get("format")
    if not isinstance(name, str):
        return frozenset(kinds)
    if name in formats.OF_INTEGERS:
        return frozenset(kinds - {"number"} | {"integer"})
    return frozenset(kinds | {"number" if name in formats.OF_NUMBERS else "string"})


def imply(nodes: list[dict[str, Json]], resolve: Resolve, keyword_types: dict[int, Kinds]) -> None:
    """Add the implied types to the schemas of a document, and turn each exclusive `oneOf` into `anyOf`. In place.

    nodes: all schemas of the document, well formed, the root first. keyword_types: `keyword_types_of` each
    schema as it was sent, by its id.
    """
    view = _View(resolve, keyword_types)
    places = _Places(nodes, view)
    proven, strict = _find_exclusive(nodes, view, places, Prover(resolve))
    for node, kinds in proven:
        node["anyOf"] = node.pop("oneOf")
        if kinds:
            _add(node, kinds)
    if proven:
        places = _Places(nodes, _View(resolve, keyword_types))
    for node, kinds in [(node, places.to_add(node)) for node in nodes if id(node) not in strict]:
        if kinds:
            _add(node, kinds)


def _find_exclusive(
    nodes: list[dict[str, Json]], view: _View, places: _Places, prover: Prover
) -> tuple[list[tuple[dict[str, Json], Kinds]], set[int]]:
    """Find the schemas whose `oneOf` can become `anyOf`, and those that must not change.

    Returns the former with the types that each must then name, and the ids of the latter.
    """
    proven: list[tuple[dict[str, Json], Kinds]] = []
    open_ones: list[Json] = []
    for node in nodes:
        open_ones += [node[key] for key in _STRICT if key in node]
        if "oneOf" in node:
            among, assumed = places.chosen_among(node)
            if "anyOf" not in node and prover.exclusive(node["oneOf"], sorted(among)):
                proven.append((node, assumed))
            else:
                open_ones += node["oneOf"]
    strict = view.all_in(open_ones)
    return [(node, kinds) for node, kinds in proven if not kinds or id(node) not in strict], strict


def _add(node: dict[str, Json], kinds: Kinds) -> None:
    node["type"] = next(iter(kinds)) if len(kinds) == 1 else sorted(kinds)


class _View:
    """Named and implied types of a document's schemas. Valid as long as the schemas do not change."""

    def __init__(self, resolve: Resolve, keyword_types: dict[int, Kinds]) -> None:
        self._resolve, self._keyword_types = resolve, keyword_types
        self._named: dict[int, Kinds | None] = {}
        self._implied: dict[int, Kinds] = {}

    def named(self, node: Json, depth: int = _DEPTH) -> Kinds | None:
        """Return the types that a schema names, itself or through `allOf`, `$ref` and choices.

        None if it names none, or if an alternative of a choice names none.
        """
        if not isinstance(node, dict) or depth == 0:
            return _NONE if node is False else None
        if id(node) not in self._named:
            self._named[id(node)] = None  # the value for a schema that refers to itself
            self._named[id(node)] = self._find_named(node, depth - 1)
        return self._named[id(node)]

    def _find_named(self, node: dict[str, Json], depth: int) -> Kinds | None:
        found = [self.named(part, depth) for part in self.parts(node)]
        if "type" in node:
            found.append(frozenset(types(node) or ()))
        if "enum" in node or "const" in node:
            found.append(frozenset(_kind_of(value) for value in node.get("enum", [node.get("const")])))
        for key in _CHOICES:
            choices = [self.named(one, depth) for one in node.get(key, ())]
            if choices and None not in choices:
                found.append(_NONE.union(*(kinds for kinds in choices if kinds)))
        firm = [kinds for kinds in found if kinds is not None]
        return _common(firm) if firm else None

    def implied(self, node: Json, depth: int = _DEPTH) -> Kinds:
        """Return the types that a schema names or implies, itself or through `allOf`, `$ref` and choices."""
        named = self.named(node)
        if named is not None or not isinstance(node, dict) or depth == 0:
            return named or _NONE
        if id(node) not in self._implied:
            self._implied[id(node)] = _NONE
            parts = [*self.parts(node), *(one for key in _CHOICES for one in node.get(key, ()))]
            kinds = self.keyword_types(node).union(*(self.implied(part, depth - 1) for part in parts))
            self._implied[id(node)] = kinds
        return self._implied[id(node)]

    def keyword_types(self, node: dict[str, Json]) -> Kinds:
        """Return the types that a schema's own keywords belong to."""
        return self._keyword_types.get(id(node), _NONE)

    def parts(self, node: dict[str, Json]) -> list[Json]:
        """Return the schemas that a value must match besides a schema's own keywords."""
        return [*node.get("allOf", ()), *([self._resolve(node["$ref"])] if "$ref" in node else ())]

    def alias_target(self, node: dict[str, Json]) -> Json:
        """Return the schema that this one is an alias of; None if it has assertions of its own."""
        refers = "$ref" in node or "allOf" in node
        if not refers or len(assertions(node)) > 1 or self.keyword_types(node):
            return None
        parts = self.parts(node)
        return parts[0] if len(parts) == 1 else None

    def all_in(self, nodes: Iterable[Json]) -> set[int]:
        """Return the ids of all schemas that these contain, at any depth, or refer to."""
        found: set[int] = set()
        todo = list(nodes)
        while todo:
            node = todo.pop()
            if isinstance(node, dict) and id(node) not in found:
                found.add(id(node))
                todo += [child for child, _ in self.children(node)]
                todo += [node[key] for key in _STRICT if key in node]
        return found

    def children(self, node: dict[str, Json]) -> Iterator[tuple[Json, _Place]]:
        """Yield the subschemas, or targets of references, that may be narrowed without changing a schema's meaning."""
        values = [node[key] for key in ("items", "additionalProperties") if key in node]
        values += [one for key in ("properties", "patternProperties") for one in node.get(key, {}).values()]
        values += node.get("prefixItems", ())
        yield from zip(values, repeat(_Place("value", node)))
        for key in _CHOICES:
            yield from zip(node.get(key, ()), repeat(_Place("choice", node)))
        parts = [*self.parts(node), *(node[key] for key in ("then", "else") if key in node)]
        yield from zip(parts, repeat(_Place("part", node)))


class _Place(NamedTuple):
    """The role of a schema in its parent.

    `way`: "value" (it applies to a value inside the parent's value), "choice" (to the same value, as one of several
    alternatives) or "part" (to the same value, always).
    """

    way: Literal["value", "choice", "part"]
    parent: dict[str, Json]


class _Places:
    """The places of all schemas of a document, and the types that can be added there."""

    def __init__(self, nodes: list[dict[str, Json]], view: _View) -> None:
        self._view = view
        self._of: dict[int, list[_Place]] = defaultdict(list)
        self._left: dict[int, Kinds] = {}
        self._note(nodes[0], _Place("value", {}))
        for node in nodes:
            if view.alias_target(node) is None:
                for child, place in view.children(node):
                    self._note(child, place)

    def _note(self, node: Json, place: _Place) -> None:
        for _ in range(_DEPTH):
            if not isinstance(node, dict):
                break
            self._of[id(node)].append(place)
            node = self._view.alias_target(node)

    def to_add(self, node: dict[str, Json]) -> Kinds:
        """Return the types to add to a schema; none if it stays unchanged."""
        view, places = self._view, self._of[id(node)]
        # A schema that is only a choice passes the types on to its alternatives.
        passes_on = not view.keyword_types(node) and assertions(node) in ({"anyOf"}, {"oneOf"})
        if passes_on or view.alias_target(node) is not None or view.named(node) is not None:
            return _NONE
        if all(place.way == "part" for place in places):
            return _NONE
        kinds = view.implied(node)
        return kinds if all(self._fits(kinds, place) for place in places) else _NONE

    def chosen_among(self, node: dict[str, Json]) -> tuple[Kinds, Kinds]:
        """Return the types of the values that `oneOf` chooses among, and the types that the schema must name for that.

        The second set is empty unless only the alternatives imply the types.
        """
        named = self._view.named(node)
        if named is not None:
            return named, _NONE
        found = [self._view.implied(one) for one in node["oneOf"]]
        kinds = _NONE.union(*found) if all(found) else _ALL
        if kinds == _ALL or None not in map(self._view.named, node["oneOf"]):
            return kinds, _NONE
        fits = all(self._fits(kinds, place) for place in self._of[id(node)])
        return (kinds, kinds) if fits else (_ALL, _NONE)

    def _fits(self, kinds: Kinds, place: _Place) -> bool:
        """Return whether a schema restricted to these types leaves values at a place, or all values in a part."""
        if place.way == "part":
            whole = self._view.implied(place.parent)
            return _common([kinds, whole]) == whole
        return bool(_common([kinds, self._left_to_choice(place)]))

    def _left_to_choice(self, place: _Place) -> Kinds:
        """Return the types that the surroundings of a choice leave to it."""
        if place.way == "value":
            return _ALL
        named = self._view.named(place.parent)
        return _common([_ALL if named is None else named, self._left_everywhere(place.parent)])

    def _left_everywhere(self, node: dict[str, Json]) -> Kinds:
        """Return the types that are left to a schema at all of its places."""
        if id(node) not in self._left:
            self._left[id(node)] = _ALL  # the value for a schema that refers to itself
            self._left[id(node)] = _common([_ALL, *map(self._left_to_choice, self._of[id(node)])])
        return self._left[id(node)]


def _kind_of(value: Json) -> str:
    return next(kind for kind in _ALL if is_a(value, kind))


def _common(found: Iterable[Kinds]) -> Kinds:
    """Return the intersection of one or more sets of types, where an integer is a number."""
    common, *others = found
    for kinds in others:
        common = frozenset(kind for kind in common | kinds if _is_among(kind, common) and _is_among(kind, kinds))
    return common


def _is_among(kind: str, kinds: Kinds) -> bool:
    return kind in kinds or (kind == "integer" and "number" in kinds)
