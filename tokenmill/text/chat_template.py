"""A model's chat template: messages to one prompt, character for character as `transformers` renders it.

Templates come with models, messages from strangers. So templates run in Jinja's immutable sandbox with a budget of time
and output (`sandbox.py`), and what a request may set are plain variables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import jinja2

from tokenmill.errors import TemplateError
from tokenmill.text import sandbox
from tokenmill.text.template_wants import Wants, wants_of

_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # with its space: where a template trims, the space is gone
_OURS = frozenset(
    {
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
        "conversation", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "tokenizer_kwargs",
    }
)  # fmt: skip
"""Names that a request may not set through `kwargs`: the server sets them, or transformers takes them itself."""


class ChatTemplate:
    """Renders conversations. `source`: the template's text, or several by name, of which "tool_use" serves requests
    with tools and "default" the others. `special_tokens`: further variables such as "pad_token".

    Compiled when first used. Safe to share between threads.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        bos: str | None = None,
        eos: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self._tokens = dict(special_tokens or {})
        self._tokens |= {name: text for name, text in (("bos_token", bos), ("eos_token", eos)) if text is not None}
        self._environment = sandbox.environment()
        self._compiled: dict[str, tuple[jinja2.Template, Wants]] = {}

    @property
    def source(self) -> str:
        """The text of the template that serves requests without tools."""
        return self.sources.get("default") or next(iter(self.sources.values()))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. `kwargs`: further variables for the template. Takes nothing: `messages` are copied if changed.

        With neither flag given, a last message of the assistant is continued, and after any other the assistant's turn
        begins. TemplateError if the template raises, is wrong, takes too long or writes too much.
        """
        continued, optional = self._continued(messages, add_generation_prompt, continue_final_message)
        begins = not continued if add_generation_prompt is None else add_generation_prompt
        variables = {**self._tokens, **_checked(kwargs or {})}
        variables |= {"tools": list(tools) if tools is not None else None, "documents": documents}
        template, wants = self._template("tool_use" if tools is not None and "tool_use" in self.sources else "default")
        chat = _messages_for(messages, wants)
        if not continued:
            return self._run(template, chat, begins, variables)
        tagged, text = _tagged(chat)
        rendered = self._run(template, tagged, begins, variables)
        cut = _cut(rendered, text)
        if cut is not None:
            return cut
        if optional:  # nobody asked for it by name: TGI leaves such a prompt whole
            return self._run(template, chat, True, variables)
        raise TemplateError(
            "continue_final_message: the last message's text is not in the prompt that the template makes"
        )

    def _continued(
        self, messages: Sequence[Mapping[str, Any]], begins: bool | None, continued: bool | None
    ) -> tuple[bool, bool]:
        """Whether the last message is to be continued, and whether that is only a guess."""
        if continued and begins:
            raise TemplateError("continue_final_message and add_generation_prompt cannot both be true")
        if continued:
            if not messages or _text_of(messages[-1]) is None:
                raise TemplateError("continue_final_message needs a last message with text")
            return True, False
        if continued is None and begins is None and messages:
            last = messages[-1]
            return last.get("role") == "assistant" and bool(_text_of(last)) and not last.get("tool_calls"), True
        return False, False

    def _template(self, name: str) -> tuple[jinja2.Template, Wants]:
        found = self._compiled.get(name)
        if found is None:
            if name not in self.sources:
                raise TemplateError(f"the model has no chat template {name!r}, only {', '.join(sorted(self.sources))}")
            try:
                tree = self._environment.parse(self.sources[name])
                wants = wants_of(tree)
                found = self._environment.from_string(tree), wants
            except jinja2.TemplateSyntaxError as e:
                raise TemplateError(f"the model's chat template is wrong in line {e.lineno}: {e.message}") from None
            self._compiled[name] = found
        return found

    def _run(self, template: jinja2.Template, chat: list[Any], begins: bool, variables: dict[str, Any]) -> str:
        try:
            return sandbox.run(template, {"messages": chat, "add_generation_prompt": begins, **variables})
        except jinja2.TemplateError as e:
            raise TemplateError(e.message or type(e).__name__) from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as e:
            raise TemplateError(f"{type(e).__name__}: {e}") from None
        except MemoryError:
            raise TemplateError("the chat template needs too much memory for these messages") from None


def _checked(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in kwargs:
        if name in _OURS or name.startswith("_"):
            raise TemplateError(f"chat_template_kwargs may not set {name!r}")
    return kwargs


def _messages_for(messages: Sequence[Mapping[str, Any]], wants: Wants) -> list[dict[str, Any]]:
    """Messages as they came, but for what the template cannot take: see `Wants`."""
    out: list[dict[str, Any]] = []
    for message in messages:
        given = dict(message)
        if not wants.content_lists and isinstance(given.get("content"), list):
            given["content"] = _joined(given["content"])
        if wants.argument_objects and isinstance(given.get("tool_calls"), list):
            given["tool_calls"] = [_with_objects(call) for call in given["tool_calls"]]
        out.append(given)
    return out


def _joined(parts: list[Any]) -> Any:
    """The text of a message's parts in one string; the list itself if a part is no text."""
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    whole = [text for text in texts if isinstance(text, str)]
    return "".join(whole) if len(whole) == len(texts) else parts


def _with_objects(call: Any) -> Any:
    """A tool call whose arguments, if they are JSON text of an object, are that object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(arguments, str):
        return call
    try:
        value = json.loads(arguments)
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": value}} if function and isinstance(value, dict) else call


def _text_of(message: Mapping[str, Any]) -> str | None:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        return texts[-1] if texts else None
    return None


def _tagged(chat: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The conversation with a mark behind the text that is to be continued, and that text."""
    last = deepcopy(chat[-1])
    text = _text_of(last) or ""
    if isinstance(last["content"], str):
        last["content"] = text + _TAG
    else:
        part = next(part for part in reversed(last["content"]) if isinstance(part, dict) and "text" in part)
        part["text"] = text + _TAG
    return [*chat[:-1], last], text


def _cut(rendered: str, text: str) -> str | None:
    """The prompt up to the mark; None if mark or text are not in it."""
    if text.strip() not in rendered or _TAG.strip() not in rendered:
        return None
    at = rendered.rindex(_TAG.strip())
    whole = rendered[at : at + len(_TAG)] == _TAG
    return rendered[:at] if whole else rendered[:at].rstrip()
