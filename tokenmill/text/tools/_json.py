"""Reads JSON that comes in pieces, and emits it as it is read.

Invariant: the emitted text is the beginning of valid JSON at any time. Models write more than JSON, and it is read as
they mean it: a control character inside of a string; unless the reading is exact, also Python's words and strings in
single quotes, a comma behind the last item, and an outer bracket or a mark of the format where closing brackets are
missing.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tokenmill.text.reader import Broken, Emit, Reading, TextCursor, ahead, collected, peek, spaces
from tokenmill.text.tools._quoted import quoted_text

_SPACES = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_ATOM = re.compile(r"[-+.0-9A-Za-z]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_WORDS = {"True": "true", "False": "false", "None": "null"}
_HEX4 = re.compile(r"[0-9a-fA-F]{4}")
_ESCAPES = frozenset('"\\/bfnrt')
_CLOSES = {"{": "}", "[": "]"}
_BEHIND = (",", ":", "}", "]")  # texts that follow a string
_MOST_DEPTH = 200
_MOST_ATOM = 1000
_MOST_ENCODED = 4  # nested strings

# States: the part that may come next.
_VALUE, _FIRST, _KEY, _COLON, _AFTER = range(5)

EXACT: tuple[str, ...] = ()


def json_value(r: TextCursor, emit: Emit, marks: tuple[str, ...] = EXACT) -> Reading[None]:
    """Read one JSON value, without white space around it. `marks`: texts that close open brackets; with EXACT, only
    JSON is read. Raises Broken."""
    yield from _Value(r, emit, marks).read()


class _Value:
    """Reader of one value. `_stack`: the open brackets."""

    def __init__(self, r: TextCursor, emit: Emit, marks: tuple[str, ...]) -> None:
        self._r, self._emit, self._marks = r, emit, marks
        self._stack: list[str] = []

    def read(self) -> Reading[None]:
        """Read the value, part by part."""
        state = _VALUE
        while self._stack or state is not _AFTER:
            if self._stack:
                yield from _white(self._r, self._emit)
            char = yield from peek(self._r)
            if not char:
                raise Broken
            if state is _FIRST and char == _CLOSES[self._stack[-1]]:
                state = self._close()
            elif state is _KEY or (state is _FIRST and self._stack[-1] == "{"):
                state = yield from self._key(char)
            elif state is _COLON:
                state = self._structure(char, ":", _VALUE)
            elif state is _AFTER:
                state = yield from self._after(char)
            else:
                state = yield from self._begin(char)

    def _structure(self, char: str, expected: str, following: int) -> int:
        if char != expected:
            raise Broken
        self._emit(char)
        self._r.pos += 1
        self._r.check()
        return following

    def _close(self) -> int:
        closing = _CLOSES[self._stack.pop()]
        return self._structure(closing, closing, _AFTER)

    def _begin(self, char: str) -> Reading[int]:
        """Read a value, or its beginning."""
        if char in _CLOSES:
            if len(self._stack) >= _MOST_DEPTH:
                raise Broken
            self._stack.append(char)
            return self._structure(char, char, _FIRST)
        if char == '"' or (char == "'" and self._marks):
            yield from json_string(self._r, self._emit, self._marks)
        else:
            yield from self._atom()
        return _AFTER

    def _key(self, char: str) -> Reading[int]:
        if char != '"' and not (char == "'" and self._marks):
            raise Broken
        yield from json_string(self._r, self._emit, self._marks)
        return _COLON

    def _after(self, char: str) -> Reading[int]:
        """Read the text behind an item."""
        if char == _CLOSES[self._stack[-1]]:
            return self._close()
        if char == ",":
            following = _KEY if self._stack[-1] == "{" else _VALUE
            if not self._marks:
                return self._structure(char, ",", following)
            return (yield from self._comma(following))
        outer = next((opening for opening in set(self._stack) if _CLOSES[opening] == char), "")
        if not self._marks or not (outer or (yield from ahead(self._r, *self._marks))):
            raise Broken
        while self._stack and self._stack[-1] != outer:  # missing brackets
            self._emit(_CLOSES[self._stack.pop()])
        return self._close() if outer else _AFTER

    def _comma(self, following: int) -> Reading[int]:
        """Read a comma, which is not emitted if nothing follows it."""
        self._r.pos += 1
        white, _ = yield from collected(lambda emit: _white(self._r, emit))
        if (yield from peek(self._r)) == _CLOSES[self._stack[-1]]:
            self._emit(white)
            return self._close()
        self._emit("," + white)
        self._r.check()
        return following

    def _atom(self) -> Reading[None]:
        """Read a number, true, false or null."""
        r = self._r
        while True:
            found = _ATOM.match(r.text, r.pos)
            assert found is not None
            if len(found.group()) > _MOST_ATOM:
                raise Broken
            if found.end() < len(r.text) or r.ended:
                break
            yield
        text = found.group()
        if self._marks:
            text = _WORDS.get(text, text)
        if text not in ("true", "false", "null") and not _NUMBER.fullmatch(text):
            raise Broken
        self._emit(text)
        r.pos = found.end()


def _white(r: TextCursor, emit: Emit) -> Reading[None]:
    """Read white space between a value's parts, and emit it unchanged."""
    while True:
        found = _SPACES.match(r.text, r.pos)
        assert found is not None
        if found.end() > r.pos:
            emit(found.group())
            r.pos = found.end()
        if r.pos < len(r.text) or r.ended:
            return
        yield


def json_string(r: TextCursor, emit: Emit, marks: tuple[str, ...] = EXACT) -> Reading[None]:
    """Read a string, its quotes included, and emit it as JSON. `marks`: see `json_value`."""
    if r.text[r.pos] == "'":
        assert marks
        emit('"')
        yield from quoted_text(r, lambda piece: emit(json.dumps(piece, ensure_ascii=False)[1:-1]), (*_BEHIND, *marks))
        emit('"')
        return
    begun = 1  # the opening quote is emitted with what follows
    while True:
        found = _PLAIN.match(r.text, r.pos + begun)
        assert found is not None
        stop = found.end()
        if stop < len(r.text) and r.text[stop] == '"':
            emit(r.text[r.pos : stop + 1])
            r.pos = stop + 1
            return
        if stop > r.pos:
            emit(r.text[r.pos : stop])
            r.pos = stop
        begun = 0
        if stop < len(r.text) and r.text[stop] != "\\":
            emit(json.dumps(r.text[stop])[1:-1])
            r.pos += 1
        elif stop < len(r.text):
            yield from _escape(r, emit, marks)
        elif r.ended:
            raise Broken
        else:
            yield


def _escape(r: TextCursor, emit: Emit, marks: tuple[str, ...]) -> Reading[None]:
    """Read a backslash and all that belongs to it."""
    while True:
        length = len(r.text) - r.pos
        second = r.text[r.pos + 1] if length > 1 else ""
        if second == "'" and marks:
            emit("'")
            r.pos += 2
            return
        if second and second in _ESCAPES:
            size = 2
            break
        if second and second != "u":
            raise Broken
        if length >= 6:
            if not _HEX4.match(r.text, r.pos + 2):
                raise Broken
            size = 6
            break
        if r.ended:
            raise Broken
        yield
    emit(r.text[r.pos : r.pos + size])
    r.pos += size


def read_string(r: TextCursor, marks: tuple[str, ...] = EXACT) -> Reading[tuple[str, str]]:
    """Read a string and return its JSON text and its value. Raises Broken if none comes next."""
    char = yield from peek(r)
    if char != '"' and not (char == "'" and marks):
        raise Broken
    text, _ = yield from collected(lambda emit: json_string(r, emit, marks))
    value = json.loads(text)
    assert isinstance(value, str)
    return text, value


def read_arguments(r: TextCursor, emit: Emit, marks: tuple[str, ...] = EXACT) -> Reading[None]:
    """Read an object and emit it. JSON text of an object inside a string is that object; nothing, an empty string, null
    and an empty list are an empty one."""
    yield from spaces(r)
    char = yield from peek(r)
    if char == "{":
        yield from json_value(r, emit, marks)
    elif marks and (yield from ahead(r, *marks)):
        emit("{}")
    elif char in ('"', "'"):
        emit(object_text((yield from read_string(r, marks))[1]))
    else:
        text, _ = yield from collected(lambda parts: json_value(r, parts, marks))
        if text not in ("null", "[]"):
            raise Broken
        emit("{}")


def object_text(text: str, depth: int = 0) -> str:
    """Return `text`, if it is JSON of an object that can be sent. Raises Broken. As lenient as `read_arguments`."""
    text = text.strip()
    if not text:
        return "{}"
    try:
        value = loads(text)
    except Broken:
        text = _reread(text)
        value = loads(text)
    if isinstance(value, str) and depth < _MOST_ENCODED:
        return object_text(value, depth + 1)
    if value is None or value == []:
        return "{}"
    if not isinstance(value, dict):
        raise Broken
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Broken from None
    return text


def _reread(text: str) -> str:
    """Return the JSON of a value that was not written exactly. Raises Broken."""
    r, parts = TextCursor(), list[str]()
    r.feed(text)
    r.ended = True
    for _ in json_value(r, parts.append, ("\0",)):
        raise AssertionError("it is all there")
    if r.pos < len(text):
        raise Broken
    return "".join(parts)


def loads(text: str) -> Any:
    """Return the value of JSON text. Raises Broken if it is not JSON, also for NaN, Infinity, and too deep or long
    values."""

    def refuse(name: str) -> Any:
        raise ValueError(name)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise Broken from None
