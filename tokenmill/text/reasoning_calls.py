"""Finds the calls that a model makes inside of a thought which it has not closed: they end it.

A thought may mention calls, and even write a mark of one. So text is a call only if it is a whole call of a given
function; without a mark, only at the beginning of a line and if nothing but calls follows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tokenmill.text.machine import Held, Machine
from tokenmill.text.reader import Markers, Reading, TextCursor
from tokenmill.text.tools.base import ToolFormat


class CallFinder:
    """Finder of calls in the thought of one answer. `held`: see `new_router`. `starts`: marks of calls."""

    def __init__(self, form: ToolFormat, schemas: Mapping[str, Any], held: Held) -> None:
        self._form, self._schemas, self._held = form, schemas, held
        self.starts = form.held_starts if held else form.starts
        bare = "".join(map(re.escape, form.bare))
        self._line = re.compile(rf"\n[ \t]{{0,16}}(?P<begin>[{bare}])" if bare else r"(?!)")

    def begins(self, char: str) -> bool:
        """Return True if a call without a mark may begin with this character."""
        return bool(char) and char in self._form.bare

    def search(self, marks: Markers, text: str, pos: int) -> tuple[int, str] | None:
        """Return the place and text of the first mark, or of the first beginning of a call without one."""
        mark, line = marks.search(text, pos), self._line.search(text, pos)
        if line is not None and (mark is None or line.start("begin") < mark.start()):
            return line.start("begin"), line["begin"]
        return (mark.start(), mark.group()) if mark is not None else None

    def calls(self, r: TextCursor, at: int) -> Reading[bool]:
        """Return True if a call begins at a place of the text, without reading it. A call that the end of the answer
        cuts off counts if it has a mark and a name."""
        marked = bool(self.starts) and r.text.startswith(self.starts, at)
        machine = Machine(self._form, self._schemas, lambda: "", None, self._held)
        known = broken = False
        while True:
            while at < len(r.text) and not broken:
                delta = machine.push(r.text[at])  # character by character, because the first result decides
                at += 1
                known = known or any(call.name in self._schemas for call in delta.calls)
                broken = bool(delta.content or delta.broken)
                if marked and machine.complete:
                    return known
            if broken:
                return False
            if r.ended:
                last = machine.finish()
                known = known or any(call.name in self._schemas for call in last.calls)
                return known and (marked or machine.complete > 0)
            yield
