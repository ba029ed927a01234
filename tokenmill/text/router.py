"""Routes an answer's text: thoughts, then calls, then content, up to the answer's end.

A router belongs to one answer of one request. It is total: it takes any text in any pieces and raises nothing.
Invariant: its joined deltas do not depend on the pieces, so the whole answer is the fold of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from tokenmill.text.detokenizer import StopMatcher
from tokenmill.text.functions import Tool, schemas_of
from tokenmill.text.machine import Held, Machine
from tokenmill.text.output import fold
from tokenmill.text.reasoning import ReasoningFormat, Splitter, StrayEndMark
from tokenmill.text.reasoning_calls import CallFinder
from tokenmill.text.tools import by_name, of_template
from tokenmill.text.tools.base import CallDelta, Delta, ToolFormat
from tokenmill.text.tools.harmony import FORMAT as HARMONY

__all__ = ["CallDelta", "Delta", "Router", "fold", "format_of", "new_router"]


class Router:
    """Router of one answer. `push` each token's text as it comes, then `finish` once.

    The text must contain the special tokens that are among `markers`, which delimit thoughts and calls; it should not
    contain others.
    """

    __slots__ = ("_early", "_include", "_machine", "_matcher", "_splitter", "_stray", "markers", "stopped")

    def __init__(self, splitter: Splitter | None, machine: Machine | None, markers: frozenset[str]) -> None:
        self._splitter = splitter
        self._machine = machine
        self._matcher: StopMatcher | None = None
        self._include, self._early = False, 0
        self._stray = StrayEndMark(splitter.end) if splitter and machine else None
        self.markers = markers
        self.stopped: str | None = None  # the stop string that ended the answer

    def end_at(self, stops: Sequence[str], *, include: bool = False, min_tokens: int = 0) -> None:
        """Let the first of some strings end the answer, though not its thoughts. See `Detokenizer`; here `min_tokens`
        are those behind the thought. Call before the first `push`."""
        self._matcher = StopMatcher(stops) if stops else None
        self._include, self._early = include, min_tokens

    @property
    def over(self) -> bool:
        """True once no further text belongs to the answer: a stop string came, or all the calls that it may have."""
        return self.stopped is not None or (self._machine is not None and self._machine.over)

    @property
    def complete_calls(self) -> int:
        """Number of calls whose arguments are whole. An answer with any of them ends for the reason "tool_calls"."""
        return self._machine.complete if self._machine else 0

    @property
    def in_reasoning(self) -> bool:
        """True while the newest text is a thought: its tokens count as reasoning tokens."""
        if self._machine is not None and self._machine.format.own_loop:
            return self._machine.in_reasoning
        return self._splitter is not None and self._splitter.inside

    def push(self, text: str, hidden: str = "") -> Delta:
        """Return the delta of a token's text. `hidden`: the text of a token that is not shown, which may complete a
        stop string."""
        if self._machine is not None and self._machine.format.own_loop:
            found = self._machine.push(text)
            return self._with_content(found, self._unstopped(found.content, "" if self.in_reasoning else hidden))
        if self._splitter is None:
            return self._routed("", self._unstopped(text, hidden))
        begun = self._splitter.passed
        reasoning, rest = self._splitter.push(text)
        return self._routed(reasoning, self._unstopped(rest, hidden) if begun or rest else "")

    def finish(self) -> Delta:
        """End the answer, and return the delta that was held back."""
        if self._machine is not None and self._machine.format.own_loop:
            found = self._machine.finish()
            return self._with_content(found, self._unstopped(found.content) + self._released())
        reasoning, rest = self._splitter.finish() if self._splitter else ("", "")
        delta = self._routed(reasoning, self._unstopped(rest) + self._released())
        if self._machine is None:
            return delta
        last = self._without_stray(self._machine.finish())
        return fold((delta, last, Delta(content=self._stray.finish() if self._stray else "")))

    def _routed(self, reasoning: str, rest: str) -> Delta:
        if self._machine is None or not rest:
            return Delta(reasoning, rest)
        found = self._without_stray(self._machine.push(rest))
        return msgspec.structs.replace(found, reasoning=reasoning) if reasoning else found

    def _without_stray(self, delta: Delta) -> Delta:
        """Return the delta without the end mark of a thought that a call has ended."""
        if self._stray is None or self._splitter is None or not self._splitter.called:
            return delta
        return self._with_content(delta, self._stray.push(delta.content))

    def _unstopped(self, text: str, hidden: str = "") -> str:
        """Return the content that is no part of a stop string, and count a token."""
        if self._matcher is None:
            return text
        ends = self._early <= 0
        self._early -= 1
        if self.stopped is not None:
            return ""
        text, self.stopped = self._matcher.push(text or hidden, bool(text), self._include, ends=ends)
        return text

    def _released(self) -> str:
        """Return the text that was held back as the beginning of a stop string."""
        return self._matcher.finish() if self._matcher is not None else ""

    @staticmethod
    def _with_content(delta: Delta, content: str) -> Delta:
        return delta if content == delta.content else msgspec.structs.replace(delta, content=content)


def new_router(
    calls: ToolFormat | None,
    *,
    tools: Sequence[Tool] = (),
    parallel: bool = True,
    held: Held = "",
    reasoning: ReasoningFormat | None = None,
    new_id: Callable[[], str] | None = None,
) -> Router:
    """Return the router of one answer.

    `calls`: the format of calls; None, or no tools: calls are content. `held`: the extent of the grammar that
    constrains the answer. `reasoning`: the result of `reasoning_of` for the prompt. `new_id`: makes the calls' ids, by
    default those of the format.
    """
    channels = reasoning is not None and reasoning.channels
    form = HARMONY if channels else calls if tools else None
    machine = None
    if form is not None:
        most = (None if parallel else 1) if tools else 0
        machine = Machine(form, schemas_of(tools), new_id, most, held)
    finder = CallFinder(form, schemas_of(tools), held) if form is not None and not channels else None
    splitter = Splitter(reasoning, finder) if reasoning is not None and not channels else None
    markers = (*(form.markers if form else ()), *(reasoning.markers if reasoning and not channels else ()))
    return Router(splitter, machine, frozenset(markers))


def format_of(template: str, parser: str = "") -> ToolFormat:
    """Return the format of calls: the one that `parser` names, or the template's. Raises Unsupported."""
    return by_name(parser) if parser else of_template(template)
