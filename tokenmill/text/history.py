"""Earlier messages of a conversation in one form, whoever wrote them: other providers, SDKs that dump every field, or
this server, whose own answers are sent back as they came.

Nothing here depends on a template; `template_forms.py` brings the result into the form that one takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

REASONING = ("reasoning_content", "reasoning")
"""Names of an assistant's thought: answers have it under both, templates read either."""


def normalized(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages without empty fields, with refusals as text, thoughts under each name, and plain calls. Takes
    nothing."""
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
    """A copy without fields that are null: SDKs send those that a message does not have, and templates ask whether they
    are there. An empty list of calls is none."""
    kept = {key: value for key, value in message.items() if value is not None or key == "content"}
    if not kept.get("tool_calls", True):
        del kept["tool_calls"]
    return kept


def _refusal_as_text(message: dict[str, Any]) -> None:
    """Make a refusal the text that it is."""
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
    """Give the thought each of its names. A message that is nothing else has an empty text."""
    thought = next((text for name in REASONING if isinstance(text := message.get(name), str) and text), None)
    if thought is None:
        return
    message.update(dict.fromkeys(REASONING, thought))
    if message.get("content") is None and "tool_calls" not in message:
        message["content"] = ""


def _plain(call: Any) -> Any:
    """A call without what SDKs add to it for themselves."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    named = {key: value for key, value in call.items() if value is not None and key != "index"}
    kept = {key: value for key, value in function.items() if key != "parsed_arguments"}
    return {**named, "type": named.get("type", "function"), "function": kept}
