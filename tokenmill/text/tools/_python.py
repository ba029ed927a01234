"""Reads calls and literals as Python writes them, and emits JSON."""

from __future__ import annotations

import re
from typing import ClassVar

from tokenmill.text.output import Output
from tokenmill.text.reader import Broken, Emit, Reader, Reading, expect, peek, spaces, take, word
from tokenmill.text.tools._literals import Literals
from tokenmill.text.tools._values import dumps

_WORD = re.compile(r"[\w.]+")
_PLAIN = {'"': re.compile(r'[^"\\\n]*'), "'": re.compile(r"[^'\\\n]*")}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0", "/": "/",
            "\\": "\\", "'": "'", '"': '"', "\n": ""}  # fmt: skip
_HEX = {"x": 2, "u": 4, "U": 8}
PRINT = "print"
"""A function that models put around a call: what it prints is the call."""


def read_call(r: Reader, out: Output, known: bool) -> Reading[None]:
    """name(key=value, …). It is told once the first key or the closing bracket is there."""
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
    """Literals of Python, and those of JSON."""

    lists: ClassVar[dict[str, str]] = {"[": "]", "(": ")"}

    def begins_text(self, char: str) -> bool:
        """See Literals."""
        return char in _PLAIN

    def key(self, r: Reader, emit: Emit) -> Reading[None]:
        """A string; Python would take more."""
        if (yield from peek(r)) not in _PLAIN:
            raise Broken
        yield from self.quoted(r, emit)

    def text(self, r: Reader, emit: Emit) -> Reading[None]:
        """A string in single or double quotes. A line break inside, which Python forbids, is taken as one."""
        quote = r.text[r.pos]
        plain = _PLAIN[quote]
        r.pos += 1
        while True:
            found = plain.match(r.text, r.pos)
            assert found is not None
            if found.group():
                emit(found.group())
                r.pos = found.end()
            char = yield from peek(r)
            if char == quote:
                r.pos += 1
                return
            if not char:
                raise Broken
            if char == "\n":
                emit(char)
                r.pos += 1
            elif char == "\\":
                r.pos += 1
                emit((yield from _escaped(r)))


_LITERALS = _Python()


def _escaped(r: Reader) -> Reading[str]:
    """What stands behind a backslash. A pair of surrogates is one character."""
    char = yield from peek(r)
    if not char:
        raise Broken
    r.pos += 1
    if char not in _HEX:
        return _ESCAPES.get(char, "\\" + char)
    code = yield from _hex(r, _HEX[char])
    if 0xD800 <= code < 0xDC00 and (yield from take(r, "\\u")):
        low = yield from _hex(r, 4)
        if not 0xDC00 <= low < 0xE000:
            raise Broken
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise Broken
    return chr(code)


def _hex(r: Reader, size: int) -> Reading[int]:
    while len(r.text) - r.pos < size:
        if r.ended:
            raise Broken
        yield
    digits = r.text[r.pos : r.pos + size]
    if not re.fullmatch(r"[0-9a-fA-F]+", digits):
        raise Broken
    r.pos += size
    return int(digits, 16)
