"""Hermes 2 Pro, Qwen 2.5 and 3, Granite 4 and many others: JSON between <tool_call> tags."""

from __future__ import annotations

from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._json_style import JsonStyle


def matches(template: str) -> bool:
    """Return True for templates whose tags hold JSON."""
    others = ("<function=", "<arg_key>", "<tool_call>[", "xml_tools")
    return "<tool_call>" in template and not any(other in template for other in others)


FORMAT = Calls(
    name="hermes",
    matches=matches,
    style=JsonStyle(),
    aliases=("qwen", "qwen2", "qwen25", "qwen3", "granite4", "openpangu"),
    opening="<tool_call>\n",
    between="\n</tool_call>\n<tool_call>\n",
    closing="\n</tool_call>",
    trigger="<tool_call>",
    starts=("<tool_call>",),
    ends=("</tool_call>",),
)
