"""Proofs that schemas have no value in common, in which case `oneOf` means the same as `anyOf`."""

from __future__ import annotations

import math
from collections.abc import Iterable

from tokenmill.grammar.values import Json, Resolve, assertions, finite, identity, is_a, types

MAX_COMPARISONS = 1_000
MAX_VALUES = 100_000
"""Limit on the listed values examined in one document."""

_DEPTH = 12
_TYPES = ("null", "boolean", "object", "array", "number", "string")
_SIZES = (("string", "minLength", "maxLength"), ("array", "minItems", "maxItems"))


class Prover:
    """A prover for the schemas of one document. Its work is limited; beyond the limits nothing is proven."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve, self._left, self._values_left = resolve, MAX_COMPARISONS, MAX_VALUES

    def exclusive(self, schemas: list[Json], among: list[str] | None = None) -> bool:
        """Return True only if no value is valid under two of these well-formed schemas.

        among: the types of the values considered; None means all types.
        """
        shown = [self._behind_refs(schema) for schema in schemas]
        if among is not None:
            shown = [_of_types(schema, among) for schema in shown]
        if self._share_none(shown):
            return True
        objects = all(isinstance(schema, dict) and types(schema) == ["object"] for schema in shown)
        tags = set.intersection(*(set(schema.get("required", ())) for schema in shown)) if objects else set()
        if any(self._share_none([_property(schema, tag) for schema in shown]) for tag in tags):
            return True
        return all(self._disjoint(a, b, _DEPTH) for i, a in enumerate(shown) for b in shown[:i])

    def _behind_refs(self, schema: Json) -> Json:
        for _ in range(_DEPTH):
            if not isinstance(schema, dict) or assertions(schema) != {"$ref"}:
                break
            schema = self._resolve(schema["$ref"])
        return schema

    def _share_none(self, schemas: Iterable[Json]) -> bool:
        """Return whether all schemas list their values, and no value is listed twice."""
        seen: set[object] = set()
        for schema in schemas:
            values = self._finite(schema)
            if values is None or not seen.isdisjoint(map(identity, values)):
                return False
            seen.update(map(identity, values))
        return True

    def _finite(self, schema: Json) -> list[Json] | None:
        if self._values_left < 0:
            return None
        found = finite(schema, self._resolve)
        self._values_left -= len(found or ())
        return found

    def _disjoint(self, a: Json, b: Json, depth: int) -> bool:
        self._left -= 1
        if a is False or b is False:
            return True
        if self._left < 0 or depth == 0 or not isinstance(a, dict) or not isinstance(b, dict):
            return False
        if self._part_disjoint(a, b, depth - 1) or self._part_disjoint(b, a, depth - 1):
            return True
        return all(self._disjoint_within(kind, a, b, depth - 1) for kind in _types(a) & _types(b))

    def _part_disjoint(self, a: dict[str, Json], b: Json, depth: int) -> bool:
        """Return whether some part of `a` that every value of `a` must match is disjoint from `b`."""
        if "$ref" in a and self._disjoint(self._resolve(a["$ref"]), b, depth):
            return True
        if any(self._disjoint(part, b, depth) for part in a.get("allOf", ())):
            return True
        if any(key in a and all(self._disjoint(part, b, depth) for part in a[key]) for key in ("anyOf", "oneOf")):
            return True
        values = self._finite({key: a[key] for key in ("type", "enum", "const") if key in a})
        return values is not None and all(self._surely_invalid(b, value, depth) for value in values)

    def _disjoint_within(self, kind: str, a: dict[str, Json], b: dict[str, Json], depth: int) -> bool:
        """Return whether no value of this type is valid under both."""
        if kind == "number":
            return _no_number(a, b)
        if kind == "object":
            required = {*a.get("required", ()), *b.get("required", ())}
            return any(self._disjoint(_property(a, name), _property(b, name), depth) for name in required)
        return any(
            max(a.get(least, 0), b.get(least, 0)) > min(a.get(most, math.inf), b.get(most, math.inf))
            for sized, least, most in _SIZES if sized == kind
        )  # fmt: skip

    def _surely_invalid(self, schema: Json, value: Json, depth: int) -> bool:
        """Return True only if a value is invalid under a schema."""
        self._left -= 1
        if schema is False:
            return True
        if self._left < 0 or depth == 0 or not isinstance(schema, dict):
            return False
        kinds = types(schema)
        if kinds is not None and not any(is_a(value, kind) for kind in kinds):
            return True
        if "enum" in schema or "const" in schema:
            listed = schema.get("enum", [schema.get("const")])
            return all(identity(value) != identity(one) for one in listed)
        if "$ref" in schema:
            return self._surely_invalid(self._resolve(schema["$ref"]), value, depth - 1)
        if "anyOf" in schema:
            return all(self._surely_invalid(part, value, depth - 1) for part in schema["anyOf"])
        return _out_of_range(schema, value)


def _of_types(schema: Json, kinds: list[str]) -> Json:
    """Return the schema restricted to these types, unless it names its own."""
    if schema is True:
        return {"type": kinds}
    return {**schema, "type": kinds} if isinstance(schema, dict) and "type" not in schema else schema


def _types(schema: dict[str, Json]) -> set[str]:
    kinds = types(schema)
    return set(_TYPES) if kinds is None else {"number" if kind == "integer" else kind for kind in kinds}


def _property(schema: dict[str, Json], name: str) -> Json:
    """Return a schema that every value of this property matches."""
    named = schema.get("properties", {})
    if name in named:
        return named[name]
    return True if schema.get("patternProperties") else schema.get("additionalProperties", True)


def _no_number(a: dict[str, Json], b: dict[str, Json]) -> bool:
    """Return whether no number is within the bounds of both."""
    low = max(bound for s in (a, b) for bound in (
        (s.get("minimum", -math.inf), False), (s.get("exclusiveMinimum", -math.inf), True)
    ))  # fmt: skip
    high = min(bound for s in (a, b) for bound in (
        (s.get("maximum", math.inf), True), (s.get("exclusiveMaximum", math.inf), False)
    ))  # fmt: skip
    return bool(low[0] > high[0] or (low[0] == high[0] and (low[1] or not high[1])))


def _out_of_range(schema: dict[str, Json], value: Json) -> bool:
    """Return whether a value is too small or too large for a schema."""
    if is_a(value, "number"):
        return _no_number(schema, {"minimum": value, "maximum": value})
    return any(
        is_a(value, sized) and not schema.get(least, 0) <= len(value) <= schema.get(most, math.inf)
        for sized, least, most in _SIZES
    )
