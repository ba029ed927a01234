"""Reads an answer with a tool format: calls become calls, all other text stays content.

Total: it takes any text in any pieces and raises nothing. Invariant: the joined output does not depend on the pieces. A
call is emitted once its name and the beginning of its arguments are there. If it then turns out not to be one, or the
answer is cut off in it, it is taken back by a `Delta.broken` with its text, which is content. So content and the texts
of complete calls are the answer. Reading continues behind the last valid part of the broken call; if the answer was cut
off, nothing in its text is another call. White space before a group of calls, between and behind them belongs to the
calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from tokenmill.text.output import Delta, DeltaBuilder
from tokenmill.text.reader import Broken, Markers, Reading, TextCursor
from tokenmill.text.tools.base import ToolFormat

_MOST_SPACE = 32  # characters of white space that are held back, because a call may follow

Held = Literal["", "calls", "answer", "choice"]
"""Extent of the grammar that constrains the answer, if any (see base.Extent): then it is read exactly."""


class Machine:
    """Reader of one answer. `push` text as it comes, then `finish` once."""

    __slots__ = ("_cursor", "_fresh", "_marks", "_only_calls", "_out", "_run", "format")

    def __init__(
        self,
        form: ToolFormat,
        schemas: Mapping[str, Any],
        new_id: Callable[[], str] | None,
        most: int | None = None,
        held: Held = "",
    ) -> None:
        self.format = form
        self._cursor = TextCursor()
        self._out = DeltaBuilder(schemas, new_id or form.new_id, most, bool(held))
        self._marks = Markers(*(form.held_starts if held else form.starts))
        self._only_calls = held == "choice"  # True until other text comes, after which nothing is a call
        self._fresh = bool(form.bare)  # True while only white space has come
        self._run: Reading[None] = form.read(self._cursor, self._out) if form.own_loop else self._answer()
        self._step()

    @property
    def complete(self) -> int:
        """Number of calls that are whole."""
        return self._out.complete

    @property
    def over(self) -> bool:
        """True once the answer has all the calls that it may have, so that no further text belongs to it."""
        return self._out.over

    @property
    def in_reasoning(self) -> bool:
        """True while the newest text is a thought, for a format that reads thoughts."""
        return self._out.thinking

    def push(self, text: str) -> Delta:
        """Return the delta of `text`."""
        if not text or self._cursor.ended:
            return Delta()
        self._cursor.feed(text)
        self._step()
        return self._out.take()

    def finish(self) -> Delta:
        """End the answer, and return the last delta."""
        if not self._cursor.ended:
            self._cursor.ended = True
            self._step()
        return self._out.take()

    def _step(self) -> None:
        next(self._run, None)

    def _answer(self) -> Reading[None]:
        """Read text and groups of calls, in turn."""
        r = self._cursor
        after_call = False
        while (yield from self._content(after_call)):
            before = self._out.complete
            r.settle()
            try:
                yield from self.format.read(r, self._out)
                r.settle()
                after_call = self._out.complete > before
            except Broken:
                r.rewind()
                after_call = self._out.complete > before and not self._out.begun
                self._resume(after_call)
            self._fresh = False

    def _resume(self, after_call: bool) -> None:
        """Continue behind a broken call, never with the same text, which would break again."""
        r, out = self._cursor, self._out
        over = self._only_calls or (r.ended and (out.held or out.begun))
        if out.begun:
            assert r.checked
            r.pos = len(r.text) if over else r.checked
            out.cancel(r.text[: r.pos])
            r.settle()
        elif not (over or after_call or self._fresh):
            marker = self._marks.search(r.text, 0)
            assert marker is not None
            self._emit(marker.end())
        if over:
            self._marks = Markers()

    def _content(self, after_call: bool) -> Reading[bool]:
        """Emit text up to a place where a call may begin, and return True; at the end False."""
        r, out = self._cursor, self._out
        while True:
            if self._only_calls and not self._may_begin(r.text[r.pos :].lstrip()):
                self._only_calls, self._marks = False, Markers()
            if self._fresh:
                char = r.text[r.pos :].lstrip()[:1]
                if char and char in self.format.bare:
                    return True
                self._fresh = not char
            found = None if out.full else self._marks.search(r.text, r.pos)
            if found:
                self._emit(_kept(r.text, r.pos, found.start()))
                return True
            if r.ended:
                if not (after_call and r.text[r.pos :].isspace()):
                    self._emit(len(r.text))
                return False
            stop = len(r.text) - (0 if out.full else self._marks.held(r.text, r.pos))
            stop = _kept(r.text, r.pos, stop)
            if stop > r.pos:
                after_call = False
                self._emit(stop)
            yield

    def _may_begin(self, text: str) -> bool:
        """Return True if `text` is, or may become, the beginning of a group of calls."""
        marked = any(mark.startswith(text[: len(mark)]) for mark in self._marks.texts)
        return marked or not text or (self._fresh and text[0] in self.format.bare)

    def _emit(self, stop: int) -> None:
        r = self._cursor
        if stop > r.pos:
            self._out.content(r.text[r.pos : stop])
            r.pos = stop
            r.settle()


def _kept(text: str, start: int, stop: int) -> int:
    """Return where the white space at the end of `text[start:stop]` begins, of which a bounded length is held back."""
    begin = max(start, stop - _MOST_SPACE)
    return begin + len(text[begin:stop].rstrip())
