"""How a chat's answer speaks: where its thoughts and calls are in its text, and which grammar makes it keep to that.

A grammar is for the answer, not for the thought before it. If the prompt ends inside of a thought, the grammar begins
behind its end; if the model may open one itself, the thought becomes the optional beginning of the grammar. A thought
whose end could not be told by tokens is closed in the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from tokenmill.server.routes.chat_checks import asks_to_think
from tokenmill.server.routes.chat_grammar import Shape, Voice, as_lark, fixed_ids, renamed, shape_of, special_ids
from tokenmill.server.routes.chat_tools import Tools
from tokenmill.server.routes.openai import refuse
from tokenmill.server.schema.openai import ChatRequest
from tokenmill.text import reasoning as thoughts
from tokenmill.text.guided import Wanted
from tokenmill.text.lark import Lark
from tokenmill.text.prepare import Thought
from tokenmill.text.reasoning import ReasoningFormat
from tokenmill.text.router import Router, format_of, router_of
from tokenmill.wire.messages import GrammarSpec


class Speech(NamedTuple):
    """What a chat's answer is made to be, and how its text is read."""

    router: Callable[[], Router] | None = None  # makes one for a choice; None: all text is content
    thinks: bool = False  # the usage tells tokens of reasoning
    older: bool = False  # calls are told as `function_call`
    opening: str = ""  # comes behind the prompt
    grammar: GrammarSpec | None = None
    grammar_field: str = ""
    thought: Thought | None = None
    shown_ids: frozenset[int] = frozenset()  # special tokens that the router reads


def check_parsers(tool_call_parser: str, reasoning_parser: str) -> None:
    """Unsupported if there are none of these names; "" is always fine, and so is no reasoning at all, "none"."""
    format_of("", tool_call_parser)
    if reasoning_parser not in ("", "none"):
        thoughts.by_name(reasoning_parser)


def speech_of(voice: Voice, body: ChatRequest, prompt: str, tools: Tools | None, wanted: Wanted | None) -> Speech:
    """The speech of an answer to a prompt. ValidationError, GrammarError. Compiles nothing, but may take milliseconds
    where functions have long schemas."""
    form = _reasoning(voice, body, prompt)
    if tools is not None and tools.choice == "none":
        tools = None
    shape = shape_of(voice, tools, wanted, form)
    thinking = _Thinking(voice, form, body, shape)
    grammar, thought, form = thinking.grammar(), thinking.limited(), thinking.form
    if form is None and tools is None:
        return Speech(None, False, False, thinking.opening, grammar, shape.field, thought)

    def router() -> Router:
        return router_of(
            voice.template,
            tools=tools.allowed if tools else (),
            parallel=tools is None or tools.parallel,
            held=shape.held,
            parser=voice.tool_call_parser,
            reasoning=form,
        )

    shown = frozenset(special_ids(voice.tokenizer, router().markers).values())
    older = tools is not None and tools.older
    return Speech(router, form is not None, older, thinking.opening, grammar, shape.field, thought, shown)


def _reasoning(voice: Voice, body: ChatRequest, prompt: str) -> ReasoningFormat | None:
    """How the answer may think; None if it does not."""
    if voice.reasoning_parser == "none":
        return None
    form = thoughts.reasoning_of(voice.template, prompt, voice.reasoning_parser)
    if form is None or form.channels or form.already_open:
        return form
    last = body.messages[-1]
    said = last.get("content")
    if last.get("role") == "assistant" and isinstance(said, str) and prompt.rstrip().endswith(said.rstrip()):
        if said.rfind(form.start) > said.rfind(form.end):  # the answer goes on with a thought
            return msgspec.structs.replace(form, already_open=True)
        return None if said.strip() else form
    return form


class _Thinking:
    """How long a thought may be and what comes behind it. `form` and `opening`: what the answer may think, and what is
    put behind the prompt for that; both may change with what is asked."""

    def __init__(self, voice: Voice, form: ReasoningFormat | None, body: ChatRequest, shape: Shape) -> None:
        self._voice, self.form, self._shape = voice, form, shape
        self.opening = ""
        self._budget, self._asked = body.thinking_budget, asks_to_think(body)
        if self._budget is None:
            return
        if form is None and self._never_thinks():
            raise refuse("thinking_budget", "the model does not think, or not in a form that is known here")
        if form is not None and not form.channels:
            if not form.already_open:
                self._open(form)
            if self._budget == 0:
                self._close(form)

    def grammar(self) -> GrammarSpec | None:
        """The answer's grammar, made to hold behind the thought."""
        form, grammar = self.form, self._shape.grammar
        if form is None or grammar is None or self._shape.waits or (form.channels and self._shape.with_calls):
            return grammar
        if self._asked and not form.already_open and not form.channels:
            form = self._open(form)
        if not form.already_open:
            return self._optional(form, grammar)
        ends = self._end_ids(form)
        if ends is None:
            self._close(form)
            return grammar
        return msgspec.structs.replace(grammar, after=(ends,))

    def limited(self) -> Thought | None:
        """How the thought is ended when its budget is spent: where a grammar begins right behind it, with nothing
        more. A channel's header is no part of a thought."""
        form, budget = self.form, self._budget
        if budget is None or form is None:
            return None
        ends = self._end_ids(form)
        if ends is None:
            raise refuse("thinking_budget", "the end of the model's thoughts is no token of its own")
        encode, closing = self._voice.tokenizer.encode, form.closing
        if self._shape.grammar is not None and not self._shape.waits:
            closing = closing.rstrip()
        if not form.channels:
            return Thought(budget, tuple(encode(closing, False)), (ends,))
        if self._shape.calls:
            closing = closing.removesuffix(form.answer)
        calls = tuple(encode("<|channel|>commentary", False))
        return Thought(budget + len(encode(form.start, False)), tuple(encode(closing, False)), (ends, calls))

    def _never_thinks(self) -> bool:
        parser = self._voice.reasoning_parser
        return parser == "none" or (not parser and thoughts.of_template(self._voice.template) is None)

    def _open(self, form: ReasoningFormat) -> ReasoningFormat:
        self.opening = form.start + "\n"
        self.form = msgspec.structs.replace(form, already_open=True)
        return self.form

    def _close(self, form: ReasoningFormat) -> None:
        self.opening += form.closing
        self.form = None

    def _end_ids(self, form: ReasoningFormat) -> tuple[int, ...] | None:
        return fixed_ids(self._voice.tokenizer, form.answer)

    def _optional(self, form: ReasoningFormat, grammar: GrammarSpec) -> GrammarSpec:
        """The grammar with a thought before it, if the model likes."""
        ours = self._shape.with_calls
        body = renamed(grammar.source, "answer") if ours else as_lark(grammar, "answer")
        if body is None:  # a grammar of the client's own: it says itself what may come
            return grammar
        end = form.closing if form.channels else form.end
        texts = [form.start, end, form.answer]
        lark = Lark(special_ids(self._voice.tokenizer, re.findall(r"<\|[^|]*\|>", "".join(texts)) + texts))
        lark.rule("thought", f"{lark.text(form.start)} {lark.free('thinking', (form.end,)).text} {lark.text(end)}")
        if form.channels:
            lark.rule("headed", lark.text(form.answer))
            lark.rule("start", "(thought | headed) answer")
        else:
            lark.rule("THOUGHT_SPACE", r"/[ \n]{0,3}/")
            lark.rule("start", "(thought THOUGHT_SPACE)? answer")
        return GrammarSpec("lark", lark.source() + body)
