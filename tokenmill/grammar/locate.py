"""Location of a library's error in a JSON schema, since the library's messages rarely contain a path."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

from tokenmill.grammar.document import pointer

MAX_TRIES = 200
MAX_CPU_S = 0.3
_FEW = 8  # so many parts, or fewer, are tried one by one
_Part = tuple[str, Any]
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SINGLE = ("items", "additionalProperties")
_KEYWORDS = ("oneOf", "patternProperties", "allOf", "anyOf", "minProperties", "maxProperties", "pattern", "format",
             "minLength", "maxLength", "multipleOf", "minimum", "maximum", "enum", "const", "required", "minItems",
             "maxItems", "$ref")  # fmt: skip
_HINTS = (("oneOf", "oneOf"), ("patternProperty", "patternProperties"), ("min/maxProperties", "minProperties"),
          ("regex", "pattern"), ("format", "format"), ("minimum", "minimum"), ("maximum", "maximum"),
          ("multipleOf", "multipleOf"), ("required", "required"), ("eference", "$ref"))  # fmt: skip


def locate(source: str, fault_of: Callable[[str], str], fault: str) -> str:
    """Return a message with keyword, path and `fault` for a canonical schema that `fault_of` refused.

    fault_of: compiles a schema's text and returns the error, or "". It is called at most MAX_TRIES times, for about
    MAX_CPU_S, because the client waits meanwhile and the pool kills a process that takes too long.
    """
    root = json.loads(source)
    path, node = "#", root
    tries, until = 0, time.process_time() + MAX_CPU_S

    def fault_in(parts: list[_Part]) -> str:
        nonlocal tries
        tries += 1
        if tries > MAX_TRIES or time.process_time() > until:
            return ""
        return fault_of(_alone(root, parts))

    while parts := list(_parts(path, node)):
        while len(parts) > _FEW:
            half = parts[: len(parts) // 2]
            parts = half if fault_in(half) else parts[len(half) :]
        found = next(((part, why) for part in parts if (why := fault_in([part]))), None)
        if found is None:
            break
        (path, node), fault = found
    keyword = _keyword(node, fault)
    where = pointer(path, keyword) if keyword else path
    return f"The JSON schema cannot be used: at {where}: {fault.rstrip('.')}."


def _parts(path: str, node: Any) -> Iterator[_Part]:
    if not isinstance(node, dict):
        return
    for key in _SINGLE:
        if isinstance(node.get(key), dict):
            yield pointer(path, key), node[key]
    for key in _LISTS:
        for place, child in enumerate(node.get(key, ())):
            if isinstance(child, dict):
                yield pointer(path, key, place), child
    for key in _MAPS:
        for name, child in node.get(key, {}).items():
            if isinstance(child, dict):
                yield pointer(path, key, name), child


def _alone(root: Any, parts: list[_Part]) -> str:
    """Return a schema that is the choice among these parts, in which references into the whole still resolve."""
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    if "$ref" in json.dumps(root):
        alternatives = [{"$ref": "#/x-whole" + quote(where[1:])} for where, _ in parts]
        return json.dumps({**shared, "x-whole": root, "anyOf": alternatives})
    return json.dumps({"anyOf": [part for _, part in parts]})


def _keyword(node: Any, fault: str) -> str:
    if not isinstance(node, dict):
        return ""
    named = re.findall(r'"([A-Za-z$]+)"', fault)
    hinted = [key for hint, key in _HINTS if hint in fault]
    return next((key for key in [*hinted, *named, *_KEYWORDS] if key in node), "")
