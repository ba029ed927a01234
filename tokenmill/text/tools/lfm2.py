"""LFM2: a list of Python calls between <|tool_call_start|> tags."""

from __future__ import annotations

from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._python_style import PythonStyle


def matches(template: str) -> bool:
    """Return True for templates with such tags."""
    return "<|tool_call_start|>" in template


FORMAT = Calls(
    name="lfm2",
    matches=matches,
    style=PythonStyle(),
    opening="<|tool_call_start|>[",
    between=", ",
    closing="]<|tool_call_end|>",
    trigger="<|tool_call_start|>",
    starts=("<|tool_call_start|>",),
    ends=("<|tool_call_end|>",),
)
