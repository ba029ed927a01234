"""Errors in JSON text: the same texts are refused as by msgspec, with our message, at the right position."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.jsontext import fault

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
MARKS = st.sampled_from([b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"\\u", b"\\ud83d", b"\\udc00", b"0",
                         b"-", b".", b"e", b"1", b"\n", b"\t", b" ", b"true", b"nul", b"NaN", b"\xff", b"\xc3",
                         b"\0"])  # fmt: skip


def is_json(text: bytes) -> bool:
    """Return True if msgspec accepts the text; Python decides for strings with invalid bytes, which msgspec skips."""
    try:
        text.decode()
        msgspec.json.decode(text)
    except msgspec.ValidationError:  # a number too large for any type
        return True
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


@settings(max_examples=150, deadline=None)
@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_what_is_json_has_no_fault(value: Any, ascii_only: bool, indent: int | None) -> None:
    assert fault(json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode(errors="replace")) == ""


@settings(max_examples=400, deadline=None)
@given(VALUES, st.integers(0, 200), st.integers(0, 3), MARKS | st.just(b""))
def test_a_text_that_was_changed_anywhere_has_a_fault_exactly_if_it_is_refused(
    value: Any, at: int, cut: int, mark: bytes
) -> None:
    good = json.dumps(value).encode()
    at = min(at, len(good))
    text = good[:at] + mark + good[at + cut :]
    assert (fault(text) == "") == is_json(text), fault(text)


@pytest.mark.parametrize(
    "text, told",
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"\xef\xbb\xbf{}", "it begins with a byte order mark; send UTF-8 without one"),
        (b'{"a":"\xff"}', "it is not UTF-8: byte 0xff at line 1 column 7"),
        (b'{"a": 1,}', "a key in double quotes is expected, not `}`, at line 1 column 9"),
        (b"{'a': 1}", "a key in double quotes or `}` is expected, not `'`, at line 1 column 2"),
        (b'{"a": NaN}', "a value is expected, not `NaN`, at line 1 column 7"),
        (b'{"a" 1}', "`:` is expected, not `1`, at line 1 column 6"),
        (b"[1 2]", "`,` or `]` is expected, not `2`, at line 1 column 4"),
        (b'{"a":1} x', "the end is expected, not `x`, at line 1 column 9"),
        (b'{"a":01}', "a value is expected, not `01`, at line 1 column 6"),
        (b"[1,", "it ends early, where a value is expected, at line 1 column 4"),
        (b'{"a": "x', "it ends early, inside of the text that begins at line 1 column 7"),
        (b'["a\nb"]', "a control character, which is to be written as \\u000a, at line 1 column 4"),
        (b'["\\q"]', "a backslash that begins no escape of JSON's, at line 1 column 3"),
        (b'["\\ud83d\\ude00 \\\\ud800 \\udc00"]', "half of a surrogate pair at line 1 column 24"),
        ('{"ä":\n "üü" x}'.encode(), "`,` or `}` is expected, not `x`, at line 2 column 7"),
    ],
)
def test_reason_and_place_are_told(text: bytes, told: str) -> None:
    assert fault(text) == told


def test_only_so_much_is_looked_at_as_is_allowed() -> None:
    assert fault(b"[1, 2, 3, 4, x", most=4) == "it is malformed behind line 1 column 6"
    assert fault(b"[1, 2, 3, 4, x") == "a value is expected, not `x`, at line 1 column 14"
