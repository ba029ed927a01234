"""Earlier messages are brought into one form, whatever client wrote them."""

from __future__ import annotations

from typing import Any

import pytest

from tokenmill.text.history import normalized

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def one(**message: Any) -> dict[str, Any]:
    (made,) = normalized([{"role": "assistant", **message}])
    assert made.pop("role") == "assistant"
    return made


def test_fields_that_are_null_are_not_there() -> None:
    nothing = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls", "name", "reasoning"))
    assert one(content="Hi", **nothing) == one(content="Hi", tool_calls=[]) == {"content": "Hi"}
    assert one(content=None, tool_calls=[CALL]) == {"content": None, "tool_calls": [CALL]}


@pytest.mark.parametrize("content", [None, "", [{"type": "refusal", "refusal": "No."}]])
def test_a_refusal_is_text(content: Any) -> None:
    told = one(content=content, refusal="No.")["content"]
    assert told == ([{"type": "text", "text": "No."}] if content else "No.")
    assert one(content="Well", refusal="No.")["content"] == "Well"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_a_thought_has_each_of_its_names(name: str) -> None:
    both = {"reasoning": "Hm", "reasoning_content": "Hm"}
    assert one(content="Hi", **{name: "Hm"}) == {"content": "Hi", **both}
    assert one(content=None, **{name: "Hm"}) == {"content": "", **both}
    assert one(content=None, tool_calls=[CALL], **{name: "Hm"}) == {"content": None, "tool_calls": [CALL], **both}
    other = {"role": "user", "content": "Hi", name: "Hm"}
    assert normalized([other]) == [other]


def test_calls_are_without_what_sdks_add() -> None:
    function = {**CALL["function"], "parsed_arguments": {}}  # type: ignore[dict-item]
    dumped = {"index": 0, "id": "1", "function": function, "extra": None}
    assert one(content="", tool_calls=[dumped]) == {"content": "", "tool_calls": [CALL]}
    assert "parsed_arguments" in function
