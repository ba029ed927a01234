"""Which forms of content and of arguments a chat template takes, found out by showing it both.

OpenAI's API sends a content as text or as a list of parts, and a tool call's arguments as JSON text. Most templates
were written for one form; given another they fail, print a Python list or JSON inside of JSON, or leave the message
out. Reading a template does not tell for sure, a trial does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from tokenmill.errors import TemplateError

Form = Literal["any", "text", "parts"]  # for arguments, "parts" means an object

_MARK = "tokenmillmark"
_ARGUMENTS = {"tokenmillkey": _MARK}
_MOST_ROLES = 64
_ID = "abcdefghi"  # nine letters and digits, which some templates insist on


class Forms:
    """The forms of one template. `render` makes a prompt of a conversation, or raises TemplateError. `object_like`:
    whether arguments should be objects where no trial says so."""

    def __init__(self, render: Callable[[list[dict[str, Any]]], str], *, object_like: bool) -> None:
        self._render, self._object_like = render, object_like
        self._found: dict[str, Form | None] = {}
        self._arguments: Form | None = None

    def of(self, role: str) -> Form | None:
        """How the role's contents may be written; None if the template shows neither. Renders when first asked."""
        if role not in self._found:
            if len(self._found) >= _MOST_ROLES:  # clients make up roles
                self._found.clear()
            text = self._shows(role, _MARK)
            parts = self._shows(role, [{"type": "text", "text": _MARK}])
            self._found[role] = "any" if text and parts else "text" if text else "parts" if parts else None
        return self._found[role]

    def of_arguments(self) -> Form:
        """How a tool call's arguments may be written. Renders when first asked."""
        if self._arguments is None:
            unknown: Form = "parts" if self._object_like else "any"
            for content in ("", None):  # what stands beside calls; templates differ
                text = self._shows_call(content, json.dumps(_ARGUMENTS), '\\"tokenmillkey')
                parts = self._shows_call(content, _ARGUMENTS, "{'tokenmillkey")
                if text or parts:
                    unknown = "any" if text and parts else "text" if text else "parts"
                    break
            self._arguments = unknown
        return self._arguments

    def shaped(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message in a form that the template takes, as it came if it takes that or if nothing is known."""
        given = dict(message)
        calls = given.get("tool_calls")
        if isinstance(calls, list) and calls:
            form = self.of_arguments()
            given["tool_calls"] = [_with_arguments(call, form) for call in calls]
        self._shape_content(given)
        return given

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
        arguments = {} if self.of_arguments() == "parts" else "{}"
        out = self._rendered(_conversation(role, content, arguments))
        return _MARK in out and not any(f"{quote}type{quote}" in out for quote in "'\"")

    def _shows_call(self, content: Any, arguments: Any, wrong: str) -> bool:
        conversation = _conversation("tool", "x", arguments)
        conversation[1]["content"] = content
        out = self._rendered(conversation)
        return _MARK in out and wrong not in out

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
    call = {"id": _ID, "type": "function", "function": {"name": "f", "arguments": arguments}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [user, asked, {**message, "name": "f", "tool_call_id": _ID}]


def _joined(parts: Sequence[Any]) -> Any:
    """The text of a message's parts in one string; the list itself if a part is no text."""
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    whole = [text for text in texts if isinstance(text, str)]
    return "".join(whole) if len(whole) == len(texts) else parts


def _with_arguments(call: Any, form: Form) -> Any:
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
