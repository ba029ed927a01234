"""Llama 4, Llama 3.2 at 1B and 3B, ToolACE, OLMo 3: a list of Python calls, [name(key=value), …]."""

from __future__ import annotations

from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._python_style import PythonStyle


def matches(template: str) -> bool:
    """Return True for templates that show such a list."""
    return "[func_name1(" in template or "<|python_start|>" in template


FORMAT = Calls(
    name="pythonic",
    matches=matches,
    style=PythonStyle(),
    aliases=("llama4", "llama4_pythonic", "llama_pythonic", "toolace", "olmo3"),
    opening="[",
    between=", ",
    closing="]",
    starts=("<|python_start|>", "<function_calls>"),
    ends=("<|python_end|>", "</function_calls>"),
    bare="[",
)
