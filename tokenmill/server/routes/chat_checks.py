"""What a chat request may say: every documented field works or is refused here by its name, and so are messages."""

from __future__ import annotations

import re
from typing import Any

from tokenmill.errors import ValidationError
from tokenmill.server.routes.openai import refuse
from tokenmill.server.schema.openai import ChatRequest
from tokenmill.text.history import REASONING

THINKING_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates turn a model's thinking on and off."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "refusal", *REASONING)
"""Fields of which one is enough for a message, as answers have them."""

_RETENTIONS = (None, "in_memory", "in-memory")
_TIERS = (None, "auto", "default", "flex", "scale", "priority")
_NOT_IN_THIS_RELEASE = "it is not in this release"
_UNSERVED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("modalities", (None, [], ["text"]), "only text is generated"),
    ("audio", (None,), "only text is generated"),
    ("prediction", (None,), _NOT_IN_THIS_RELEASE),
    ("web_search_options", (None,), _NOT_IN_THIS_RELEASE),
    ("store", (None, False), "answers are not kept"),
    ("service_tier", _TIERS, "OpenAI has no such tier; leave it out or send 'auto'"),
    ("prompt_cache_retention", _RETENTIONS, "the cache of prompts is in memory; send 'in_memory' or leave it out"),
)
"""Field, the values that ask for nothing, and why others are refused."""


def check_fields(body: ChatRequest) -> None:
    """Refuse what is not served. ValidationError that names the field."""
    for name, harmless, reason in _UNSERVED:
        if getattr(body, name) not in harmless:
            raise refuse(name, reason)


def template_fields(body: ChatRequest, source: str) -> dict[str, Any]:
    """Fields that a model can only be told of by its template, for one with the text `source`. ValidationError if it
    does not know them."""
    told: dict[str, Any] = {}
    for name in ("reasoning_effort", "verbosity"):
        value = getattr(body, name)
        if value is None:
            continue
        if name in source:
            told[name] = value
        elif name == "reasoning_effort" and (switch := _switch(source)):
            told[switch] = value != "none"
        else:
            raise refuse(name, "the model's chat template does not know it")
    return told


def asks_to_think(body: ChatRequest) -> bool:
    """Whether a request says that the model is to think, and not only may."""
    kwargs = body.chat_template_kwargs or {}
    asked = body.thinking_budget is not None or body.reasoning_effort not in (None, "none")
    return asked or any(kwargs.get(switch) is True for switch in THINKING_SWITCHES)


def _switch(source: str) -> str | None:
    """The variable that a template asks whether to let the model think."""
    for name in THINKING_SWITCHES:
        if re.search(rf"{{[{{%][^%}}]*\b{name}\b", source):
            return name
    return None


def num_logprobs(body: ChatRequest) -> int | None:
    """How many of the likeliest tokens are wanted of each position, None for no log-probabilities at all."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ValidationError("Invalid 'top_logprobs': it needs `logprobs: true`", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def check_messages(messages: list[dict[str, Any]]) -> None:
    """Roles and contents that can be rendered. ValidationError that names the message."""
    if not messages:
        raise ValidationError("Invalid 'messages': it must have at least one message", "messages")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            given = f" Given: {role[:32]!r}." if isinstance(role, str) else ""
            raise _invalid(f"{where}.role", f"one of {', '.join(ROLES)}.{given}")
        calls = message.get("tool_calls")
        if calls is not None:
            _check_calls(calls, f"{where}.tool_calls")
        if content is None and not any(message.get(name) for name in _INSTEAD_OF_CONTENT):
            raise _invalid(f"{where}.content", "a text or a list of parts")
        if content is not None and not isinstance(content, str | list):
            raise _invalid(f"{where}.content", "a text or a list of parts")
        for part in content if isinstance(content, list) else ():
            _check_part(part, f"{where}.content")
        for name in ("name", "tool_call_id", "refusal", *REASONING):
            if not isinstance(message.get(name), str | None):
                raise _invalid(f"{where}.{name}", "a text")


def _check_calls(calls: object, where: str) -> None:
    """What an assistant called earlier in the conversation."""
    if not isinstance(calls, list):
        raise _invalid(where, "a list of calls")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _invalid(where, "a list of calls, each with a `function` that has a `name`")


def _check_part(part: object, where: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "refusal") and isinstance(part, dict) and isinstance(part.get(kind), str):
        return
    if kind in ("image_url", "image", "input_image", "input_audio", "audio_url", "video_url", "file"):
        raise ValidationError(f"`{kind}` parts are not supported: the model reads text only", where)
    allowed = "of type 'text' with a `text`, or 'refusal' with a `refusal`"
    raise ValidationError(f"Invalid '{where}': its parts must be {allowed}", where)


def _invalid(where: str, allowed: str) -> ValidationError:
    return ValidationError(f"Invalid '{where}': it must be {allowed}", where)
