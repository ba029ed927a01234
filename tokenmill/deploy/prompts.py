"""The prompt of a request as routing sees it: text that begins alike for requests that share a prefix."""

from __future__ import annotations

import json
from typing import Any

import msgspec

_MOST_NEW_TOKENS = 1 << 20
_PROMPTS = ("messages", "inputs", "prompt", "input", "instances")
_LIMITS = ("max_tokens", "max_completion_tokens", "max_new_tokens")


def prompt_and_limit(body: bytes) -> tuple[str, int]:
    """Return the text that a prompt is made of, and the most tokens of the answer; "" and 0 if there is no prompt.

    The text of a chat is the JSON of its tools and messages: each further message only adds to its end.
    """
    try:
        fields = msgspec.json.decode(body) if body else None
    except (msgspec.MsgspecError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        return "", 0
    name = next((name for name in _PROMPTS if fields.get(name)), None)
    if name is None:
        return "", 0
    tools = fields.get("tools") if name == "messages" else None
    text = (json.dumps(tools) if tools else "") + _text(fields[name])
    return text, _limit(fields)


def _text(value: Any) -> str:
    """Return a prompt as text that continues as the prompt does."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(f"{json.dumps(part, ensure_ascii=False)}\n" for part in value)
    return json.dumps(value, ensure_ascii=False)


def _limit(fields: dict[str, Any]) -> int:
    parameters = fields.get("parameters")
    for where in (fields, parameters if isinstance(parameters, dict) else {}):
        for name in _LIMITS:
            value = where.get(name)
            if isinstance(value, int) and value > 0:
                return min(value, _MOST_NEW_TOKENS)
    return _MOST_NEW_TOKENS
