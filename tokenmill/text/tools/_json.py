"""Reads JSON that comes in pieces, and emits it as it is read.

What is emitted is a beginning of valid JSON at any time. One liberty: a control character inside a string, which models
write and JSON forbids, is emitted as its escape.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tokenmill.text.reader import Broken, Emit, Reader, Reading, collected, spaces

_SPACES = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_ATOM = re.compile(r"[-+.0-9A-Za-z]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_HEX4 = re.compile(r"[0-9a-fA-F]{4}")
_ESCAPES = frozenset('"\\/bfnrt')
_MOST_DEPTH = 200
_MOST_ATOM = 1000

# What may come next
_VALUE, _FIRST, _KEY, _COLON, _AFTER = range(5)


def json_value(r: Reader, emit: Emit) -> Reading[None]:
    """Reads one JSON value, without white space around it. Raises Broken."""
    stack: list[str] = []
    state = _VALUE
    while True:
        if stack:
            yield from _white(r, emit)
        while r.pos == len(r.text):
            if r.ended:
                raise Broken
            yield
        char = r.text[r.pos]
        if state is _FIRST and char == _CLOSES[stack[-1]]:
            emit(char)
            r.pos += 1
            stack.pop()
            state = _AFTER
        elif state is _VALUE or state is _FIRST:
            state = yield from _begin(r, emit, char, stack, state)
        else:
            state = yield from _structure(r, emit, char, stack, state)
        if not stack and state is _AFTER:
            return


_CLOSES = {"{": "}", "[": "]"}


def _white(r: Reader, emit: Emit) -> Reading[None]:
    """White space between a value's parts, emitted as it is."""
    while True:
        found = _SPACES.match(r.text, r.pos)
        assert found is not None
        if found.end() > r.pos:
            emit(found.group())
            r.pos = found.end()
        if r.pos < len(r.text) or r.ended:
            return
        yield


def _begin(r: Reader, emit: Emit, char: str, stack: list[str], state: int) -> Reading[int]:
    """A value, or the key that an object begins with; gives what may come next."""
    if state is _FIRST and stack[-1] == "{":
        return (yield from _structure(r, emit, char, stack, _KEY))
    if char == '"':
        yield from json_string(r, emit)
    elif char in _CLOSES:
        if len(stack) >= _MOST_DEPTH:
            raise Broken
        emit(char)
        r.pos += 1
        stack.append(char)
        return _FIRST
    else:
        yield from _atom(r, emit)
    return _AFTER


def _structure(r: Reader, emit: Emit, char: str, stack: list[str], state: int) -> Reading[int]:
    """A key, a colon, or what follows a value; gives what may come next."""
    if state is _KEY:
        if char != '"':
            raise Broken
        yield from json_string(r, emit)
        return _COLON
    if state is _COLON:
        if char != ":":
            raise Broken
        following = _VALUE
    elif char == ",":
        following = _KEY if stack[-1] == "{" else _VALUE
    elif char == _CLOSES[stack[-1]]:
        stack.pop()
        following = _AFTER
    else:
        raise Broken
    emit(char)
    r.pos += 1
    return following


def json_string(r: Reader, emit: Emit) -> Reading[None]:
    """Reads a string, its quotes included."""
    assert r.text[r.pos] == '"'
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
            yield from _escape(r, emit)
        elif r.ended:
            raise Broken
        else:
            yield


def _escape(r: Reader, emit: Emit) -> Reading[None]:
    """A backslash and what belongs to it, whole."""
    while True:
        length = len(r.text) - r.pos
        second = r.text[r.pos + 1] if length > 1 else ""
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


def _atom(r: Reader, emit: Emit) -> Reading[None]:
    """A number, true, false or null."""
    while True:
        found = _ATOM.match(r.text, r.pos)
        assert found is not None
        if found.end() < len(r.text) or r.ended:
            break
        if len(found.group()) > _MOST_ATOM:
            raise Broken
        yield
    text = found.group()
    if text not in ("true", "false", "null") and not _NUMBER.fullmatch(text):
        raise Broken
    emit(text)
    r.pos = found.end()


def read_string(r: Reader) -> Reading[str]:
    """Reads a string and gives its value; Broken if none comes next."""
    while r.pos == len(r.text):
        if r.ended:
            raise Broken
        yield
    if r.text[r.pos] != '"':
        raise Broken
    text, _ = yield from collected(lambda emit: json_string(r, emit))
    value = json.loads(text)
    assert isinstance(value, str)
    return value


def read_arguments(r: Reader, emit: Emit) -> Reading[None]:
    """Reads an object and emits it. JSON text of an object inside a string is that object; null is an empty one."""
    yield from spaces(r)
    char = r.text[r.pos] if r.pos < len(r.text) else ""
    if char == "{":
        yield from json_value(r, emit)
    elif char == '"':
        emit(object_text((yield from read_string(r))))
    else:
        text, _ = yield from collected(lambda parts: json_value(r, parts))
        if text != "null":
            raise Broken
        emit("{}")


def object_text(text: str) -> str:
    """`text`, if it is JSON of an object that can be sent; else Broken."""
    value = loads(text)
    if not isinstance(value, dict):
        raise Broken
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Broken from None
    return text.strip()


def loads(text: str) -> Any:
    """The value of JSON text; Broken if it is none: NaN, Infinity and what is too deep or long are none as well."""

    def refuse(name: str) -> Any:
        raise ValueError(name)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise Broken from None
