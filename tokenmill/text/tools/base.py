"""What a tool-call format is, and what reading an answer gives.

A format reads a model's calls out of its text and writes the grammar that holds a model to calls. What it reads is told
in `Delta`s; all deltas of an answer, joined, are the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from tokenmill.text.functions import Tool, is_strict, parameters_of
from tokenmill.text.output import CallDelta, Delta, DeltaBuilder
from tokenmill.text.reader import Reading, TextCursor

__all__ = ["CallDelta", "Delta", "DeltaBuilder", "Extent", "GrammarRequest", "Tool", "ToolFormat"]

Extent = Literal["calls", "answer", "behind", "choice"]
"""What a grammar describes: calls and nothing else; an answer, text with calls in it or not; what follows `trigger` in
such an answer; calls or something else instead."""


class GrammarRequest(NamedTuple):
    """What a grammar is asked for. `tools`: which may be called, at least one. Where the answer must be calls, all have
    their arguments held to their schema; else strict functions alone."""

    tools: Sequence[Tool]
    extent: Extent
    parallel: bool = True  # several calls may follow each other
    special_ids: Mapping[str, int] = {}  # special tokens by text; a marker that is not among them is plain text
    spoken: Sequence[str] = ()  # special tokens that may stand in text, besides the format's own
    instead: str = ""  # for "choice": rules in Lark of which `instead` is what may come instead of calls

    def schema_of(self, tool: Tool) -> dict[str, Any]:
        """What a function's arguments are held to: an object at least."""
        return parameters_of(tool) if self.extent == "calls" or is_strict(tool) else {"type": "object"}


class ToolFormat(Protocol):
    """One model family's way to call tools. Without state: it serves all requests at once."""

    @property
    def name(self) -> str:
        """Of the format's file."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """What other servers call it in `--tool-call-parser`."""

    @property
    def starts(self) -> tuple[str, ...]:
        """Texts that a group of calls begins with, anywhere in an answer."""

    @property
    def held_starts(self) -> tuple[str, ...]:
        """Those of `starts` that grammars of the extent "answer" know: other ones begin no call under them."""

    @property
    def bare(self) -> str:
        """Characters that an answer may begin with to be a call at once, without any of `starts`."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Everything that may be a special token of the tokenizer and has to reach the reader as text."""

    @property
    def trigger(self) -> str:
        """The text that stands before every call of an answer under a grammar; "" if there is no such text."""

    @property
    def own_loop(self) -> bool:
        """True if `read` reads whole answers, text and thoughts too, and not only a group of calls."""

    def matches(self, template: str, /) -> bool:
        """True if a chat template's source is written for this format."""

    def new_id(self) -> str:
        """A fresh id for a call, as the model's template takes them."""

    def read(self, reader: TextCursor, out: DeltaBuilder) -> Reading[None]:
        """Reads a group of calls from `reader`, which stands at one of `starts`, at `bare`, or at white space before;
        tells `out`. Raises Broken where the text is no call; the caller puts back what is not part of a complete one.
        """

    def grammar(self, request: GrammarRequest) -> str:
        """A grammar in llguidance's Lark. Whatever follows it, the calls of strict functions that `read` finds fit
        their schemas. Raises ToolError for what cannot be served so."""
