"""A chat's request, the properties of a model that its answer depends on, and the checks of its messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from tokenmill.errors import ValidationError
from tokenmill.text.history import REASONING
from tokenmill.text.limits import not_supported
from tokenmill.text.options import Options
from tokenmill.text.tokenizer import Tokenizer

THINKING_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates turn a model's thinking on and off."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "refusal", *REASONING)
"""Fields with which a message may do without content, as answers have them."""


class ChatModel(NamedTuple):
    """The properties of a model that chats depend on: the tokenizer with its chat template, and the names of the
    parsers that the server was started with, "" for those that the template implies. `grammars`: True if answers may
    follow one."""

    tokenizer: Tokenizer
    tool_call_parser: str = ""
    reasoning_parser: str = ""
    grammars: bool = True


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation, and the requirements of its answer, unchecked; None: not given.

    Fields have the names and meanings of `/v1/chat/completions`. `options`: those of any generation; a chat's have
    `thinking_budget`, and may have `grammar`. `guided`: the fields of OpenAI's routes that ask for a grammar, by name.
    """

    messages: list[dict[str, Any]]
    options: Options = Options()
    guided: Mapping[str, Any] = {}
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    tool_prompt: str | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None


def template_fields(chat: Chat, source: str) -> dict[str, Any]:
    """Return the fields that have an effect only through the template, for a template with the text `source`. Raises
    ValidationError if the template does not use them."""
    variables: dict[str, Any] = {}
    for name in ("reasoning_effort", "verbosity"):
        value = getattr(chat, name)
        if value is None:
            continue
        if name in source:
            variables[name] = value
        elif name == "reasoning_effort" and (switch := _switch(source)):
            variables[switch] = value != "none"
        else:
            raise not_supported(name, "the model's chat template does not know it")
    return variables


def asks_to_think(chat: Chat) -> bool:
    """Return True if a chat requires a thought, and does not only allow one."""
    kwargs = chat.chat_template_kwargs or {}
    asked = chat.options.thinking_budget is not None or chat.reasoning_effort not in (None, "none")
    return asked or any(kwargs.get(switch) is True for switch in THINKING_SWITCHES)


def _switch(source: str) -> str | None:
    """Return the variable with which a template turns thinking on and off."""
    for name in THINKING_SWITCHES:
        if re.search(rf"{{[{{%][^%}}]*\b{name}\b", source):
            return name
    return None


def check_messages(messages: list[dict[str, Any]]) -> None:
    """Check roles and contents. Raises ValidationError that names the message."""
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
    """Check the calls that an assistant made earlier in the conversation."""
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
