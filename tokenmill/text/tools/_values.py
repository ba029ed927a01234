"""Values written as plain text, turned into JSON by the schema of their parameter."""

from __future__ import annotations

import ast
import json
import math
import re
from typing import Any

from tokenmill.text.functions import STRING, types_of_value
from tokenmill.text.reader import Broken
from tokenmill.text.tools._json import loads

_OPENS = ("[", "{", '"')
_TEXTS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_WORDS = {"true": ("boolean", "true"), "false": ("boolean", "false"), "none": ("null", "null"),
          "null": ("null", "null")}  # fmt: skip


def to_json(text: str, types: frozenset[str]) -> str:
    """Return the JSON of a value that was written without quotes: the first reading that `types` allow."""
    if types == STRING:
        return dumps(text)
    trimmed = text.strip()
    try:
        found = types_of_value(loads(trimmed))
        if found & types or "string" not in types:
            return trimmed
    except Broken:
        found = frozenset()
    kind, word = _WORDS.get(trimmed.lower(), ("", ""))
    if kind in types:
        return word
    if not found and types & {"array", "object"}:
        literal = _literal(trimmed)
        if types_of_value(literal) & types & {"array", "object"}:
            return dumps(literal)
    return dumps(text)


def ends_in_text(text: str) -> bool:
    """Return True for the beginning of a JSON value that is cut off inside of a text in it."""
    begun = text.lstrip()[:1]
    return begun in _OPENS and '"' in _TEXTS.sub("", text) and _literal(text.strip()) is None


def _literal(text: str) -> Any:
    """Return the value of a Python literal that JSON can express; None if it is not one."""
    if text[:1] not in ("{", "[", "("):
        return None
    try:
        value = ast.literal_eval(text)
        value = list(value) if isinstance(value, tuple) else value
        dumps(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, Broken):
        return None
    return value


def number(text: str) -> str:
    """Return the JSON of a number as Python writes it. Raises Broken."""
    try:
        value = loads(text)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return text
    except Broken:
        pass
    try:
        value = ast.literal_eval(text)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return json.dumps(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    raise Broken


def dumps(value: Any) -> str:
    """Return JSON text as models see it in prompts. Raises Broken for values that JSON or UTF-8 cannot express."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, TypeError, RecursionError):
        raise Broken from None
    return text


def inside(text: str) -> str:
    """Return text as it is written between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
