"""Where in a JSON schema a library's complaint comes from: libraries say what they cannot do, seldom where."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

from tokenmill.grammar.document import pointer

MAX_TRIES = 200
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
    """A sentence with keyword, path and `fault`, for a canonical schema that `fault_of` refused.

    `fault_of` compiles a schema's text and says what is wrong, or "". It is called at most MAX_TRIES times.
    """
    root = json.loads(source)
    path, node = "#", root
    tries = 0
    while True:
        deeper = None
        for where, child in _parts(path, node):
            tries += 1
            if tries > MAX_TRIES:
                break
            found = fault_of(_alone(root, where))
            if found:
                deeper, fault = (where, child), found
                break
        if deeper is None:
            break
        path, node = deeper
    keyword = _keyword(node, fault)
    where = pointer(path, keyword) if keyword else path
    return f"The JSON schema cannot be used: at {where}: {fault.rstrip('.')}."


def _parts(path: str, node: Any) -> Iterator[tuple[str, Any]]:
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


def _alone(root: Any, where: str) -> str:
    """A schema of which only the part at `where` counts, while references into the whole still lead somewhere."""
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    if "$ref" in json.dumps(root):
        return json.dumps({**shared, "x-whole": root, "$ref": "#/x-whole" + quote(where[1:])})
    part = root
    for step in where[2:].split("/"):
        part = part[int(step) if isinstance(part, list) else step.replace("~1", "/").replace("~0", "~")]
    return json.dumps(part)


def _keyword(node: Any, fault: str) -> str:
    if not isinstance(node, dict):
        return ""
    named = re.findall(r'"([A-Za-z$]+)"', fault)
    hinted = [key for hint, key in _HINTS if hint in fault]
    return next((key for key in [*hinted, *named, *_KEYWORDS] if key in node), "")
