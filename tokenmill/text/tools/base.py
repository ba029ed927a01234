"""The interface of a tool-call format.

A format reads a model's calls from its text and writes the grammar that constrains a model to calls. It emits `Delta`s;
the joined deltas of an answer are the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from tokenmill.text.functions import Tool, is_strict, parameters_of
from tokenmill.text.output import CallDelta, Delta, DeltaBuilder
from tokenmill.text.reader import Reading, TextCursor

__all__ = ["CallDelta", "Delta", "DeltaBuilder", "Extent", "GrammarRequest", "Tool", "ToolFormat"]

Extent = Literal["calls", "answer", "behind", "choice"]
"""Texts that a grammar describes: calls alone; an answer, which is text with or without calls; the text behind
`trigger` in such an answer; calls or something else instead."""


class GrammarRequest(NamedTuple):
    """Requirements of a grammar. `tools`: functions that may be called, at least one. If the answer must be calls, the
    arguments of all are constrained by their schemas; else those of strict functions alone."""

    tools: Sequence[Tool]
    extent: Extent
    parallel: bool = True  # several calls may follow each other
    special_ids: Mapping[str, int] = {}  # special tokens by text; a marker that is not among them is plain text
    spoken: Sequence[str] = ()  # special tokens that text may contain, besides the format's own
    instead: str = ""  # for "choice": rules in Lark, of which `instead` is an answer without calls

    def schema_of(self, tool: Tool) -> dict[str, Any]:
        """Return the schema that constrains a function's arguments: at least that of an object."""
        return parameters_of(tool) if self.extent == "calls" or is_strict(tool) else {"type": "object"}


class ToolFormat(Protocol):
    """Format in which one model family writes calls. Stateless: it serves all requests at once."""

    @property
    def name(self) -> str:
        """The name of the format's file."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Names of the format in other servers' `--tool-call-parser`."""

    @property
    def starts(self) -> tuple[str, ...]:
        """Texts with which a group of calls begins, anywhere in an answer."""

    @property
    def held_starts(self) -> tuple[str, ...]:
        """The `starts` that grammars of the extent "answer" have: under them the others do not begin a call."""

    @property
    def bare(self) -> str:
        """Characters with which an answer without any of `starts` may begin and be a call."""

    @property
    def markers(self) -> tuple[str, ...]:
        """All texts that may be special tokens and that must be passed on as text."""

    @property
    def trigger(self) -> str:
        """The text before every call of an answer under a grammar; "" if there is none."""

    @property
    def own_loop(self) -> bool:
        """True if `read` reads whole answers, with text and thoughts, and not only a group of calls."""

    def matches(self, template: str, /) -> bool:
        """Return True if a chat template's source is written for this format."""

    def new_id(self) -> str:
        """Return a new id for a call, in the form that the model's template takes."""

    def read(self, cursor: TextCursor, out: DeltaBuilder) -> Reading[None]:
        """Read a group of calls from `cursor`, which is at one of `starts`, at `bare`, or at white space before, and
        write it to `out`. Raises Broken where the text is not a call; the caller puts back text that is not part of a
        complete one."""

    def grammar(self, request: GrammarRequest) -> str:
        """Return a grammar in llguidance's Lark. Invariant: in any text that follows it, the calls of strict functions
        that `read` finds fit their schemas. Raises ToolError if that is not possible."""
