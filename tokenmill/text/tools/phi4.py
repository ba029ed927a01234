"""Phi-4-mini: a list of JSON objects between <|tool_call|> tags, or behind the word functools."""

from __future__ import annotations

from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._json_style import JsonStyle


def matches(template: str) -> bool:
    """Return True for templates with Phi's tags for tools, or with the word."""
    return any(sign in template for sign in ("<|/tool|>", "<|/tool_call|>", "functools["))


FORMAT = Calls(
    name="phi4",
    matches=matches,
    style=JsonStyle(),
    aliases=("phi4_mini_json", "phi4_mini", "phi-4"),
    opening="<|tool_call|>[",
    between=", ",
    closing="]<|/tool_call|>",
    trigger="<|tool_call|>",
    starts=("<|tool_call|>", "functools"),
    ends=("<|/tool_call|>",),
)
