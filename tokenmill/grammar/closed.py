"""Objects that name their properties, and say nothing of others, have no others.

JSON Schema allows further keys unless it is told not to, and hardly anybody means it: a weak model goes on inventing
keys until its tokens are spent. TGI's grammars never had any, nor do OpenAI's strict ones. An answer without them is
valid under the schema as it was sent; where that is not certain, the schema is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenmill.grammar.values import Json, Resolve, said

_MAPS = ("properties", "patternProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "propertyNames", "if", "then", "else")
_JOINED = frozenset(("allOf", "anyOf", "$ref"))
_OTHERWISE = frozenset(("additionalProperties", "patternProperties", "enum", "const")) | _JOINED
_SPEAKS = _OTHERWISE | {"properties", "required", "minProperties", "propertyNames"}


def close(nodes: Iterable[dict[str, Json]], resolve: Resolve) -> None:
    """Give `additionalProperties: false` to those of a document's schemas for which that only leaves keys out. In
    place; `nodes` are all of its well-formed schemas."""
    nodes = list(nodes)
    joined: set[int] = set()
    todo: list[Json] = [node for node in nodes if _joins(node)]
    while todo:
        node = todo.pop()
        if isinstance(node, dict) and id(node) not in joined:
            joined.add(id(node))
            todo += _parts(node)
            todo += [resolve(node["$ref"])] if "$ref" in node else []
    for node in nodes:
        if id(node) not in joined and _may_close(node):
            node["additionalProperties"] = False


def _joins(node: dict[str, Json]) -> bool:
    """True if a schema may look at one object together with another schema, which a closed one would contradict; or
    if what is invalid under one makes something valid elsewhere."""
    used = said(node)
    if used & {"oneOf", "if"} or len(node.get("allOf", ())) > 1:
        return True
    return bool(used & _JOINED) and len(used & _SPEAKS) > 1


def _parts(node: dict[str, Json]) -> Iterator[Json]:
    for key in _MAPS:
        yield from node.get(key, {}).values()
    for key in _LISTS:
        yield from node.get(key, ())
    for key in _SINGLE:
        yield node.get(key)


def _may_close(node: dict[str, Json]) -> bool:
    named = node.get("properties")
    if named is None or said(node) & _OTHERWISE:
        return False
    dependents = [*node.get("dependentRequired", {}).values(), *node.get("dependencies", {}).values()]
    wanted = {*node.get("required", ()), *(name for names in dependents for name in names)}
    return bool(wanted <= named.keys() and node.get("minProperties", 0) <= len(named))
