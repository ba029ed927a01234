"""Calls as JSON objects with a name and arguments, alone or in a list, between markers or not."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tokenmill.text.tools._json import json_value, read_arguments, read_string
from tokenmill.text.tools._lark import Choice, Frame, Lark, Tool, grammar, held_schema, name_of, quoted
from tokenmill.text.tools._output import Output
from tokenmill.text.tools._reader import Broken, Reader, Reading, collected, expect, peek, spaces, take

_LETTERS = string.ascii_letters + string.digits


def random_id(length: int = 24, prefix: str = "call_") -> str:
    """A call's id that nobody can guess."""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(length))


@dataclass(frozen=True)
class JsonCalls:
    """The spec of a format: `opening`, `between` and `closing` are what the model is made to write around one call or
    several; `starts` and `ends` all that is understood as well."""

    name: str
    matches: Callable[[str], bool]
    opening: str
    between: str | None
    closing: str
    trigger: str
    starts: tuple[str, ...]
    ends: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    name_keys: tuple[str, ...] = ("name",)
    arguments_keys: tuple[str, ...] = ("arguments", "parameters")
    separators: tuple[str, ...] = (",",)
    bare: str = ""
    known: bool = False  # markers are no proof of a call: only functions that exist are called
    lead: str = ""  # of each object that the model is made to write, before its name; {index}: a number
    new_id: Callable[[], str] = field(default=random_id)
    own_loop: bool = False

    @cached_property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens."""
        return (*self.starts, *self.ends)

    def read(self, r: Reader, out: Output) -> Reading[None]:
        """A marker, calls, an end. Without a marker, only functions that exist are called."""
        yield from spaces(r)
        marked = bool(self.starts) and bool((yield from take(r, *self.starts)))
        yield from self.read_calls(r, out, self.known or not marked)

    def read_calls(self, r: Reader, out: Output, known: bool) -> Reading[None]:
        """What follows the marker. `known`: only functions that exist are called."""
        yield from spaces(r)
        listed = bool((yield from take(r, "[")))
        while True:
            yield from spaces(r)
            yield from self._object(r, out, known)
            yield from spaces(r)
            if not (yield from take(r, *self.separators)):
                break
        if listed:
            yield from expect(r, "]")
            yield from spaces(r)
        if self.ends:
            yield from take(r, *self.ends)

    def _object(self, r: Reader, out: Output, known: bool) -> Reading[None]:
        """One call. Once its arguments are whole it is one, whatever follows."""
        yield from expect(r, "{")
        name: str | None = None
        held: str | None = None
        told = first = False
        while True:
            yield from spaces(r)
            char = yield from peek(r)
            if char == "}":
                r.pos += 1
                break
            if first:
                if told and char != ",":
                    return
                yield from expect(r, ",")
                yield from spaces(r)
            first = True
            key = yield from _key(r)
            if key in self.name_keys and name is None:
                name = out.check((yield from read_string(r)), known)
            elif key not in self.arguments_keys or told or held is not None:
                yield from collected(lambda emit: json_value(r, emit))
            elif name is None:
                held, _ = yield from collected(lambda emit: read_arguments(r, emit))
            else:
                yield from tell_arguments(r, out, name)
                told = True
        if not told:
            if name is None:
                raise Broken
            out.call(name)
            out.arguments("{}" if held is None else held)
            out.done()
            r.settle()

    def grammar(
        self, tools: Sequence[Tool], choice: Choice, parallel: bool, special_ids: Mapping[str, int] | None = None
    ) -> tuple[str, str]:
        """See ToolFormat."""
        frame = Frame(self.opening, self.between, self.closing, self.trigger)
        return grammar(frame, self._write, tools, choice, parallel, special_ids, self.bare)

    def _write(self, lark: Lark, rule: str, tool: Tool, choice: str) -> str:
        before, index, after = self.lead.partition("{index}")
        head = f"{quoted('{' + before)} {lark.rule('INDEX', '/[0-9]{1,3}/')} " if index else ""
        named = f"{quoted(self.name_keys[0])}: {quoted(name_of(tool))}, {quoted(self.arguments_keys[0])}: "
        head += quoted(f"{after if index else '{' + before}{named}")
        return f"{head} {lark.json(f'{rule}_arguments', held_schema(tool, choice))} {quoted('}')}"


def _key(r: Reader) -> Reading[str]:
    key = yield from read_string(r)
    yield from spaces(r)
    yield from expect(r, ":")
    yield from spaces(r)
    return key


def tell_arguments(r: Reader, out: Output, name: str, call_id: str | None = None) -> Reading[None]:
    """Reads JSON arguments and tells a call with them. It begins with their first character."""
    begun = False

    def emit(piece: str) -> None:
        nonlocal begun
        if not begun:
            out.call(name, call_id)
            begun = True
        out.arguments(piece)

    yield from read_arguments(r, emit)
    out.done()
    r.settle()
