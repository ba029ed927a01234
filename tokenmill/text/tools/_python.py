"""Reads calls and literals as Python writes them, and emits JSON."""

from __future__ import annotations

import re
from typing import ClassVar

from tokenmill.text.output import DeltaBuilder
from tokenmill.text.reader import Broken, Emit, Reading, TextCursor, expect, peek, spaces, word
from tokenmill.text.tools._literals import Literals
from tokenmill.text.tools._quoted import QUOTES, quoted_text
from tokenmill.text.tools._values import dumps

_WORD = re.compile(r"[\w.]+")
PRINT = "print"
"""A function that models put around a call, which is its argument."""


def read_call(r: TextCursor, out: DeltaBuilder, known: bool) -> Reading[None]:
    """Read name(key=value, …). The call is emitted once the first key or the closing bracket is there."""
    name = yield from word(r, _WORD)
    yield from spaces(r)
    yield from expect(r, "(")
    yield from spaces(r)
    if name == PRINT and name not in out.schemas:
        yield from read_call(r, out, known)
        yield from spaces(r)
        yield from expect(r, ")")
        return
    out.check(name, known)
    begun = False
    while (yield from peek(r)) != ")":
        if begun:
            yield from expect(r, ",")
            yield from spaces(r)
            if (yield from peek(r)) == ")":
                break
        key = yield from word(r, _WORD)
        yield from spaces(r)
        yield from expect(r, "=")
        r.check()
        if not begun:
            out.call(name)
        out.arguments(f"{', ' if begun else '{'}{dumps(key)}: ")
        begun = True
        yield from spaces(r)
        yield from _LITERALS.literal(r, out.arguments)
        yield from spaces(r)
    r.pos += 1
    if not begun:
        out.call(name)
        out.arguments("{")
    out.arguments("}")
    out.done()
    r.settle()


class _Python(Literals):
    """Literals of Python and of JSON."""

    lists: ClassVar[dict[str, str]] = {"[": "]", "(": ")"}

    def begins_text(self, char: str) -> bool:
        """See Literals."""
        return char in QUOTES

    def key(self, r: TextCursor, emit: Emit) -> Reading[None]:
        """Read a string; other keys of Python are not supported."""
        if (yield from peek(r)) not in QUOTES:
            raise Broken
        yield from self.quoted(r, emit, (":",))

    def text(self, r: TextCursor, emit: Emit, behind: tuple[str, ...]) -> Reading[None]:
        """Read a string in single, double or triple quotes."""
        yield from quoted_text(r, emit, behind)


_LITERALS = _Python()
