"""Reads the answers to one request: from token ids to text, and from text to thoughts, calls and content.

This file decides to which text stop strings and `min_tokens` apply. If thoughts or calls are split off, the router
searches the content behind the thought for stop strings and counts `min_tokens` from there. Else the detokenizer
searches all of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from tokenmill.text.detokenizer import Detokenizer
from tokenmill.text.functions import Tool
from tokenmill.text.machine import Held
from tokenmill.text.prepare import Prepared
from tokenmill.text.reasoning import ReasoningFormat
from tokenmill.text.router import Router, new_router
from tokenmill.text.tokenizer import Tokenizer, special_ids
from tokenmill.text.tools.base import ToolFormat


class AnswerReader(msgspec.Struct, frozen=True):
    """Reader of all answers to one request. Holds no state of any answer.

    `router`: makes the router of one answer; None: all text is content. `shown_ids`: special tokens that the router
    reads as text. `thinks`: answers may have a thought, whose tokens are counted.
    """

    router: Callable[[], Router] | None = None
    shown_ids: frozenset[int] = frozenset()
    thinks: bool = False

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        calls: ToolFormat | None,
        *,
        tools: Sequence[Tool],
        parallel: bool,
        held: Held,
        reasoning: ReasoningFormat | None,
    ) -> AnswerReader:
        """Return the reader of answers that may call `tools`, written in the format `calls`, with thoughts marked as in
        `reasoning`. See `router.new_router`."""
        if calls is None and reasoning is None:
            return PLAIN

        def router() -> Router:
            return new_router(calls, tools=tools, parallel=parallel, held=held, reasoning=reasoning)

        shown = frozenset(special_ids(tokenizer, router().markers).values())
        return cls(router, shown, reasoning is not None)

    def begin(
        self, tokenizer: Tokenizer, prepared: Prepared, *, include_stop: bool = False
    ) -> tuple[Detokenizer, Router | None]:
        """Return the detokenizer and the router of one answer. `include_stop`: the stop string is part of the text."""
        router = None if self.router is None else self.router()
        least = prepared.stopping.min_new_tokens
        if router is not None:
            router.end_at(prepared.stop, include=include_stop, min_tokens=least)
        detokenizer = Detokenizer(
            tokenizer,
            prepared.stop if router is None else (),
            include_stop=include_stop,
            min_tokens=least,
            prompt_ids=prepared.ids_before,
            shown_ids=self.shown_ids,
            begins=prepared.num_started > 0,
        )
        return detokenizer, router


PLAIN = AnswerReader()
"""The reader of answers whose text is content and nothing else."""


class WholeText:
    """One answer as one text, its thought included and special tokens left out, token by token.

    For answers whose stop strings a router finds. Text that may belong to one is held back, so the joined pieces end
    before the stop string, or with it if `include_stop`.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = (), *, include_stop: bool = False
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_ids=prompt_ids)
        self._most_held = max(map(len, stop), default=1) - 1  # characters
        self._include_stop = include_stop
        self._held = ""

    def push(self, token_id: int, stopped: str | None = None, *, in_reasoning: bool = False) -> str:
        """Return the text that may be shown. `stopped`: the stop string that was complete with this token;
        `in_reasoning`: the text is a thought, which no stop string ends."""
        begin = len(self._held)
        self._held += self._detokenizer.push(token_id).text
        if stopped is not None:
            return self.finish(stopped, begin)
        shown = max(len(self._held) - (0 if in_reasoning else self._most_held), 0)
        text, self._held = self._held[:shown], self._held[shown:]
        return text

    def finish(self, stopped: str | None = None, begin: int = 0) -> str:
        """Return the text that was held back, up to `stopped`, which ends behind character `begin` of it."""
        text, self._held = self._held, ""
        if stopped is None:
            return text
        at = text.find(stopped, max(begin - len(stopped) + 1, 0))
        return text if at < 0 else text[: at + (len(stopped) if self._include_stop else 0)]


def whole_text(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], token_ids: Sequence[int], stopped: str | None = None
) -> str:
    """Return an answer as one text, its thought included and special tokens left out. `stopped`: the stop string that
    was complete with the last token; the text ends with it."""
    whole = WholeText(tokenizer, prompt_ids, () if stopped is None else (stopped,), include_stop=True)
    last = len(token_ids) - 1
    parts = [whole.push(token_id, stopped if i == last else None) for i, token_id in enumerate(token_ids)]
    return "".join(parts) + whole.finish()
