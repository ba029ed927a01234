"""A model's chat template: messages to one prompt, character for character as `transformers` renders it.

Templates come with models, and messages from strangers. So templates run in Jinja's immutable sandbox with a budget of
time and output (`sandbox.py`), and requests may set plain variables only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import jinja2

from tokenmill.errors import TemplateError
from tokenmill.text import sandbox
from tokenmill.text.history import normalized
from tokenmill.text.template_arguments import takes_argument_objects
from tokenmill.text.template_forms import Forms, Verbatim

_TRIAL_S = 0.2  # for each trial conversation of `template_forms.py`
_MAX_LINE = 120  # characters of a template's line in a message
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # ends with a space: it is missing if the template trims the text
_OURS = frozenset(
    (
        "messages tools add_generation_prompt continue_final_message conversation tokenize padding truncation "
        "max_length return_tensors return_dict tokenizer_kwargs"
    ).split()
)
"""Names that a request may not set through `kwargs`: the server sets them, or they are parameters of transformers."""


_THINKING = re.compile(r"""\.thinking\b|\[\s*['"]thinking['"]\s*\]""")  # a message's thought under gpt-oss's name


class _Fault(TemplateError):
    """Failure of Python on the contents of the messages; the template did not refuse them."""


class _Compiled(NamedTuple):
    """One compiled template, and the forms of messages that it takes."""

    name: str
    template: jinja2.Template
    forms: Forms


class ChatTemplate:
    """Renderer of conversations. `source`: the template's text, or several by name, of which "tool_use" serves requests
    with tools and "default" the others. `special_tokens`: further variables such as "pad_token".

    Compiled at first use. Safe to share between threads.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        bos: str | None = None,
        eos: str | None = None,
        special_tokens: Mapping[str, Any] | None = None,
    ) -> None:
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self._tokens: dict[str, Any] = dict(special_tokens or {})
        self._tokens |= {name: text for name, text in (("bos_token", bos), ("eos_token", eos)) if text is not None}
        self._environment = sandbox.environment()
        self._compiled: dict[str, _Compiled] = {}

    @property
    def source(self) -> str:
        """The text of the template that serves requests without tools."""
        return self.sources.get("default") or next(iter(self.sources.values()))

    @property
    def tool_source(self) -> str:
        """The text of the template that serves requests with tools."""
        return self.sources.get("tool_use") or self.source

    @property
    def shows_tools(self) -> bool:
        """True if that template writes a request's tools into the prompt."""
        return re.search(r"\btools\b", self.tool_source) is not None

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
        """Return the prompt. `kwargs`: further variables for the template. Among them `documents` equals the argument,
        and `chat_template` chooses one of several templates by name. `messages` are not changed.

        If neither flag is given, a last message of the assistant is continued, and after any other the assistant's turn
        begins. Raises TemplateError with message and line if the template raises, is wrong, takes too long or writes
        too much.
        """
        messages = normalized(messages)
        continued, optional = self._continued(messages, add_generation_prompt, continue_final_message)
        begins = not continued if add_generation_prompt is None else add_generation_prompt
        given = _checked(kwargs or {})
        template = self._template(self._name(given.pop("chat_template", None), tools is not None))
        variables = {**self._tokens, "documents": documents, **given, "tools": None if tools is None else list(tools)}
        verbatim = Verbatim()
        chat = template.forms.conversation(messages, verbatim, continued=continued)
        if not continued:
            return verbatim.restored(self._run(template, chat, begins, variables))
        tagged, text = _tagged(chat)
        rendered = self._run(template, tagged, begins, variables)
        cut = _cut(rendered, text)
        if cut is not None:
            return verbatim.restored(cut)
        if optional:  # not requested explicitly: TGI leaves such a prompt whole
            return verbatim.restored(self._run(template, chat, True, variables))
        raise TemplateError(
            "continue_final_message: the last message's text is not in the prompt that the template makes"
        )

    def _name(self, requested: Any, with_tools: bool) -> str:
        """Return the name of the template for a request. A request may choose a template by name, but not bring one."""
        if requested is None:
            return "tool_use" if with_tools and "tool_use" in self.sources else "default"
        if not isinstance(requested, str) or requested not in self.sources:
            known = ", ".join(sorted(self.sources))
            raise TemplateError(f"chat_template_kwargs may set 'chat_template' only to a name the model has: {known}")
        return requested

    def _continued(
        self, messages: Sequence[Mapping[str, Any]], begins: bool | None, continued: bool | None
    ) -> tuple[bool, bool]:
        """Return whether to continue the last message, and whether that was inferred and not requested."""
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

    def _template(self, name: str) -> _Compiled:
        found = self._compiled.get(name)
        if found is None:
            if name not in self.sources:
                raise TemplateError(f"the model has no chat template {name!r}, only {', '.join(sorted(self.sources))}")
            try:
                tree = self._environment.parse(self.sources[name])
                objects = takes_argument_objects(tree)
                template = self._environment.from_string(tree)
            except jinja2.TemplateSyntaxError as e:
                shown = self._line_of(name, e.lineno)
                raise TemplateError(f"the model's chat template is wrong in line {e.lineno}{shown}") from None

            usual = {**self._tokens, "tools": None if name == "default" else [], "add_generation_prompt": True}

            def trial(chat: list[dict[str, Any]]) -> str:
                return self._once(name, template, {**usual, "messages": chat}, _TRIAL_S)

            thinking = _THINKING.search(self.sources[name]) is not None
            found = _Compiled(name, template, Forms(trial, object_like=objects, reads_thinking=thinking))
            self._compiled[name] = found
        return found

    def _line_of(self, name: str, number: int) -> str:
        """Return a line of a template, from 1, for the end of a message; "" if there is none."""
        lines = self.sources[name].splitlines()
        return f": `{lines[number - 1].strip()[:_MAX_LINE]}`" if 0 < number <= len(lines) else ""

    def _run(self, found: _Compiled, chat: list[dict[str, Any]], begins: bool, variables: dict[str, Any]) -> str:
        """Render. If the template fails on a content that is null, as OpenAI writes one with calls, retry with "". If
        it refuses an empty answer, retry with a blank."""
        given = {"messages": chat, "add_generation_prompt": begins, **variables}
        try:
            return self._once(found.name, found.template, given)
        except TemplateError as error:
            null = isinstance(error, _Fault)
            others = [found.forms.without_null(message) if null else _with_blank(message) for message in chat]
            if others == chat:
                raise
            try:
                return self._once(found.name, found.template, {**given, "messages": others})
            except TemplateError:
                raise error from None

    def _once(
        self, name: str, template: jinja2.Template, variables: dict[str, Any], seconds: float | None = None
    ) -> str:
        try:
            return sandbox.run(template, variables, seconds)
        except jinja2.UndefinedError as e:
            raise _Fault(f"{sandbox.reason(e)}{_place(_line(e), name)}") from None
        except jinja2.TemplateError as e:
            raise TemplateError(f"{sandbox.reason(e)}{_place(_line(e), name)}") from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as e:
            shown = self._line_of(name, _line(e))
            raise _Fault(f"the chat template fails with {type(e).__name__}{shown}{_place(_line(e), name)}") from None
        except MemoryError:
            raise TemplateError("the chat template needs too much memory for these messages") from None


def _line(error: BaseException) -> int:
    """Return the line of the template where an error was raised, from 1; 0 if it is unknown."""
    line, at = 0, error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename == "<template>":  # Jinja writes the template's lines into its tracebacks
            line = at.tb_lineno
        at = at.tb_next
    return line


def _place(line: int, name: str) -> str:
    of = "" if name == "default" else f" {name!r}"
    return f" (line {line} of the chat template{of})" if line else ""


def _checked(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    for name in kwargs:
        if name in _OURS or name.startswith("_"):
            raise TemplateError(f"chat_template_kwargs may not set {name!r}")
    documents = kwargs.get("documents")
    if documents is not None and not (isinstance(documents, list) and all(isinstance(d, dict) for d in documents)):
        raise TemplateError("chat_template_kwargs: 'documents' must be a list of objects")
    return dict(kwargs)


def _text_of(message: Mapping[str, Any]) -> str | None:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        return texts[-1] if texts else None
    return None


def _with_blank(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message, with a blank for the content of an empty answer."""
    empty = message.get("role") == "assistant" and message.get("content") == "" and not message.get("tool_calls")
    return {**message, "content": " "} if empty else message


def _tagged(chat: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Return the conversation with a mark behind the text to continue, and that text."""
    last = deepcopy(chat[-1])
    text = _text_of(last) or ""
    if isinstance(last["content"], str):
        last["content"] = text + _TAG
    else:
        part = next(part for part in reversed(last["content"]) if isinstance(part, dict) and "text" in part)
        part["text"] = text + _TAG
    return [*chat[:-1], last], text


def _cut(rendered: str, text: str) -> str | None:
    """Return the prompt up to the mark; None if the mark or the text is not in it."""
    if text.strip() not in rendered or _TAG.strip() not in rendered:
        return None
    at = rendered.rindex(_TAG.strip())
    whole = rendered[at : at + len(_TAG)] == _TAG
    return rendered[:at] if whole else rendered[:at].rstrip()
