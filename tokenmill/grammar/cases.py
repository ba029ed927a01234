"""Rewriting of keywords that grammars lack into those that they support, by enumerating cases, exactly or not at all.

Every function takes a schema that `schema.py` has found well formed, and changes it in place. It raises `Inexact` with
the reason if an exact rewriting is not possible.
"""

from __future__ import annotations

import json
import math
from itertools import combinations, permutations

from tokenmill.grammar.patterns import rewrite
from tokenmill.grammar.values import Json, Resolve, assertions, finite, identity, types

MAX_ARRAYS = 2_000
MAX_CASES = 64
_UUID = "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"
_OF_ARRAYS = {"type", "items", "minItems", "maxItems", "uniqueItems"}
_CONDITIONS = ("if", "then", "else")


class Inexact(ValueError):
    """A keyword that cannot be rewritten exactly here; the message is the reason."""


class Budget:
    """Limit on the work for one document: characters added to it, plus listed values examined."""

    def __init__(self, left: int) -> None:
        self._left = left

    def spend(self, num: int) -> None:
        """Take `num` from the budget. Raises Inexact if fewer are left."""
        if num > self._left:
            raise Inexact("needs too many cases")
        self._left -= num


def property_names(node: dict[str, Json], resolve: Resolve, budget: Budget) -> None:
    """Rewrite `propertyNames` as `properties` (listed names) or `patternProperties`, and close the object."""
    names, others = node["propertyNames"], node.get("additionalProperties", True)
    allowed = finite(names, resolve)
    if allowed is None and assertions(node) & {"properties", "patternProperties", "required"}:
        raise Inexact("can be served beside other keys only where it lists the names")
    if allowed is None:
        node["patternProperties"] = {_pattern_of_names(names, resolve): others}
    elif "patternProperties" in node:
        raise Inexact("cannot be served beside `patternProperties`")
    else:
        budget.spend(len(allowed))
        listed = dict.fromkeys((name for name in allowed if isinstance(name, str)), others)
        budget.spend(sum(map(len, listed)) + len(listed) * len(json.dumps(others)))
        kept = {name: one for name, one in node.get("properties", {}).items() if name in listed}
        if set(node.get("required", ())) - listed.keys():
            raise Inexact("excludes a name that is required")
        node["properties"] = {**kept, **{name: one for name, one in listed.items() if name not in kept}}
    node["additionalProperties"] = False
    del node["propertyNames"]


def _pattern_of_names(names: Json, resolve: Resolve) -> str:
    """Return the rewritten pattern of names that are not listed."""
    if isinstance(names, dict) and assertions(names) == {"$ref"}:
        names = resolve(names["$ref"])
    fits = isinstance(names, dict) and types(names) in (None, ["string"])
    used = assertions(names) - {"type"} if fits else frozenset()
    if used == {"pattern"}:
        return str(names["pattern"])
    if used == {"format"} and names["format"] == "uuid":
        return rewrite(_UUID, search=True).text
    if used and used <= {"minLength", "maxLength"}:
        most = int(names["maxLength"]) if "maxLength" in names else ""
        return rewrite(f"^[\\s\\S]{{{int(names.get('minLength', 0))},{most}}}$", search=True).text
    raise Inexact("can be served only where it lists the names, or has one pattern, format or length")


def unique_items(node: dict[str, Json], resolve: Resolve, budget: Budget) -> None:
    """Replace `uniqueItems` by an `enum` of all valid arrays if items have few values; drop it for at most one item."""
    most = node.get("maxItems", math.inf)
    if most > 1:
        values = None if "prefixItems" in node else finite(node.get("items", True), resolve)
        arrays_only = types(node) in (["array"], ["array", "null"], ["null", "array"])
        if values is None or not arrays_only or assertions(node) - _OF_ARRAYS:
            raise Inexact("can be served only where the items are one of a few values, or at most one")
        budget.spend(len(values))
        most, least = int(min(most, len(values))), int(node.get("minItems", 0))
        count = 0
        for size in range(least, most + 1):
            count += math.perm(len(values), size)
            if count > MAX_ARRAYS:
                raise Inexact(f"can be served where no more than {MAX_ARRAYS} arrays are valid")
        if not count:
            raise Inexact("has no valid array")
        budget.spend(count * (most + 1) * max(len(json.dumps(value)) for value in [*values, ""]))
        arrays: list[Json] = [list(one) for size in range(least, most + 1) for one in permutations(values, size)]
        node["enum"] = [*arrays, *([None] if "null" in (types(node) or ()) else [])]
        for key in ("type", "items", "minItems", "maxItems"):
            node.pop(key, None)
    del node["uniqueItems"]


def property_counts(node: dict[str, Json]) -> None:
    """Rewrite `minProperties` and `maxProperties` of a closed object: enumerate the sets of keys."""
    named, required = node.get("properties", {}), node.get("required", [])
    if node.get("additionalProperties") is not False or node.get("patternProperties"):
        if node.get("minProperties", 0) > len(required) + 1:  # unnamed keys may be repeated, and count twice
            raise Inexact("above the number of required keys plus one cannot be served exactly")
        return
    optional = [name for name, one in named.items() if name not in required and one is not False]
    least, most = node.get("minProperties", 0) - len(required), node.get("maxProperties", math.inf) - len(required)
    if least > len(optional) or most < 0:
        raise Inexact("is met by no object")
    cases: list[list[Json]] = []
    if least == 1 and most >= len(optional):  # the library supports "one more than required"
        node.pop("maxProperties", None)
        return
    if least > 0:
        cases.append([{"required": list(some)} for some in _some(optional, int(least))])
    if most < len(optional):
        absent = _some(optional, len(optional) - int(most))
        cases.append([{"properties": dict.fromkeys(some, False)} for some in absent])
    if least == most and len(cases) == 2:  # the present keys determine the absent ones
        cases = [[{**there, **absent} for there, absent in zip(cases[0], reversed(cases[1]), strict=True)]]
    _add(node, cases)
    for key in ("minProperties", "maxProperties"):
        node.pop(key, None)


def dependent_required(node: dict[str, Json], key: str) -> None:
    """Rewrite dependent keys: either the key is absent, or the others are present."""
    cases: list[list[Json]] = []
    for name, others in node[key].items():
        if set(others) - set(node.get("required", ())):
            cases.append([{"properties": {name: False}}, {"required": list(dict.fromkeys([name, *others]))}])
    _add(node, cases)
    del node[key]


def has_condition(node: dict[str, Json]) -> bool:
    """Return whether a schema has `if`, itself or in a member of `allOf`."""
    return any(isinstance(part, dict) and "if" in part for part in [node, *node.get("allOf", ())])


def conditions(node: dict[str, Json], resolve: Resolve, budget: Budget) -> None:
    """Rewrite `if` on the value of one property, where all possible values of that property are listed."""
    found = [part for part in [node, *node.get("allOf", ())] if isinstance(part, dict) and "if" in part]
    if types(node) != ["object"] or any(part is not node and set(part) - set(_CONDITIONS) for part in found):
        raise Inexact("can be served for objects only, whose properties stand beside it")
    cases = [_cases(part, node, resolve, budget) for part in found]
    node["allOf"] = [part for part in node.get("allOf", ()) if part not in found]
    if not node["allOf"]:
        del node["allOf"]
    _add(node, cases)
    for part in found:
        for key in _CONDITIONS:
            part.pop(key, None)


def _cases(part: dict[str, Json], node: dict[str, Json], resolve: Resolve, budget: Budget) -> list[Json]:
    condition = part["if"]
    if not isinstance(condition, dict) or assertions(condition) - {"type", "properties", "required"}:
        raise Inexact("can be served where it looks at one property alone")
    tests = condition.get("properties", {})
    name = next(iter(tests), "")
    values = finite(node.get("properties", {}).get(name, True), resolve)
    wanted = finite(tests[name], resolve) if len(tests) == 1 else None
    if values is None or wanted is None or types(condition) not in (None, ["object"]):
        raise Inexact("can be served where it asks for values of one property, of which all are listed")
    if condition.get("required", [name]) != [name]:
        raise Inexact("can be served where it asks for the property that it looks at alone")
    budget.spend(len(json.dumps(values)))
    known = set(map(identity, wanted))
    met, unmet = part.get("then", True), part.get("else", True)
    made: list[Json] = []
    for is_met, then in ((True, met), (False, unmet)):
        some = [one for one in values if (identity(one) in known) == is_met]
        if some:
            made.append({"properties": {name: {"enum": some}}, "required": [name], "allOf": [then]})
    if name not in node.get("required", ()):
        made.append({"properties": {name: False}, "allOf": [unmet if "required" in condition else met]})
    return made


def _some(names: list[str], count: int) -> list[tuple[str, ...]]:
    if math.comb(len(names), count) > MAX_CASES:
        raise Inexact("needs too many cases")
    return list(combinations(names, count))


def _add(node: dict[str, Json], cases: list[list[Json]]) -> None:
    """Require one case of each list."""
    if math.prod(map(len, cases)) > 4 * MAX_CASES:
        raise Inexact("needs too many cases")
    if cases:
        node["allOf"] = [*node.get("allOf", ()), *({"anyOf": some} for some in cases)]
