"""Gemma 2 and 3, which were trained without a format: Python calls in a ```tool_code block, or in a list."""

from __future__ import annotations

from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._python_style import PythonStyle


def matches(template: str) -> bool:
    """Return True for templates that mention tool_code."""
    return "tool_code" in template


FORMAT = Calls(
    name="gemma",
    matches=matches,
    style=PythonStyle(),
    aliases=("gemma2", "gemma3"),
    opening="```tool_code\n",
    between="\n",
    closing="\n```",
    trigger="```tool_code",
    starts=("```tool_code",),
    ends=("```",),
    bare="[",
)
