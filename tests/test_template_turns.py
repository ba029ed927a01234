"""Turns of a conversation are split into turns that a template supports."""

from __future__ import annotations

from typing import Any

from tokenmill.text.template_turns import apart, one_by_one, results_as_user

A: Any = {"id": "a", "function": {"name": "f"}}
B: Any = {"id": "b", "function": {"name": "g"}}
USER = {"role": "user", "content": "hi"}


def asked(*calls: Any, content: Any = "So") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(call_id: str, content: Any = "x") -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def test_each_call_stands_alone_before_its_own_results() -> None:
    lost = result("c")
    made = one_by_one([USER, asked(A, B), result("b"), lost, result("a"), USER])
    assert made == [USER, asked(A), result("a"), asked(B, content=""), result("b"), lost, USER]
    assert one_by_one([USER, asked(A, B, content=None)]) == [USER, asked(A, content=None), asked(B, content=None)]
    assert one_by_one([asked(A), result("a")]) == [asked(A), result("a")]


def test_a_text_before_calls_becomes_a_message_of_its_own() -> None:
    made = apart([USER, asked(A), asked(B, content="")], None)
    assert made == [USER, {"role": "assistant", "content": "So"}, asked(A, content=None), asked(B, content=None)]
    assert apart([asked(A)], "")[1] == asked(A, content="")


def test_results_are_told_by_the_user_in_turns_that_alternate() -> None:
    answer = {"role": "assistant", "content": "So"}
    made = results_as_user([USER, answer, result("a", "1"), result("b", "2"), USER, answer, USER, USER])
    assert made == [USER, answer, {"role": "user", "content": "1\n2\nhi"}, answer, USER, USER]
    parts = [{"type": "text", "text": "1"}]
    (both,) = results_as_user([result("a", parts), result("b", "2")])
    assert [part["text"] for part in both["content"]] == ["1", "\n", "2"]
    assert parts == [{"type": "text", "text": "1"}]
