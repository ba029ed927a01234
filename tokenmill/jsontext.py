"""Explain why a text is not JSON, and where, independently of the library that refused it."""

from __future__ import annotations

import re

MAX_TOKENS = 20_000
"""Limit of tokens that are scanned, some milliseconds, so that a message costs no more than reading the body."""

_STRING = rb'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+"'
_NUMBER = rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?![0-9.eE])"
_WORD = rb"(?:true|false|null)(?![A-Za-z0-9_])"
_TOKEN = re.compile(rb"(?P<value>" + b"|".join((_STRING, _NUMBER, _WORD)) + rb")|[][{}:,]")
_SPACE = re.compile(rb"[ \t\r\n]*")
_INSIDE = re.compile(_STRING[:-1])
_ESCAPE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\(?:(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)"
)
_BARE = re.compile(r"[A-Za-z0-9_.+-]{1,20}|.", re.DOTALL)
_MARK = b"\xef\xbb\xbf"

_VALUE, _KEY, _COLON, _REST, _END = "a value", "a key in double quotes", "`:`", "`,`", "the end"


def fault(text: bytes, most: int = MAX_TOKENS) -> str:
    """Describe the first fault of `text` as JSON in UTF-8; "" for valid JSON.

    Returns a clause without a full stop, with line and column from 1. `most`: limit of tokens that are scanned; for a
    fault beyond it, the clause has only the position.
    """
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return f"it is not UTF-8: byte 0x{text[error.start]:02x} {_place(text, error.start)}"
    if text.startswith(_MARK):
        return "it begins with a byte order mark; send UTF-8 without one"
    if not text.strip(b" \t\r\n"):
        return "it is empty"
    return _syntax(text, most)


def _syntax(text: bytes, most: int) -> str:
    open_: list[bytes] = []
    wanted, or_closed, at = _VALUE, False, 0
    for _ in range(most):
        at = _after_space(text, at)
        found = _TOKEN.match(text, at)
        token = found[0] if found else b""
        closing = bool(open_) and token == (b"}" if open_[-1] == b"{" else b"]")
        if closing and (or_closed or wanted == _REST):
            open_.pop()
            wanted, or_closed = _REST if open_ else _END, False
        elif wanted == _VALUE and token in (b"{", b"["):
            open_.append(token)
            wanted, or_closed = _KEY if token == b"{" else _VALUE, True
        elif found and found["value"] and (wanted == _VALUE or (wanted == _KEY and token[:1] == b'"')):
            if (half := _half_at(token)) is not None:
                return f"half of a surrogate pair {_place(text, at + half)}"
            wanted, or_closed = (_COLON if wanted == _KEY else _REST if open_ else _END), False
        elif wanted == _COLON and token == b":":
            wanted = _VALUE
        elif wanted == _REST and token == b",":
            wanted = _KEY if open_[-1] == b"{" else _VALUE
        elif wanted == _END and at == len(text):
            return ""
        else:
            return _unexpected(text, at, _expected(wanted, or_closed, open_))
        at += len(token)
    return f"it is malformed behind {_place(text, at)[3:]}"


def _expected(wanted: str, or_closed: bool, open_: list[bytes]) -> str:
    """Describe the tokens that are allowed next."""
    if wanted == _REST or or_closed:
        return f"{wanted} or `{'}' if open_[-1] == b'{' else ']'}`"
    return wanted


def _unexpected(text: bytes, at: int, expected: str) -> str:
    if at == len(text):
        return f"it ends early, where {expected} is expected, {_place(text, at)}"
    if text[at : at + 1] == b'"' and not _TOKEN.match(text, at):
        return _broken_string(text, at)
    given = _BARE.match(text[at : at + 80].decode(errors="ignore"))
    shown = repr(given[0])[1:-1] if given else ""
    return f"{expected} is expected, not `{shown}`, {_place(text, at)}"


def _broken_string(text: bytes, begin: int) -> str:
    found = _INSIDE.match(text, begin)
    at = found.end() if found else begin
    if at >= len(text):
        return f"it ends early, inside of the text that begins {_place(text, begin)}"
    if text[at : at + 1] == b"\\":
        return f"a backslash that begins no escape of JSON's, {_place(text, at)}"
    return f"a control character, which is to be written as \\u{text[at]:04x}, {_place(text, at)}"


def _half_at(token: bytes) -> int | None:
    """Return the position of half a surrogate pair in a string; None if there is none."""
    escapes = _ESCAPE.finditer(token) if b"\\u" in token else ()
    return next((found.start() for found in escapes if found["half"]), None)


def _after_space(text: bytes, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _place(text: bytes, at: int) -> str:
    """Format line and column, counted in characters."""
    begin = text.rfind(b"\n", 0, at) + 1
    column = len(text[begin:at].decode(errors="replace")) + 1
    line = text.count(b"\n", 0, at) + 1
    return f"at line {line} column {column}"
