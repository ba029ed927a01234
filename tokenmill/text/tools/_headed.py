"""Calls whose name stands before their JSON arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tokenmill.text.tools._jsoncalls import random_id, tell_arguments
from tokenmill.text.tools._lark import Choice, Frame, Lark, Tool, grammar, held_schema, name_of
from tokenmill.text.tools._output import Output
from tokenmill.text.tools._reader import Reader, Reading, expect, spaces, take


@dataclass(frozen=True)
class HeadedCalls:
    """The spec of a format. `head` reads from behind `begin` up to the arguments and gives a name and, if the model
    chooses it, an id. `written`: what the model is made to write for a head, with {name} in it, and {index} for a
    number; `tail` follows the arguments. `section` and `section_ends` go around all calls; `extra`: markers inside of
    heads."""

    name: str
    matches: Callable[[str], bool]
    head: Callable[[Reader], Reading[tuple[str, str | None]]]
    begin: str
    written: str
    tail: str = ""
    tails: tuple[str, ...] = ()  # what is understood behind the arguments, in this order, each optional
    section: str = ""
    section_ends: tuple[str, ...] = ()
    between: str = ""
    aliases: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    bare: str = ""
    new_id: Callable[[], str] = field(default=random_id)
    own_loop: bool = False

    @cached_property
    def starts(self) -> tuple[str, ...]:
        """The section's begin, or a call's."""
        return tuple(text for text in (self.section, self.begin) if text)

    @cached_property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens."""
        return (*self.starts, *self.section_ends, *self.tails, *self.extra)

    @property
    def trigger(self) -> str:
        """The first call's begin."""
        return self.begin

    def read(self, r: Reader, out: Output) -> Reading[None]:
        """A section's begin, calls, the section's end; calls without a section are understood as well."""
        yield from spaces(r)
        if self.section:
            yield from take(r, self.section)
            yield from spaces(r)
        yield from expect(r, self.begin)
        yield from self.read_calls(r, out)

    def read_calls(self, r: Reader, out: Output) -> Reading[None]:
        """What follows the first call's begin."""
        while True:
            yield from spaces(r)
            name, call_id = yield from self.head(r)
            yield from tell_arguments(r, out, out.check(name), call_id)
            for tail in self.tails:
                yield from spaces(r)
                yield from take(r, tail)
            yield from spaces(r)
            if not (yield from take(r, self.begin)):
                break
        if self.section_ends:
            yield from take(r, *self.section_ends)

    def grammar(
        self, tools: Sequence[Tool], choice: Choice, parallel: bool, special_ids: Mapping[str, int] | None = None
    ) -> tuple[str, str]:
        """See ToolFormat."""
        between = f"{self.between}{self.begin}"
        frame = Frame(self.section + self.begin, between, "".join(self.section_ends[:1]), self.begin)
        return grammar(frame, self._write, tools, choice, parallel, special_ids)

    def _write(self, lark: Lark, rule: str, tool: Tool, choice: str) -> str:
        before, index, after = self.written.replace("{name}", name_of(tool)).partition("{index}")
        head = lark.text(before)
        if index:
            head += f" {lark.rule('INDEX', '/[0-9]{1,3}/')} {lark.text(after)}"
        return f"{head} {lark.json(f'{rule}_arguments', held_schema(tool, choice))} {lark.text(self.tail)}".rstrip()
