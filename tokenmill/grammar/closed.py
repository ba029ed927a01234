"""Closing of objects: a schema with `properties` and without a rule for other keys allows no other keys.

JSON Schema allows further keys by default, which clients rarely intend: a weak model goes on inventing keys until its
tokens are spent. TGI's grammars and OpenAI's strict schemas have no further keys. An answer without them is valid under
the schema as it was sent; where that is not certain, the schema is left unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenmill.grammar.values import Json, Resolve, assertions

_MAPS = ("properties", "patternProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "propertyNames", "if", "then", "else")
_JOINED = frozenset(("allOf", "anyOf", "$ref"))
_OTHERWISE = frozenset(("additionalProperties", "patternProperties", "enum", "const")) | _JOINED
_ABOUT_OBJECTS = _OTHERWISE | {"properties", "required", "minProperties", "propertyNames"}


def close(nodes: Iterable[dict[str, Json]], resolve: Resolve) -> None:
    """Set `additionalProperties: false`, in place, in the schemas where that only removes optional extra keys.

    nodes: all schemas of a document, well formed.
    """
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
    """Return whether closing a subschema could change the meaning of this schema.

    True if several schemas may apply to the same object, since a closed one would reject the keys of another, or if a
    value that is invalid under one subschema is valid because of that (`oneOf`, `if`).
    """
    used = assertions(node)
    if used & {"oneOf", "if"} or len(node.get("allOf", ())) > 1:
        return True
    return bool(used & _JOINED) and len(used & _ABOUT_OBJECTS) > 1


def _parts(node: dict[str, Json]) -> Iterator[Json]:
    for key in _MAPS:
        yield from node.get(key, {}).values()
    for key in _LISTS:
        yield from node.get(key, ())
    for key in _SINGLE:
        yield node.get(key)


def _may_close(node: dict[str, Json]) -> bool:
    named = node.get("properties")
    if named is None or assertions(node) & _OTHERWISE:
        return False
    dependents = [*node.get("dependentRequired", {}).values(), *node.get("dependencies", {}).values()]
    wanted = {*node.get("required", ()), *(name for names in dependents for name in names)}
    return bool(wanted <= named.keys() and node.get("minProperties", 0) <= len(named))
