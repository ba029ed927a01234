"""Which forms of content and of arguments a chat template takes, found out by showing it both.

OpenAI's API sends a content as text or as a list of parts, and a tool call's arguments as JSON text. Most templates
were written for one form; given another they fail, print a Python list or JSON inside of JSON, or leave the message
out. Reading a template does not tell for sure, a trial does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tokenmill.errors import TemplateError

Form = Literal["any", "text", "parts"]  # for arguments, "parts" means an object

_MARK = "tokenmillmark"
_NAME = "tokenmillcall"
_ARGUMENTS = {"tokenmillkey": _MARK}
_MOST_ROLES = 64
_ID = "abcdefghi"  # nine letters and digits, which some templates insist on


class _Calls(NamedTuple):
    """`arguments`: their form, None if the template writes no calls. `beside_text`: also in messages with a content."""

    arguments: Form | None
    beside_text: bool


class Forms:
    """The forms of one template. `render` makes a prompt of a conversation, or raises TemplateError. `object_like`:
    whether arguments should be objects where no trial says so."""

    def __init__(self, render: Callable[[list[dict[str, Any]]], str], *, object_like: bool) -> None:
        self._render, self._object_like = render, object_like
        self._known: Mapping[str, Form | None] = {}  # replaced, never changed: threads share it
        self._calls: _Calls | None = None

    def of(self, role: str) -> Form | None:
        """How the role's contents may be written; None if the template shows neither. Renders when first asked."""
        if role in self._known:
            return self._known[role]
        text = self._shows(role, _MARK)
        parts = self._shows(role, [{"type": "text", "text": _MARK}])
        form: Form | None = "any" if text and parts else "text" if text else "parts" if parts else None
        if len(self._known) < _MOST_ROLES:  # clients make up roles
            self._known = {**self._known, role: form}
        return form

    def of_calls(self) -> _Calls:
        """How tool calls are written. Renders when first asked."""
        if self._calls is None:
            self._calls = _Calls("parts", True) if self._object_like else _Calls(None, True)
            for content in ("", None):  # what stands beside calls; templates differ
                as_text = self._with_call(content, json.dumps(_ARGUMENTS))
                as_object = self._with_call(content, _ARGUMENTS)
                text = _MARK in as_text and '\\"tokenmillkey' not in as_text
                parts = _MARK in as_object and "{'tokenmillkey" not in as_object
                if text or parts or _NAME in as_text:
                    self._calls = _Calls("any" if text == parts else "text" if text else "parts", content == "")
                    break
        return self._calls

    def shaped(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message in a form that the template takes, as it came if it takes that or if nothing is known.

        Calls that the template does not write become the message's content, as JSON, if it has none.
        """
        given = dict(message)
        calls = given.get("tool_calls")
        if isinstance(calls, list) and calls:
            form = self.of_calls().arguments
            if form is None and given.get("content") is None:
                given["content"] = json.dumps(calls, ensure_ascii=False, separators=(",", ":"))
            given["tool_calls"] = [_with_arguments(call, form) for call in calls]
        self._shape_content(given)
        return given

    def without_null(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with "" for a content of null, unless the template would then leave its calls out."""
        if message.get("content") is not None or (message.get("tool_calls") and not self.of_calls().beside_text):
            return message
        return {**message, "content": ""}

    def _shape_content(self, given: dict[str, Any]) -> None:
        role, content = str(given.get("role")), given.get("content")
        if not isinstance(content, (str, list)):
            return
        if role == "developer" and self.of(role) is None and self.of("system") is not None:
            given["role"] = role = "system"  # the same under its older name
        form = self.of(role)
        if isinstance(content, list) and form != "any" and form != "parts":
            given["content"] = _joined(content)
        elif isinstance(content, str) and form == "parts":
            given["content"] = [{"type": "text", "text": content}]

    def _shows(self, role: str, content: Any) -> bool:
        arguments = {} if self.of_calls().arguments == "parts" else "{}"
        out = self._rendered(_conversation(role, content, arguments))
        return _MARK in out and not any(f"{quote}type{quote}" in out for quote in "'\"")

    def _with_call(self, content: Any, arguments: Any) -> str:
        conversation = _conversation("tool", "x", arguments)
        conversation[1]["content"] = content
        return self._rendered(conversation)

    def _rendered(self, conversation: list[dict[str, Any]]) -> str:
        try:
            return self._render(conversation)
        except TemplateError:
            return ""


def _conversation(role: str, content: Any, arguments: Any) -> list[dict[str, Any]]:
    """A short one in which such a message has its usual place."""
    user, message = {"role": "user", "content": "x"}, {"role": role, "content": content}
    if role == "user":
        return [message]
    if role in ("system", "developer"):
        return [message, user]
    if role == "assistant":
        return [user, message, user]
    call = {"id": _ID, "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [user, asked, {**message, "name": _NAME, "tool_call_id": _ID}]


def _joined(parts: Sequence[Any]) -> Any:
    """The text of a message's parts in one string; the list itself if a part is no text."""
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    whole = [text for text in texts if isinstance(text, str)]
    return "".join(whole) if len(whole) == len(texts) else parts


def _with_arguments(call: Any, form: Form | None) -> Any:
    """A tool call with its arguments in this form, if they can be so written."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments: Any = function.get("arguments")
    if isinstance(arguments, str) and form == "parts":
        try:
            value = json.loads(arguments)
        except ValueError:
            return call
        arguments = value if isinstance(value, dict) else arguments
    elif isinstance(arguments, dict) and form == "text":
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}} if "arguments" in function else call
