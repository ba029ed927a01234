"""Routes an answer's text: thoughts, then calls, then content.

A router belongs to one answer of one request. It is total: it takes any text in any pieces and raises nothing, and all
its deltas, joined, do not depend on the pieces. So the plain answer is the fold of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from tokenmill.text.functions import Tool, schemas_of
from tokenmill.text.machine import Held, Machine
from tokenmill.text.output import fold
from tokenmill.text.reasoning import ReasoningFormat, Splitter
from tokenmill.text.tools import by_name, of_template
from tokenmill.text.tools.base import CallDelta, Delta, ToolFormat
from tokenmill.text.tools.harmony import FORMAT as HARMONY

__all__ = ["CallDelta", "Delta", "Router", "fold", "router_of"]


class Router:
    """Splits one answer. `push` text as it comes, then `finish` once.

    The text must hold the special tokens that are among `markers`, as they are the delimiters of thoughts and calls;
    others are best left out of it.
    """

    __slots__ = ("_machine", "_splitter", "markers")

    def __init__(self, splitter: Splitter | None, machine: Machine | None, markers: frozenset[str]) -> None:
        self._splitter = splitter
        self._machine = machine
        self.markers = markers

    @property
    def complete_calls(self) -> int:
        """Calls whose arguments are whole. An answer with one of them ends for the reason "tool_calls"."""
        return self._machine.complete if self._machine else 0

    @property
    def in_reasoning(self) -> bool:
        """True while the newest text is a thought: its tokens count as reasoning tokens."""
        if self._machine is not None and self._machine.format.own_loop:
            return self._machine.in_reasoning
        return self._splitter is not None and self._splitter.inside

    def push(self, text: str) -> Delta:
        """What `text` adds."""
        if self._splitter is None:
            return self._machine.push(text) if self._machine else Delta(content=text)
        reasoning, rest = self._splitter.push(text)
        return self._routed(reasoning, rest)

    def finish(self) -> Delta:
        """What was held back: it is over."""
        reasoning, rest = self._splitter.finish() if self._splitter else ("", "")
        delta = self._routed(reasoning, rest)
        return fold((delta, self._machine.finish())) if self._machine else delta

    def _routed(self, reasoning: str, rest: str) -> Delta:
        if self._machine is None or not rest:
            return Delta(reasoning, rest)
        found = self._machine.push(rest)
        return msgspec.structs.replace(found, reasoning=reasoning) if reasoning else found


def router_of(
    template: str,
    *,
    tools: Sequence[Tool] = (),
    parallel: bool = True,
    held: Held = "",
    parser: str = "",
    reasoning: ReasoningFormat | None = None,
    new_id: Callable[[], str] | None = None,
) -> Router:
    """The router of an answer.

    `template`: the chat template's source, in which the format of calls is found unless `parser` names one (Unsupported
    if there is none of that name). Without tools, calls are content. `held`: the grammar that the answer follows.
    `reasoning`: what `reasoning_of` gave for the prompt. `new_id`: makes the calls' ids, by default as the format wants
    them.
    """
    channels = reasoning is not None and reasoning.channels
    form: ToolFormat | None = HARMONY if channels else format_of(template, parser) if tools else None
    machine = None
    if form is not None:
        most = (None if parallel else 1) if tools else 0
        machine = Machine(form, schemas_of(tools), new_id, most, held)
    splitter = Splitter(reasoning) if reasoning is not None and not channels else None
    markers = (*(form.markers if form else ()), *(reasoning.markers if reasoning and not channels else ()))
    return Router(splitter, machine, frozenset(markers))


def format_of(template: str, parser: str = "") -> ToolFormat:
    """The format that calls are written in: the one named, or the template's. Raises Unsupported."""
    return by_name(parser) if parser else of_template(template)
