"""Calls whose name precedes their JSON arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from tokenmill.text.functions import Tool, name_of
from tokenmill.text.lark import Lark
from tokenmill.text.output import DeltaBuilder
from tokenmill.text.reader import Reading, TextCursor, expect, spaces, surplus, take, take_end
from tokenmill.text.tools._calls import Calls, Style
from tokenmill.text.tools._json import EXACT
from tokenmill.text.tools._json_style import emit_call
from tokenmill.text.tools.base import GrammarRequest


@dataclass(frozen=True)
class HeadedStyle(Style):
    """Style with a head, arguments and a tail, behind the format's trigger. `head`: reads up to the arguments and
    returns a name and, if the model chooses it, an id. `written`: the head that the model is made to write, with {name}
    in it, and {index} for a number. `tails`: texts that are understood behind the arguments, in this order, each
    optional."""

    head: Callable[[TextCursor], Reading[tuple[str, str | None]]]
    written: str
    tail: str = ""
    tails: tuple[str, ...] = ()
    has_trigger: ClassVar[bool] = True

    def read(self, form: Calls, r: TextCursor, out: DeltaBuilder) -> Reading[None]:
        """Read the beginning of the calls' section, if there is one, then calls, and the section's end."""
        yield from spaces(r)
        if (yield from expect(r, *form.starts)) != form.trigger:
            yield from spaces(r)
            yield from expect(r, form.trigger)
        yield from self.read_calls(form, r, out)

    def read_calls(self, form: Calls, r: TextCursor, out: DeltaBuilder) -> Reading[None]:
        """Read calls behind the first trigger."""
        marks = EXACT if out.held else (*self.tails, form.trigger, *form.ends)
        while True:
            yield from spaces(r)
            name, call_id = yield from self.head(r)
            yield from emit_call(r, out, out.check(name), call_id, marks)
            if marks:
                yield from surplus(r, marks)
            for tail in self.tails:
                yield from take_end(r, tail)
            r.settle()
            yield from spaces(r)
            if not (yield from take(r, form.trigger)):
                break
        if form.ends:
            yield from take_end(r, *form.ends)

    def write(self, lark: Lark, rule: str, tool: Tool, request: GrammarRequest) -> str:
        """See Style."""
        before, index, after = self.written.replace("{name}", name_of(tool)).partition("{index}")
        head = lark.text(before)
        if index:
            head += f" {lark.rule('INDEX', '/[0-9]{1,3}/')} {lark.text(after)}"
        return f"{head} {lark.json(f'{rule}_arguments', request.schema_of(tool))} {lark.text(self.tail)}".rstrip()
