"""Text that comes in pieces, and small readers that wait for more of it.

A reader is a generator: it yields when it needs more text, and its value is what it read. So formats are written as if
all text were there, and read the same whatever the pieces are. `TextCursor.pos` returns to 0 when text comes in: never
keep a position across a `yield`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
Emit = Callable[[str], None]

_SPACES = re.compile(r"\s*")
_CLOSING = re.compile(r"[\s}\]]*")
NOTHING = re.compile("")
_MOST_WORD = 512  # characters of a name or a key; longer ones are not a call


class Broken(Exception):
    """The text does not have the expected format. None of it is lost."""


class TextCursor:
    """The text since the last `settle`, with a position: `kept` pieces that were read, then `text`, which is read up to
    `pos`. `checked`: the length of the text that was read before the last `check`."""

    __slots__ = ("_size", "checked", "ended", "kept", "pos", "text")

    def __init__(self) -> None:
        self.text = ""
        self.pos = 0
        self.kept: list[str] = []
        self.ended = False
        self.checked = 0
        self._size = 0  # of `kept`, in characters

    def feed(self, text: str) -> None:
        """Append text."""
        if self.pos:
            self.kept.append(self.text[: self.pos])
            self._size += self.pos
            self.text = self.text[self.pos :] + text
            self.pos = 0
        else:
            self.text += text

    def settle(self) -> None:
        """Discard the text that was read, because it has been emitted."""
        self.kept.clear()
        self._size = self.checked = 0
        if self.pos:
            self.text = self.text[self.pos :]
            self.pos = 0

    def check(self) -> None:
        """Mark a place between two parts of a call: if the next part breaks, reading continues here."""
        self.checked = self._size + self.pos

    def rewind(self) -> None:
        """Return to the last `settle`."""
        if self.kept:
            self.text = "".join(self.kept) + self.text
            self.kept.clear()
            self._size = 0
        self.pos = 0


class Markers:
    """Search for the first of several texts, and for the beginning of one at a text's end."""

    __slots__ = ("_first", "_longest", "_regex", "texts")

    def __init__(self, *texts: str) -> None:
        self.texts = tuple(sorted(texts, key=len, reverse=True))
        self._regex = re.compile("|".join(map(re.escape, self.texts)) if texts else r"(?!)")
        self._first = re.compile("[" + "".join({re.escape(text[0]) for text in texts}) + "]" if texts else r"(?!)")
        self._longest = len(self.texts[0]) if texts else 0

    def search(self, text: str, pos: int) -> re.Match[str] | None:
        """Return the first marker at or behind `pos`."""
        return self._regex.search(text, pos)

    def held(self, text: str, pos: int) -> int:
        """Return the length of the longest tail of `text[pos:]` with which a marker begins."""
        start = max(pos, len(text) - self._longest + 1)
        while found := self._first.search(text, start):
            start = found.start()
            tail = text[start:]
            if any(marker.startswith(tail) for marker in self.texts):
                return len(tail)
            start += 1
        return 0


def peek(r: TextCursor) -> Reading[str]:
    """Return the next character without reading it; "" at the end."""
    while r.pos == len(r.text):
        if r.ended:
            return ""
        yield
    return r.text[r.pos]


def spaces(r: TextCursor) -> Reading[None]:
    """Read white space, if there is any."""
    while True:
        found = _SPACES.match(r.text, r.pos)
        assert found is not None
        r.pos = found.end()
        if r.pos < len(r.text) or r.ended:
            return
        yield


def take(r: TextCursor, *options: str) -> Reading[str]:
    """Read the longest of `options` that comes next, and return it; "" and nothing read if none does."""
    longest = max(map(len, options))
    while True:
        rest = r.text[r.pos : r.pos + longest]
        if r.ended or not any(len(option) > len(rest) and option.startswith(rest) for option in options):
            break
        yield
    found = max((option for option in options if rest.startswith(option)), key=len, default="")
    r.pos += len(found)
    return found


def ahead(r: TextCursor, *options: str, offset: int = 0, skipped: re.Pattern[str] = _SPACES) -> Reading[str | None]:
    """Return the longest of `options` behind `offset` characters and a match of `skipped`, without reading it; None if
    there is none, "" if the answer ends there."""
    longest = max(map(len, options))
    while True:
        found = skipped.match(r.text, r.pos + offset)
        assert found is not None
        rest = r.text[found.end() : found.end() + longest]
        if r.ended or not any(len(option) > len(rest) and option.startswith(rest) for option in options):
            break
        yield
    if not rest:
        return ""
    return max((option for option in options if rest.startswith(option)), key=len, default=None)


def take_end(r: TextCursor, *options: str) -> Reading[None]:
    """Read white space and one of `options`, if it comes next, or the part of one with which the answer ends."""
    yield from spaces(r)
    found = yield from take(r, *options)
    rest = r.text[r.pos :]
    if not found and rest and any(option.startswith(rest) for option in options):
        r.pos = len(r.text)


def expect(r: TextCursor, *options: str) -> Reading[str]:
    """Read one of `options`. Raises Broken if none comes next."""
    found = yield from take(r, *options)
    if not found:
        raise Broken
    return found


def surplus(r: TextCursor, marks: tuple[str, ...], brackets: re.Pattern[str] = _CLOSING) -> Reading[None]:
    """Read surplus closing brackets, if one of `marks` follows or the answer is over."""
    if (yield from ahead(r, *marks, skipped=brackets)) is not None:
        found = brackets.match(r.text, r.pos)
        assert found is not None
        r.pos = found.end()


def word(r: TextCursor, pattern: re.Pattern[str]) -> Reading[str]:
    """Read a match of `pattern`, a repeated class of characters. Raises Broken if it is empty or very long."""
    while True:
        found = pattern.match(r.text, r.pos)
        if found is None:
            if r.pos < len(r.text) or r.ended:
                raise Broken
        elif found.end() - r.pos > _MOST_WORD:
            raise Broken
        elif found.end() < len(r.text) or r.ended:
            r.pos = found.end()
            return found.group()
        yield


def before(r: TextCursor, ends: Markers, emit: Emit, *, settles: bool = True) -> Reading[str]:
    """Emit text up to the first of `ends`, which stays, and return that; "" if the text ends before. `settles`: emitted
    text need not be read again."""
    while True:
        found = ends.search(r.text, r.pos)
        stop = found.start() if found else len(r.text) - (0 if r.ended else ends.held(r.text, r.pos))
        if stop > r.pos:
            emit(r.text[r.pos : stop])
            r.pos = stop
        if settles:
            r.settle()
        if found or r.ended:
            return found.group() if found else ""
        yield


def until(r: TextCursor, ends: Markers, emit: Emit) -> Reading[str]:
    """Emit text up to the first of `ends`, read that as well and return it; "" if the text ends before."""
    end = yield from before(r, ends, emit, settles=False)
    r.pos += len(end)
    return end


def collected(reading: Callable[[Emit], Reading[T]]) -> Reading[tuple[str, T]]:
    """Return the text that `reading` emits, joined, and its value."""
    parts: list[str] = []
    value = yield from reading(parts.append)
    return "".join(parts), value


def alternatives(texts: Sequence[str]) -> str:
    """Return a regular expression of plain texts."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
