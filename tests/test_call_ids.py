"""Ids of tool calls in the form that a template takes."""

from __future__ import annotations

import random
import re
from typing import Any

from tokenmill.text.call_ids import IdForm, renamed


def turn(*ids: str | None, name: str = "f") -> list[dict[str, Any]]:
    """Return a message with calls, and their results."""
    calls = [{"function": {"name": name}, **({"id": one} if one else {})} for one in ids]
    results = [{"role": "tool", "content": "x", **({"tool_call_id": one} if one else {})} for one in ids]
    return [{"role": "assistant", "content": None, "tool_calls": calls}, *results]


def ids_of(messages: list[dict[str, Any]], form: IdForm) -> list[str]:
    """Return the new ids of the calls. Assert that the results have the same ids in the same order."""
    made = renamed(messages, form)
    calls = [call["id"] for message in made for call in message.get("tool_calls", ())]
    assert [message["tool_call_id"] for message in made if message.get("role") == "tool"] == calls
    return calls


def test_short_ids_depend_on_the_old_ones_alone() -> None:
    numbers = random.Random(0)
    known: dict[str, str] = {}
    for _ in range(200):
        old = numbers.sample([f"call_{i}" for i in range(50)], numbers.randrange(1, 6))
        for before, new in zip(old, ids_of([*turn(*old[:2]), *turn(*old[2:])], "short"), strict=True):
            assert re.fullmatch("[a-zA-Z0-9]{9}", new)
            assert known.setdefault(before, new) == new
    assert len(set(known.values())) == len(known)


def test_ids_that_have_the_form_are_kept_and_never_met_by_another() -> None:
    (made,) = ids_of(turn("call_1"), "short")
    assert ids_of(turn("abcdefghi", "call_1"), "short") == ["abcdefghi", made]
    met = ids_of([*turn("call_1"), *turn(made)], "short")
    assert met[1] == made != met[0]
    assert ids_of(turn("functions.f:4", "functions.g:5"), "counted") == ["functions.f:4", "functions.f:1"]


def test_counted_ids_tell_name_and_place_even_where_an_id_comes_again() -> None:
    messages = [*turn("call_0", "call_1", name="f"), *turn("call_0", name="g")]
    assert ids_of(messages, "counted") == ["functions.f:0", "functions.f:1", "functions.g:2"]
    assert ids_of(messages[:3], "counted") == ["functions.f:0", "functions.f:1"]


def test_calls_and_results_without_an_id_belong_together_by_their_order() -> None:
    assert ids_of([*turn(None, None), *turn(None)], "counted") == ["functions.f:0", "functions.f:1", "functions.f:2"]
    assert len(set(ids_of([*turn(None, None), *turn(None)], "short"))) == 3


def test_where_any_id_will_do_nothing_is_touched() -> None:
    messages = turn("call_1", None)
    assert renamed(messages, "any") == messages
    assert renamed([{"role": "tool", "content": "x", "tool_call_id": "lost"}], "short")[0]["tool_call_id"] == "lost"
    assert messages == turn("call_1", None)
