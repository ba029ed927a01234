"""Any other model: an object with name and arguments, or a list of them, as the whole answer or in a block."""

from __future__ import annotations

from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._json_style import JsonStyle


def matches(template: str) -> bool:
    """Return True for no template: this format is used if no other matches."""
    return False


FORMAT = Calls(
    name="generic",
    matches=matches,
    style=JsonStyle(separators=(",", ";")),
    aliases=("json", "jamba", "xlam", "internlm"),
    opening="",
    between=", ",
    starts=("<tool_call>", "<tool_calls>", "```json"),
    ends=("</tool_call>", "</tool_calls>", "```"),
    bare="{[",
    known=True,
)
