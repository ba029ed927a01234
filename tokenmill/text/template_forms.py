"""The forms of content, calls and turns that a chat template takes, found by rendering trials.

OpenAI's API sends a content as text or as a list of parts, and a tool call's arguments as JSON text. Most templates
were written for one form; with another they fail, print a Python list or JSON inside of JSON, or leave the message out.
Some take one call in a message, or ids of one length, or no results of tools. A template's source does not show this
with certainty; a trial does.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tokenmill.errors import TemplateError
from tokenmill.text import template_turns
from tokenmill.text.call_ids import IdForm, renamed

Form = Literal["any", "text", "parts"]  # for arguments, "parts" means an object

_MARK = "tokenmillmark"
_NAME = "tokenmillcall"
_TEXT = "tokenmilltext"
_MOST_ROLES = 64
_ID = "abcdefghi"  # nine letters and digits, which some templates require
_COUNTS = "<|tool_call_begin|>"  # of Kimi: nothing but the id follows it
_LONG_ID = "call_tokenmill0123456789"


class _Calls(NamedTuple):
    """Form in which a template writes tool calls. `arguments`: their form, None if it writes no calls. `takes_text`:
    also arguments that are not an object. `beside_empty`, `beside_text`: in messages whose content is "", or a text.
    `prints_null`: a content of null is printed as the word None. `several`: more than one call of a message."""

    arguments: Form | None
    takes_text: bool = True
    beside_empty: bool = True
    beside_text: bool = True
    prints_null: bool = False
    several: bool = True
    ids: IdForm = "any"


class Verbatim:
    """Texts that a prompt must contain unchanged, whatever the template would do to them. The template gets a word in
    the place of each, and `restored` puts the texts back."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._prefix = f"tokenmill{secrets.token_hex(8)}n"

    def hidden(self, text: str) -> str:
        """Return the word that stands for a text."""
        word = f"{self._prefix}{len(self._texts)}x"
        self._texts[word] = text
        return word

    def restored(self, prompt: str) -> str:
        """Return the prompt with the texts in the place of their words: in JSON between quotes, and without escapes."""
        for word, text in self._texts.items():
            prompt = prompt.replace(word, text)
        return prompt


class Forms:
    """The forms of one template. `render`: returns the prompt of a conversation, or raises TemplateError.
    `object_like`: True if arguments should be objects where no trial decides. `reads_thinking`: it reads a message's
    thought under that name, too."""

    def __init__(
        self,
        render: Callable[[list[dict[str, Any]]], str],
        *,
        object_like: bool,
        reads_thinking: bool = False,
    ) -> None:
        self._render, self._object_like, self._reads_thinking = render, object_like, reads_thinking
        self._known: Mapping[str, Form | None] = {}  # replaced, never changed, because threads share it
        self._calls: _Calls | None = None

    def of(self, role: str) -> Form | None:
        """Return the form of a role's contents; None if the template shows neither. Renders at the first call."""
        if role in self._known:
            return self._known[role]
        text = self._shows(role, _MARK)
        parts = self._shows(role, [{"type": "text", "text": _MARK}])
        form: Form | None = "any" if text and parts else "text" if text else "parts" if parts else None
        if len(self._known) < _MOST_ROLES:  # clients may invent roles
            self._known = {**self._known, role: form}
        return form

    def of_calls(self) -> _Calls:
        """Return the form of tool calls. Renders at the first call."""
        if self._calls is None:
            unknown = _Calls("parts" if self._object_like else None, takes_text=not self._object_like)
            tried = map(self._tried, ("", None))  # the content beside calls; templates differ
            self._calls = next(filter(None, tried), unknown)
        return self._calls

    def conversation(
        self, messages: Sequence[dict[str, Any]], verbatim: Verbatim, *, continued: bool
    ) -> list[dict[str, Any]]:
        """Return the messages in forms and turns that the template takes. `continued`: the last one stays unchanged."""
        calls = self.of_calls() if any("tool_calls" in message for message in messages) else None
        if calls is not None:
            messages = renamed(messages, calls.ids)
            last = messages[-1:] if continued else []
            messages = messages[: len(messages) - len(last)]
            if not calls.several:
                messages = template_turns.one_by_one(messages)
            if not calls.beside_text:
                messages = template_turns.apart(messages, "" if calls.beside_empty else None)
            messages = [*messages, *last]
            if calls.prints_null:
                messages = [self.without_null(message) for message in messages]
        if any(message.get("role") == "tool" for message in messages) and self.of("tool") is None and self.of("user"):
            messages = template_turns.results_as_user(messages)
        return [self.shaped(message, verbatim) for message in messages]

    def shaped(self, message: Mapping[str, Any], verbatim: Verbatim) -> dict[str, Any]:
        """Return the message in a form that the template takes; unchanged if it takes that, or if no form is known.

        Calls that the template does not write become the message's content, as JSON, if it has none.
        """
        given = dict(message)
        calls = given.get("tool_calls")
        if isinstance(calls, list) and calls:
            form = self.of_calls().arguments
            if form is None and given.get("content") is None:
                given["content"] = json.dumps(calls, ensure_ascii=False, separators=(",", ":"))
            given["tool_calls"] = [self._with_arguments(call, verbatim) for call in calls]
        self._shape_content(given)
        if self._reads_thinking and "reasoning" in given and not (calls and given.get("content")):
            given.setdefault("thinking", given["reasoning"])  # gpt-oss refuses it beside both
        return given

    def without_null(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the message with "" for a content of null, unless the template would then leave its calls out."""
        if message.get("content") is not None or (message.get("tool_calls") and not self.of_calls().beside_empty):
            return message
        return {**message, "content": ""}

    def _shape_content(self, given: dict[str, Any]) -> None:
        role, content = str(given.get("role")), given.get("content")
        if not isinstance(content, (str, list)):
            return
        if role == "developer" and self.of(role) is None and self.of("system") is not None:
            given["role"] = role = "system"  # the older name of the same role
        form = self.of(role)
        if isinstance(content, list) and form != "any" and form != "parts":
            given["content"] = _joined(content)
        elif isinstance(content, str) and form == "parts":
            given["content"] = [{"type": "text", "text": content}]

    def _with_arguments(self, call: Any, verbatim: Verbatim) -> Any:
        """Return a tool call with its arguments in the template's form. Absent ones are an empty object. Arguments that
        are not an object, for example because they were cut off, are kept as text."""
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            return call
        form, given = self.of_calls().arguments, function.get("arguments")
        value = _value(given)
        arguments: Any = given
        if isinstance(value, Mapping):
            if form == "parts":
                arguments = value
            elif form == "text" or not isinstance(given, str | Mapping) or (not value and isinstance(given, str)):
                arguments = given if value and isinstance(given, str) else json.dumps(value, ensure_ascii=False)
        else:
            word = verbatim.hidden(given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))
            arguments = word if self.of_calls().takes_text else {"arguments": word}
        return {**call, "function": {**function, "arguments": arguments}}

    def _tried(self, content: str | None) -> _Calls | None:
        """Return the form of calls in messages with this content; None if the template does not write them."""
        as_text = self._with_calls(content, json.dumps(_marked(0)))
        as_object = self._with_calls(content, _marked(0))
        text = _MARK in as_text and '\\"tokenmillkey' not in as_text
        parts = _MARK in as_object and "{'tokenmillkey" not in as_object
        if not (text or parts or _NAME in as_text):
            return None
        form: Form = "any" if text == parts else "text" if text else "parts"
        good: Any = _marked if form == "parts" else lambda i: json.dumps(_marked(i))
        shown = f"{_MARK}0"
        named = self._with_calls(content, good(0))
        ids: IdForm = "any"
        if shown in named and f"{_COUNTS}{_ID}" in named:
            ids = "counted"
        elif shown in named and shown not in self._with_calls(content, good(0), call_id=_LONG_ID):
            ids = "short"
        return _Calls(
            form,
            takes_text=_TEXT in self._with_calls(content, _TEXT),
            beside_empty=content == "",
            beside_text=content == "" and (shown not in named or shown in self._with_calls(_TEXT, good(0))),
            prints_null=content == "" and "None" not in named and "None" in self._with_calls(None, good(0)),
            several=shown not in named or f"{_MARK}1" in self._with_calls(content, good(0), good(1)),
            ids=ids,
        )

    def _shows(self, role: str, content: Any) -> bool:
        arguments = {} if self.of_calls().arguments == "parts" else "{}"
        out = self._rendered(_conversation(role, content, arguments))
        return _MARK in out and not any(f"{quote}type{quote}" in out for quote in "'\"")

    def _with_calls(self, content: Any, *arguments: Any, call_id: str = _ID) -> str:
        """Return the prompt of a short conversation with calls that have these arguments, and their results."""
        ids = [call_id[:-1] + "ij"[i] for i in range(len(arguments))]
        calls = [_call(one, given) for one, given in zip(ids, arguments, strict=True)]
        results = [{"role": "tool", "content": "x", "tool_call_id": one} for one in ids]
        asked = {"role": "assistant", "content": content, "tool_calls": calls}
        return self._rendered([{"role": "user", "content": "x"}, asked, *results])

    def _rendered(self, conversation: list[dict[str, Any]]) -> str:
        try:
            return self._render(conversation)
        except TemplateError:
            return ""


def _marked(number: int) -> dict[str, str]:
    return {"tokenmillkey": f"{_MARK}{number}"}


def _call(call_id: str, arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": _NAME, "arguments": arguments}}


def _value(arguments: Any) -> Any:
    """Return the object that arguments are, {} for absent ones, else None."""
    if arguments is None or isinstance(arguments, Mapping):
        return arguments or {}
    if not isinstance(arguments, str):
        return None
    if arguments.strip() in ("", "null"):
        return {}
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _conversation(role: str, content: Any, arguments: Any) -> list[dict[str, Any]]:
    """Return a short conversation in which such a message has its usual place."""
    user, message = {"role": "user", "content": "x"}, {"role": role, "content": content}
    if role == "user":
        return [message]
    if role in ("system", "developer"):
        return [message, user]
    if role == "assistant":
        return [user, message, user]
    asked = {"role": "assistant", "content": "", "tool_calls": [_call(_ID, arguments)]}
    return [user, asked, {**message, "name": _NAME, "tool_call_id": _ID}]


def _joined(parts: Sequence[Any]) -> Any:
    """Return the text of a message's parts in one string; the list itself if a part is not text."""
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    whole = [text for text in texts if isinstance(text, str)]
    return "".join(whole) if len(whole) == len(texts) else parts
