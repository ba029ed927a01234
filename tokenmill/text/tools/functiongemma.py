"""FunctionGemma: <start_function_call>call:name{key:value}<end_function_call>, strings between <escape> tags."""

from __future__ import annotations

from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._escaped_style import QUOTE, EscapedStyle

_START, _END = "<start_function_call>", "<end_function_call>"


def matches(template: str) -> bool:
    """Return True for templates with its tags."""
    return _START in template


FORMAT = Calls(
    name="functiongemma",
    matches=matches,
    style=EscapedStyle(),
    aliases=("function_gemma",),
    opening=_START,
    between=f"{_END}{_START}",
    closing=_END,
    trigger=_START,
    starts=(_START,),
    ends=(_END,),
    extra=(QUOTE,),
)
