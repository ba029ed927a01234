"""Granite 3: <|tool_call|> and a list of JSON objects; Granite 20B function calling: <function_call> and an object."""

from __future__ import annotations

from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._json_style import JsonStyle


def matches(template: str) -> bool:
    """Return True for IBM's templates before Granite 4, which has Hermes' format."""
    if "<|/tool" in template or "<tool_call>" in template:
        return False
    return any(sign in template for sign in ("<|tool_call|>", "<function_call>", "<|function_call_library|>"))


FORMAT = Calls(
    name="granite",
    matches=matches,
    style=JsonStyle(),
    aliases=("granite-20b-fc", "granite_20b_fc", "granite3"),
    opening="<|tool_call|>[",
    between=", ",
    closing="]",
    trigger="<|tool_call|>",
    starts=("<|tool_call|>", "<tool_call>", "<function_call>"),
    ends=("</tool_call>",),
)
