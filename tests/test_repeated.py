"""Repeated keys are detected at any depth, and nothing else is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.repeated import Repeated, repeated_key

NAMES = st.sampled_from(["a", "b", "é", 'q"', "\\", ":", "", "{"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(VALUES, st.booleans())
def test_what_an_encoder_writes_repeats_no_key(value: Any, plain: bool) -> None:
    assert repeated_key(json.dumps(value, ensure_ascii=plain, indent=None if plain else 1)) is None


@settings(max_examples=150, deadline=None)
@given(VALUES, st.data())
def test_a_key_that_is_added_again_is_found_where_it_is(value: Any, data: st.DataObject) -> None:
    """An object at any depth gets one of its keys again, in another spelling."""
    objects = list(_objects(value, ()))
    if not objects:
        return
    steps, chosen = data.draw(st.sampled_from(objects))
    key = data.draw(st.sampled_from(sorted(chosen)))
    spelled = '"' + "".join(f"\\u{ord(letter):04x}" for letter in key) + '"'
    text = _written(value, chosen, f"{spelled}: [1, {{}}], ")
    assert repeated_key(text) == Repeated(key, steps)


def _objects(value: Any, steps: tuple[str | int, ...]) -> Any:
    if isinstance(value, dict) and value:
        yield steps, value
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _objects(child, (*steps, key))


def _written(value: Any, chosen: Any, more: str) -> str:
    """Return JSON text with `more` at the beginning of the object `chosen`."""
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_written(child, chosen, more)}" for key, child in value.items()]
        return "{" + (more if value is chosen else "") + ", ".join(parts) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_written(child, chosen, more) for child in value) + "]"
    return json.dumps(value)


def test_the_outermost_repeated_key_is_named() -> None:
    assert repeated_key('{"a": {"x": 1, "x": 2}, "b": 1, "b": 2}') == Repeated("b", ())


def test_numbers_of_any_length_are_read() -> None:
    assert repeated_key('{"a": ' + "9" * 10_000 + ', "b": 1e99999, "a": 0}') == Repeated("a", ())


def test_what_is_no_json_or_too_deep_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 1"):
        repeated_key('{"a"}')
    with pytest.raises(RecursionError):
        repeated_key('{"a":' * 100_000)
