"""What a tool-call format is, and what reading an answer gives.

A format reads a model's calls out of its text and writes the grammar that makes a model call. What it reads is told in
`Delta`s; all deltas of an answer, joined, are the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from tokenmill.text.tools._lark import Choice, Tool
from tokenmill.text.tools._output import CallDelta, Delta, Output
from tokenmill.text.tools._reader import Reader, Reading

__all__ = ["CallDelta", "Choice", "Delta", "Output", "Tool", "ToolFormat"]


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
    def bare(self) -> str:
        """Characters that an answer may begin with to be a call at once, without any of `starts`."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Everything that may be a special token of the tokenizer and has to reach the reader as text."""

    @property
    def trigger(self) -> str:
        """The text behind which `grammar(…, "auto", …)` applies; "": it applies from the first token on."""

    @property
    def own_loop(self) -> bool:
        """True if `read` reads whole answers, text and thoughts too, and not only a group of calls."""

    def matches(self, template: str, /) -> bool:
        """True if a chat template's source is written for this format."""

    def new_id(self) -> str:
        """A fresh id for a call, as the model's template takes them."""

    def read(self, reader: Reader, out: Output) -> Reading[None]:
        """Reads a group of calls from `reader`, which stands at one of `starts`, at `bare`, or at white space before;
        tells `out`. Raises Broken where the text is no call; the caller puts back what is not part of a complete one.
        """

    def grammar(
        self, tools: Sequence[Tool], choice: Choice, parallel: bool, special_ids: Mapping[str, int] | None = None
    ) -> tuple[str, str]:
        """(kind, source) of a grammar in llguidance's Lark that makes the model call.

        `choice`: OpenAI's `tool_choice`; with "auto" what follows `trigger`, with the arguments of strict
        functions held to their schema. `parallel`: several calls may follow each other. `special_ids`: the tokenizer's
        special tokens by text; a marker that is not among them is plain text. Raises ToolError for an unknown name.
        """
