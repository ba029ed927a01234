"""The thought before a chat's answer: its place in the text, its budget, and the answer's grammar behind it.

A grammar applies to the answer, not to the thought before it. If the prompt ends inside of a thought, the grammar
begins behind its end. If the model may open one itself, the thought becomes the optional beginning of the grammar. A
thought whose end cannot be recognized by tokens is closed in the prompt.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec

from tokenmill.text import reasoning as thoughts
from tokenmill.text.chat_grammar import AnswerGrammar, as_lark, renamed
from tokenmill.text.chat_request import Chat, ChatModel, asks_to_think
from tokenmill.text.lark import Lark
from tokenmill.text.limits import THINKING_BUDGET, not_supported
from tokenmill.text.options import ThoughtLimit
from tokenmill.text.reasoning import ReasoningFormat
from tokenmill.text.tokenizer import Tokenizer, fixed_ids, special_ids
from tokenmill.wire.messages import GrammarSpec


class Thinking(NamedTuple):
    """The thought of an answer. `form`: its marks; None: there is none. `opening`: text behind the prompt that begins
    or closes the thought."""

    form: ReasoningFormat | None
    opening: str = ""

    def opened(self) -> Thinking:
        """Return the same thought, begun in the prompt."""
        if self.form is None or self.form.already_open:
            return self
        return Thinking(msgspec.structs.replace(self.form, already_open=True), self.opening + self.form.start + "\n")

    def closed(self) -> Thinking:
        """Return an absent thought: it is closed in the prompt."""
        return Thinking(None, self.opening + (self.form.closing if self.form else ""))


def reasoning_of(chat: Chat, model: ChatModel, source: str, prompt: str) -> ReasoningFormat | None:
    """Return the marks of the thought in an answer to `prompt`; None if it has none. `source`: the template's text."""
    if model.reasoning_parser == "none":
        return None
    form = thoughts.reasoning_of(source, prompt, model.reasoning_parser)
    if form is None or form.channels or form.already_open:
        return form
    last = chat.messages[-1]
    said = last.get("content")
    if last.get("role") == "assistant" and isinstance(said, str) and prompt.rstrip().endswith(said.rstrip()):
        if said.rfind(form.start) > said.rfind(form.end):  # the answer continues a thought
            return msgspec.structs.replace(form, already_open=True)
        return None if said.strip() else form
    return form


def begun(chat: Chat, model: ChatModel, source: str, form: ReasoningFormat | None) -> Thinking:
    """Return the thought of an answer. A budget opens the thought, and a budget of 0 closes it. Raises ValidationError
    if the budget is out of bounds or the model does not think."""
    thinking, budget = Thinking(form), chat.options.thinking_budget
    if budget is None:
        return thinking
    THINKING_BUDGET.check(budget, None, "openai")
    if form is None:
        if model.reasoning_parser == "none" or not (model.reasoning_parser or thoughts.of_template(source)):
            raise not_supported("thinking_budget", "the model does not think, or not in a form that is known here")
        return thinking
    if form.channels:
        return thinking
    return thinking.opened() if budget else thinking.opened().closed()


def with_grammar(
    thinking: Thinking, answer: AnswerGrammar, chat: Chat, tokenizer: Tokenizer
) -> tuple[Thinking, GrammarSpec | None]:
    """Return the thought, opened or closed if the grammar requires that, and the answer's grammar, which applies behind
    it."""
    form, grammar = thinking.form, answer.grammar
    if form is None or grammar is None or answer.waits or (form.channels and answer.with_calls):
        return thinking, grammar
    if asks_to_think(chat) and not form.channels:
        thinking = thinking.opened()
    elif not form.already_open:
        return thinking, _optional(form, grammar, answer, tokenizer)
    ends = fixed_ids(tokenizer, form.answer)
    if ends is None:
        return thinking.closed(), grammar
    return thinking, msgspec.structs.replace(grammar, after=(ends,))


def limited(thinking: Thinking, answer: AnswerGrammar, budget: int | None, tokenizer: Tokenizer) -> ThoughtLimit | None:
    """Return how a thought ends whose budget is spent; None without a budget. If a grammar begins right behind the
    thought, nothing behind its end is forced. The header of a channel is not part of its thought."""
    form = thinking.form
    if budget is None or form is None:
        return None
    ends = fixed_ids(tokenizer, form.answer)
    if ends is None:
        raise not_supported("thinking_budget", "the end of the model's thoughts is no token of its own")
    encode, closing = tokenizer.encode, form.closing
    if answer.grammar is not None and not answer.waits:
        closing = closing.rstrip()
    if not form.channels:
        return ThoughtLimit(budget, tuple(encode(closing, False)), (ends,))
    if answer.calls:
        closing = closing.removesuffix(form.answer)
    calls = tuple(encode("<|channel|>commentary", False))
    return ThoughtLimit(budget + len(encode(form.start, False)), tuple(encode(closing, False)), (ends, calls))


def _optional(form: ReasoningFormat, grammar: GrammarSpec, answer: AnswerGrammar, tokenizer: Tokenizer) -> GrammarSpec:
    """Return the grammar with an optional thought before it."""
    body = renamed(grammar.source, "answer") if answer.with_calls else as_lark(grammar, "answer")
    if body is None:  # a client's own grammar, which is not extended
        return grammar
    end = form.closing if form.channels else form.end
    texts = [form.start, end, form.answer]
    lark = Lark(special_ids(tokenizer, re.findall(r"<\|[^|]*\|>", "".join(texts)) + texts))
    lark.rule("thought", f"{lark.text(form.start)} {lark.free('thinking', (form.end,)).text} {lark.text(end)}")
    if form.channels:
        lark.rule("headed", lark.text(form.answer))
        lark.rule("start", "(thought | headed) answer")
    else:
        lark.rule("THOUGHT_SPACE", r"/[ \n]{0,3}/")
        lark.rule("start", "(thought THOUGHT_SPACE)? answer")
    return GrammarSpec("lark", lark.source() + body)
