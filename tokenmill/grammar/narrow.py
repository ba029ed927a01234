"""What xgrammar serves exactly, out of canonical schemas and rewritten patterns. Everything else is refused by name.

xgrammar ignores what it does not know, takes `oneOf` for `anyOf`, lets a named key come again as an additional one,
and counts a character outside the BMP twice when it is escaped. Found by comparing with `jsonschema`.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tokenmill.errors import GrammarError
from tokenmill.grammar.document import pointer
from tokenmill.grammar.patterns import PatternError
from tokenmill.grammar.values import is_a

_BY_TYPE = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": set[str](),
    "boolean": set[str](),
    "null": set[str](),
}
_CONSTRAINTS = frozenset.union(*map(frozenset, _BY_TYPE.values())) | {
    "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "type", "format", "multipleOf", "minProperties",
    "maxProperties", "patternProperties",
}  # fmt: skip
_SAFE_PATTERN = re.compile(
    r"(?:[A-Za-z0-9 _:@,;=<>!\"'%|()?*+\u00a1-\ud7ff\ue000-\U0010ffff]"
    r"|\\[.\-+*?()\[\]{}|$^\\#&~]|\\x2F|\{\d+(?:,\d*)?\}"
    r"|\[\^?(?:[A-Za-z0-9](?:-[A-Za-z0-9])?|[ _:@,;=<>!\"'%]|\\[.\-+*?()\[\]{}|$^\\#&~])+\])*"
)


def schema(root: Any) -> Any:
    """The schema with what xgrammar would read loosely made explicit. GrammarError names keyword and path."""
    return _narrow(root, "#")


def pattern(text: str) -> str:
    """A rewritten pattern, if both dialects read it alike. PatternError if not."""
    if not _SAFE_PATTERN.fullmatch(text):
        raise PatternError("the pattern uses what the backend xgrammar reads otherwise")
    return text.replace("\\x2F", "/")


def _narrow(node: Any, path: str) -> Any:
    if not isinstance(node, dict):
        return node
    out = {key: {name: _narrow(one, pointer(path, key, name)) for name, one in node[key].items()}
           for key in ("$defs", "definitions") if key in node}  # fmt: skip
    used = [key for key in node if key in _CONSTRAINTS]
    if "type" not in used:
        return {**out, **_untyped(node, path, used)}
    kinds = node["type"]
    if isinstance(kinds, str):
        return {**out, **_typed(node, path, kinds)}
    if len(used) == 1:
        return {**out, "anyOf": [{"type": kind} for kind in kinds]}
    return {**out, "anyOf": [_typed(node, path, kind, shared=True) for kind in kinds]}


def _untyped(node: dict[str, Any], path: str, used: list[str]) -> dict[str, Any]:
    if not used:
        return {}
    if len(used) > 1:
        _refuse(path, used[1], f"beside `{used[0]}`, without `type`")
    key = used[0]
    if key == "anyOf":
        return {key: [_narrow(one, pointer(path, key, i)) for i, one in enumerate(node[key])]}
    if key not in ("enum", "const", "$ref"):
        _refuse(path, key, "without `type`")
    return {key: node[key]}


def _typed(node: dict[str, Any], path: str, kind: str, shared: bool = False) -> dict[str, Any]:
    allowed = _BY_TYPE[kind]
    others = set().union(*_BY_TYPE.values()) - allowed
    out: dict[str, Any] = {"type": kind}
    for key, value in node.items():
        if key in allowed:
            out[key] = value
        elif key in ("enum", "const") and not shared:
            return {key: [one for one in value if is_a(one, kind)] if key == "enum" else _only(value, kind, path)}
        elif key in _CONSTRAINTS and key != "type" and not (key in others and kind != "number"):
            _refuse(path, key, f"for {kind}s")
    if kind == "object":
        _object(out, path)
    elif kind == "array":
        _array(out, path)
    elif kind == "string":
        _string(out, path)
    return out


def _object(out: dict[str, Any], path: str) -> None:
    names = out.get("properties", {})
    more = out.get("additionalProperties")
    out["properties"] = {name: _narrow(one, pointer(path, "properties", name)) for name, one in names.items()}
    missing = [name for name in out.get("required", ()) if name not in names]
    if missing:
        _refuse(path, "required", f"for {json.dumps(missing[0])}, which `properties` does not name,")
    if names and more not in (None, False):
        _refuse(path, "additionalProperties", "beside `properties`")
    if names:
        out["additionalProperties"] = False
    elif more is not None:
        out["additionalProperties"] = _narrow(more, pointer(path, "additionalProperties"))


def _array(out: dict[str, Any], path: str) -> None:
    if "items" in out:
        out["items"] = _narrow(out["items"], pointer(path, "items"))
    if "prefixItems" in out:
        out["prefixItems"] = [
            _narrow(one, pointer(path, "prefixItems", i)) for i, one in enumerate(out["prefixItems"])
        ]


def _string(out: dict[str, Any], path: str) -> None:
    if out.get("minLength", 0) > 1:
        _refuse(path, "minLength", "above 1")
    if "pattern" in out:
        if "minLength" in out or "maxLength" in out:
            _refuse(path, "pattern", "beside a length")
        text = out["pattern"]
        try:
            if not (text.startswith("^") and text.endswith("$") and not text.endswith("\\$")):
                raise PatternError("a pattern must begin with ^ and end with $ for the backend xgrammar")
            out["pattern"] = f"^{pattern(text[1:-1])}$"
        except PatternError as error:
            _refuse(path, "pattern", f"here ({error})")


def _only(value: Any, kind: str, path: str) -> Any:
    if not is_a(value, kind):
        _refuse(path, "const", f"that is no {kind}")
    return value


def _refuse(path: str, key: str, how: str) -> None:
    where = pointer(path, key)
    raise GrammarError(
        f"The JSON schema cannot be used: at {where}: `{key}` {how} cannot be served exactly by the backend xgrammar."
    )
