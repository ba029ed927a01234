"""Types that schemas imply: one whose keywords speak of objects, and that names no type, means objects.

For JSON Schema `{"properties": …}` allows every number, too, and hardly anybody means it: TGI's guide, and what its
clients send, leave `type` out. So a schema gets the types that its keywords belong to, several if they are mixed. It
allows fewer values then, and none that it did not. It is left alone where its types are named otherwise (by `enum`,
`const`, or what stands beside its keywords in `allOf`, `anyOf` or behind `$ref`), and where fewer values in it would be
more outside of it: under `if`, and in a `oneOf` whose alternatives are not proven to exclude each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Literal, NamedTuple

from tokenmill.grammar import formats
from tokenmill.grammar.disjoint import Prover
from tokenmill.grammar.values import Json, Resolve, is_a, said, types

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


def meant_by(node: dict[str, Json]) -> Kinds:
    """The types that the keywords of a schema belong to, its subschemas aside."""
    kinds = {_KIND_OF[key] for key in node.keys() & _KIND_OF.keys()}
    name = node.get("format")
    if not isinstance(name, str):
        return frozenset(kinds)
    if name in formats.OF_INTEGERS:
        return frozenset(kinds - {"number"} | {"integer"})
    return frozenset(kinds | {"number" if name in formats.OF_NUMBERS else "string"})


def imply(nodes: list[dict[str, Json]], resolve: Resolve, meant: dict[int, Kinds]) -> None:
    """Give the schemas of a document the types that they imply, and make `anyOf` of each `oneOf` whose alternatives
    exclude each other. In place.

    nodes: all schemas of the document, well formed, the root first. meant: `meant_by` each, by id, as it was sent.
    """
    view = _View(resolve, meant)
    places = _Places(nodes, view)
    proven, strict = _told_apart(nodes, view, places, Prover(resolve))
    for node, kinds in proven:
        node["anyOf"] = node.pop("oneOf")
        if kinds:
            _add(node, kinds)
    if proven:
        places = _Places(nodes, _View(resolve, meant))
    for node, kinds in [(node, places.to_add(node)) for node in nodes if id(node) not in strict]:
        if kinds:
            _add(node, kinds)


def _told_apart(
    nodes: list[dict[str, Json]], view: _View, places: _Places, prover: Prover
) -> tuple[list[tuple[dict[str, Json], Kinds]], set[int]]:
    """The schemas whose `oneOf` is as good as `anyOf`, each with the types that it must name then; and, by id, those
    that must stay as they are."""
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
    """What the schemas of a document say of types, as long as they do not change."""

    def __init__(self, resolve: Resolve, meant: dict[int, Kinds]) -> None:
        self._resolve, self._meant = resolve, meant
        self._named: dict[int, Kinds | None] = {}
        self._implied: dict[int, Kinds] = {}

    def named(self, node: Json, depth: int = _DEPTH) -> Kinds | None:
        """The types that a schema names, itself or by what stands beside its keywords; None if it names none, or a
        choice leaves them open."""
        if not isinstance(node, dict) or depth == 0:
            return _NONE if node is False else None
        if id(node) not in self._named:
            self._named[id(node)] = None  # of what refers to itself
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
        """The types that a schema names or implies, itself or by what stands beside its keywords."""
        named = self.named(node)
        if named is not None or not isinstance(node, dict) or depth == 0:
            return named or _NONE
        if id(node) not in self._implied:
            self._implied[id(node)] = _NONE
            parts = [*self.parts(node), *(one for key in _CHOICES for one in node.get(key, ()))]
            kinds = self.meant(node).union(*(self.implied(part, depth - 1) for part in parts))
            self._implied[id(node)] = kinds
        return self._implied[id(node)]

    def meant(self, node: dict[str, Json]) -> Kinds:
        """The types that a schema's own keywords belong to."""
        return self._meant.get(id(node), _NONE)

    def parts(self, node: dict[str, Json]) -> list[Json]:
        """What a value must obey besides a schema's own keywords."""
        return [*node.get("allOf", ()), *([self._resolve(node["$ref"])] if "$ref" in node else ())]

    def other_name(self, node: dict[str, Json]) -> Json:
        """The one schema that a schema stands for, as a reference does; None if it says something itself."""
        refers = "$ref" in node or "allOf" in node
        if not refers or len(said(node)) > 1 or self.meant(node):
            return None
        parts = self.parts(node)
        return parts[0] if len(parts) == 1 else None

    def all_in(self, nodes: Iterable[Json]) -> set[int]:
        """The schemas, by id, that these hold at any depth or refer to."""
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
        """The schemas in a schema, or behind its reference, that may be narrowed for all that it says of them."""
        values = [node[key] for key in ("items", "additionalProperties") if key in node]
        values += [one for key in ("properties", "patternProperties") for one in node.get(key, {}).values()]
        values += node.get("prefixItems", ())
        yield from zip(values, repeat(_Place("value", node)))
        for key in _CHOICES:
            yield from zip(node.get(key, ()), repeat(_Place("choice", node)))
        parts = [*self.parts(node), *(node[key] for key in ("then", "else") if key in node)]
        yield from zip(parts, repeat(_Place("part", node)))


class _Place(NamedTuple):
    """Where a schema stands in another one: for a value inside of its values, for these as one of several choices, or
    for all of these."""

    way: Literal["value", "choice", "part"]
    parent: dict[str, Json]


class _Places:
    """Where the schemas of a document stand, and which types they can get there."""

    def __init__(self, nodes: list[dict[str, Json]], view: _View) -> None:
        self._view = view
        self._of: dict[int, list[_Place]] = defaultdict(list)
        self._outsides: dict[int, Kinds] = {}
        self._note(nodes[0], _Place("value", {}))
        for node in nodes:
            if view.other_name(node) is None:
                for child, place in view.children(node):
                    self._note(child, place)

    def _note(self, node: Json, place: _Place) -> None:
        for _ in range(_DEPTH):
            if not isinstance(node, dict):
                break
            self._of[id(node)].append(place)
            node = self._view.other_name(node)

    def to_add(self, node: dict[str, Json]) -> Kinds:
        """The types that a schema is to get; none if it stays as it is."""
        view, places = self._view, self._of[id(node)]
        passes_on = not view.meant(node) and said(node) in ({"anyOf"}, {"oneOf"})  # to its choices
        if passes_on or view.other_name(node) is not None or view.named(node) is not None:
            return _NONE
        if all(place.way == "part" for place in places):
            return _NONE
        kinds = view.implied(node)
        return kinds if all(self._fits(kinds, place) for place in places) else _NONE

    def chosen_among(self, node: dict[str, Json]) -> tuple[Kinds, Kinds]:
        """The types of the values that `oneOf` chooses among, and the same if only its alternatives imply them, so that
        the schema must name them for that to hold."""
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
        """Whether a schema of these types leaves something at a place, and there all that its parent means."""
        if place.way == "part":
            whole = self._view.implied(place.parent)
            return _common([kinds, whole]) == whole
        return bool(_common([kinds, self._room(place)]))

    def _room(self, place: _Place) -> Kinds:
        """The types that are left to a choice by what stands beside it and outside of it."""
        if place.way == "value":
            return _ALL
        named = self._view.named(place.parent)
        return _common([_ALL if named is None else named, self._outside(place.parent)])

    def _outside(self, node: dict[str, Json]) -> Kinds:
        """The types that are left to a schema everywhere it stands."""
        if id(node) not in self._outsides:
            self._outsides[id(node)] = _ALL  # to what refers to itself
            self._outsides[id(node)] = _common([_ALL, *map(self._room, self._of[id(node)])])
        return self._outsides[id(node)]


def _kind_of(value: Json) -> str:
    return next(kind for kind in _ALL if is_a(value, kind))


def _common(found: Iterable[Kinds]) -> Kinds:
    """The types that all of these have, where an integer is a number. There is at least one."""
    common, *others = found
    for kinds in others:
        common = frozenset(kind for kind in common | kinds if _is_among(kind, common) and _is_among(kind, kinds))
    return common


def _is_among(kind: str, kinds: Kinds) -> bool:
    return kind in kinds or (kind == "integer" and "number" in kinds)
