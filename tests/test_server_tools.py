"""Tools of a chat: what a request may say, what the template gets, and how calls come back, streamed and plain."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from tokenmill.errors import ToolError, ValidationError
from tokenmill.server.routes.chat_tools import newer, tools_of, with_tool_prompt, written_out
from tokenmill.server.schema.openai import ChatRequest

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["location"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
TOOLS: list[dict[str, Any]] = [WEATHER, TIME]
USER = [{"role": "user", "content": "hi"}]


def asked(**fields: Any) -> ChatRequest:
    return msgspec.convert({"messages": USER, **fields}, ChatRequest)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", "")),
        ("auto", ("auto", "")),
        ("none", ("none", "")),
        ("required", ("required", "")),
        ("get_time", ("function", "get_time")),
        ({"type": "function", "function": {"name": "get_time"}}, ("function", "get_time")),
        ({"function": {"name": "get_time"}}, ("function", "get_time")),
    ],
)
def test_a_choice_is_a_mode_or_a_function(choice: Any, expected: tuple[str, str]) -> None:
    tools = tools_of(asked(tools=TOOLS, tool_choice=choice))
    assert tools is not None
    assert (tools.choice, tools.name) == expected
    names = {"none": [], "function": ["get_time"]}.get(tools.choice, ["get_weather", "get_time"])
    assert [tool["function"]["name"] for tool in tools.allowed] == names
    assert tools.given == TOOLS


def test_no_tools_are_none_whatever_else_is_said() -> None:
    for fields in ({}, {"tools": []}, {"tools": None, "tool_choice": "none"}, {"tool_choice": "auto"},
                   {"functions": []}, {"function_call": "none"}, {"parallel_tool_calls": True}):  # fmt: skip
        assert tools_of(asked(**fields)) is None


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": TOOLS, "tool_choice": "nothing"}, "tool_choice", "Tool with name nothing not found"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice",
         "Tool with name x not found"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "`name`"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "allowed_tools"),
        ({"tool_choice": "required"}, "tool_choice", "only allowed with `tools`"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "only allowed with `tools`"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0]", "`function`"),
        ({"tools": [WEATHER, {"type": "web", "function": {"name": "x"}}]}, "tools[1]", "'web'"),
        ({"tools": [WEATHER, {"function": {"name": ""}}]}, "tools[1]", "1 to 256 characters"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1]", "two functions named 'get_weather'"),
        ({"tools": [{"function": {"name": "x", "parameters": []}}]}, "tools[0]", "JSON schema"),
        ({"tools": [{"function": {"name": "x", "description": 1}}]}, "tools[0]", "description"),
        ({"tools": [{"function": {"name": "x", "strict": "yes"}}]}, "tools[0]", "strict"),
        ({"tools": [{"function": {"name": f"f{i}"}} for i in range(129)]}, "tools", "up to 128"),
        ({"functions": [{"name": "a"}], "tools": TOOLS}, "functions", "older form"),
        ({"functions": [{"name": "a"}], "function_call": {"name": "b"}}, "function_call", "Tool with name b not found"),
        ({"functions": [{"name": "a"}], "function_call": "a"}, "function_call", "'auto', 'none'"),
        ({"function_call": {"name": "b"}}, "function_call", "only allowed with `functions`"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_by_name(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("[", r"\[")) as caught:
        tools_of(asked(**fields))
    assert caught.value.param == param


def test_unknown_functions_have_tgis_type_of_error() -> None:
    with pytest.raises(ToolError):
        tools_of(asked(tools=TOOLS, tool_choice="x"))


def test_tgis_name_of_the_parameters_is_understood() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    tools = tools_of(asked(tools=[{"type": "function", "function": {"name": "f", "arguments": schema}}]))
    assert tools is not None
    assert tools.given == [{"type": "function", "function": {"name": "f", "parameters": schema}}]


def test_a_template_without_tools_is_told_of_them_behind_the_last_message() -> None:
    tools = tools_of(asked(tools=TOOLS))
    assert tools is not None
    (message,) = with_tool_prompt(USER, tools, None, template_knows=False)
    content, _, told = message["content"].partition("\n---\n")
    assert content == "hi"
    listed, _, prompt = told.partition("\n")
    assert json.loads(listed) == TOOLS
    assert '"parameters"' in prompt
    (message,) = with_tool_prompt(USER, tools, "Call one.", template_knows=False)
    assert message["content"].endswith("]\nCall one.")
    assert USER == [{"role": "user", "content": "hi"}]


def test_a_template_with_tools_gets_only_a_prompt_that_was_asked_for() -> None:
    tools = tools_of(asked(tools=TOOLS))
    assert tools is not None
    assert with_tool_prompt(USER, tools, None, template_knows=True) == USER
    assert with_tool_prompt(USER, tools, "", template_knows=True) == USER
    (message,) = with_tool_prompt(USER, tools, "Call one.", template_knows=True)
    assert message["content"] == "hi\n---\nCall one."


def test_the_prompt_goes_behind_what_the_assistant_has_not_written() -> None:
    tools = tools_of(asked(tools=TOOLS))
    assert tools is not None
    parts = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    begun = {"role": "assistant", "content": "So"}
    first, second = with_tool_prompt([parts, begun], tools, "Call.", template_knows=True)
    assert first["content"] == [{"type": "text", "text": "hi"}, {"type": "text", "text": "\n---\nCall."}]
    assert second == begun
    assert with_tool_prompt([begun], tools, "Call.", template_knows=True) == [begun]


def test_messages_of_the_older_form_become_newer_ones() -> None:
    old = [
        *USER,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "42"},
    ]
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert newer(old) == [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "f", "content": "42", "tool_call_id": "call_1"},
    ]


def test_calls_become_text_where_a_template_knows_none() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
    broken = {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{"}}
    said = {"role": "assistant", "content": "So:", "tool_calls": [call, broken]}
    (message,) = written_out([said])
    assert message == {
        "role": "assistant",
        "content": 'So:\n{"name": "f", "parameters": {"a": "é"}}\n{"name": "g", "parameters": "{"}',
    }
