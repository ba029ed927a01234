"""Llama 3.1, 3.2 and 3.3: {"name": …, "parameters": …}, alone or behind <|python_tag|>."""

from __future__ import annotations

from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._json_style import JsonStyle


def matches(template: str) -> bool:
    """Return True for templates that ask for a function's name and parameters as JSON."""
    asked = '{"name": function name, "parameters":' in template.replace('\\"', '"')
    return "[func_name1(" not in template and ("<|python_tag|>" in template or asked)


FORMAT = Calls(
    name="llama",
    matches=matches,
    style=JsonStyle(arguments_keys=("parameters", "arguments"), separators=(";", ",")),
    aliases=("llama3", "llama3_json", "llama4_json", "llama_json"),
    opening="",
    between="; ",
    starts=("<|python_tag|>",),
    bare="{[",
)
