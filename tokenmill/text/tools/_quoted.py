"""Reads texts in quotes as Python writes them."""

from __future__ import annotations

import re

from tokenmill.text.reader import NOTHING, Broken, Emit, Reading, TextCursor, ahead, peek, take

_PLAIN = {'"': re.compile(r'[^"\\\n]*'), "'": re.compile(r"[^'\\\n]*")}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0", "/": "/",
            "\\": "\\", "'": "'", '"': '"', "\n": ""}  # fmt: skip
_HEX = {"x": 2, "u": 4, "U": 8}
QUOTES = frozenset(_PLAIN)


def quoted_text(r: TextCursor, emit: Emit, behind: tuple[str, ...]) -> Reading[None]:
    """Read a text, its quotes included, and emit its characters. It ends at a quote with one of `behind` after it;
    other quotes are part of it. A line break inside, which Python forbids, is part of it, too."""
    quote = yield from ahead(r, '"""', "'''", '""', "''", *QUOTES, skipped=NOTHING)
    if not quote:
        raise Broken
    if len(quote) == 2:
        if (yield from ahead(r, *behind, offset=2)) is not None:
            r.pos += 2
            return
        quote = quote[0]  # a text that begins with one
    r.pos += len(quote)
    plain = _PLAIN[quote[0]]
    while True:
        found = plain.match(r.text, r.pos)
        assert found is not None
        if found.group():
            emit(found.group())
            r.pos = found.end()
        char = yield from peek(r)
        if not char:
            raise Broken
        if char == "\\":
            r.pos += 1
            emit((yield from _escaped(r)))
        elif char == quote[0] and (yield from _closes(r, quote, behind)):
            r.pos += len(quote)
            return
        elif char in (quote[0], "\n"):
            emit(char)
            r.pos += 1


def _closes(r: TextCursor, quote: str, behind: tuple[str, ...]) -> Reading[bool]:
    """Return True if a text ends here."""
    if not (yield from ahead(r, quote, skipped=NOTHING)):
        return False
    return (yield from ahead(r, *behind, offset=len(quote))) is not None


def _escaped(r: TextCursor) -> Reading[str]:
    """Read the rest of an escape behind its backslash. A pair of surrogates is one character."""
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


def _hex(r: TextCursor, size: int) -> Reading[int]:
    while len(r.text) - r.pos < size:
        if r.ended:
            raise Broken
        yield
    digits = r.text[r.pos : r.pos + size]
    if not re.fullmatch(r"[0-9a-fA-F]+", digits):
        raise Broken
    r.pos += size
    return int(digits, 16)
