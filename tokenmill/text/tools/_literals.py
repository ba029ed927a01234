"""Reads literals that are written nearly as JSON, and emits JSON."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from tokenmill.text.reader import Broken, Emit, Reading, TextCursor, expect, peek, spaces, take, word
from tokenmill.text.tools._values import inside, number

_NUMBER = re.compile(r"[-+.\w]+")
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_MOST_DEPTH = 40


class Literals(ABC):
    """Way of writing literals. `lists`: the brackets around items. A comma may follow the last item."""

    lists: ClassVar[dict[str, str]] = {"[": "]"}

    @abstractmethod
    def begins_text(self, char: str) -> bool:
        """Return True if a text begins with this character."""

    @abstractmethod
    def text(self, r: TextCursor, emit: Emit, behind: tuple[str, ...]) -> Reading[None]:
        """Read a text, its quotes included, and emit its characters. A closing quote has one of `behind` after it;
        without that it is part of the text."""

    @abstractmethod
    def key(self, r: TextCursor, emit: Emit) -> Reading[None]:
        """Read the key of an entry and emit it as JSON."""

    def literal(self, r: TextCursor, emit: Emit, depth: int = 0) -> Reading[None]:
        """Read any literal. Raises Broken."""
        char = yield from peek(r)
        if depth > _MOST_DEPTH:
            raise Broken
        if char and self.begins_text(char):
            yield from self.quoted(r, emit)
        elif char in self.lists:
            yield from _separated(r, emit, self.lists[char], "[]", lambda: self.literal(r, emit, depth + 1))
        elif char == "{":
            yield from self.entries(r, emit, depth)
        else:
            found = yield from word(r, _NUMBER)
            emit(_WORDS[found] if found in _WORDS else number(found))

    def quoted(self, r: TextCursor, emit: Emit, behind: tuple[str, ...] = (",", ")", "]", "}")) -> Reading[None]:
        """Read a text and emit it as JSON. `behind`: see `text`."""
        emit('"')
        yield from self.text(r, lambda piece: emit(inside(piece)), behind)
        emit('"')

    def entries(self, r: TextCursor, emit: Emit, depth: int = 0) -> Reading[None]:
        """Read keys and values between braces, of which the first comes next."""

        def entry() -> Reading[None]:
            yield from self.key(r, emit)
            yield from spaces(r)
            yield from expect(r, ":")
            emit(": ")
            yield from spaces(r)
            yield from self.literal(r, emit, depth + 1)

        yield from _separated(r, emit, "}", "{}", entry)


def _separated(r: TextCursor, emit: Emit, close: str, brackets: str, one: Callable[[], Reading[None]]) -> Reading[None]:
    """Read items with `one`, between a bracket that comes next and `close`."""
    r.pos += 1
    r.check()
    emit(brackets[0])
    yield from spaces(r)
    first = True
    while not (yield from take(r, close)):
        if not first:
            yield from expect(r, ",")
            yield from spaces(r)
            if (yield from take(r, close)):
                break
            emit(", ")
        first = False
        yield from one()
        yield from spaces(r)
        if (yield from peek(r)) in (",", close):
            r.check()
    emit(brackets[1])
