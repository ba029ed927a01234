"""Earlier messages of a conversation in one form, whoever wrote them: other providers, SDKs that send every field, or
this server, whose own answers are sent back unchanged.

Nothing here depends on a template; `template_forms.py` converts the result into the form of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

REASONING = ("reasoning_content", "reasoning")
"""Names of an assistant's thought: answers have it under both, templates read either."""


def normalized(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages without empty fields, with refusals as text, thoughts under each name, and plain calls. The
    arguments are not changed."""
    made: list[dict[str, Any]] = []
    for message in messages:
        one = _without_nothing(message)
        _refusal_as_text(one)
        if one.get("role") == "assistant":
            _name_thought(one)
        if "tool_calls" in one:
            one["tool_calls"] = [_plain(call) for call in one["tool_calls"]]
        made.append(one)
    return made


def _without_nothing(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy without fields that are null, because SDKs send null for absent fields, and templates test whether
    fields are present. An empty list of calls is removed, too."""
    kept = {key: value for key, value in message.items() if value is not None or key == "content"}
    if not kept.get("tool_calls", True):
        del kept["tool_calls"]
    return kept


def _refusal_as_text(message: dict[str, Any]) -> None:
    """Make a refusal the text of its message."""
    content, refusal = message.get("content"), message.get("refusal")
    if isinstance(content, list):
        message["content"] = [_as_text(part) for part in content]
    elif not content and isinstance(refusal, str) and refusal:
        message["content"] = refusal


def _as_text(part: Any) -> Any:
    if isinstance(part, Mapping) and part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal", "")}
    return part


def _name_thought(message: dict[str, Any]) -> None:
    """Give the thought each of its names. A message with nothing else gets an empty text."""
    thought = next((text for name in REASONING if isinstance(text := message.get(name), str) and text), None)
    if thought is None:
        return
    message.update(dict.fromkeys(REASONING, thought))
    if message.get("content") is None and "tool_calls" not in message:
        message["content"] = ""


def _plain(call: Any) -> Any:
    """Return a call without the fields that SDKs add for themselves."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    named = {key: value for key, value in call.items() if value is not None and key != "index"}
    kept = {key: value for key, value in function.items() if key != "parsed_arguments"}
    return {**named, "type": named.get("type", "function"), "function": kept}
