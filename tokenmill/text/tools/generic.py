"""Any other model: an object with name and arguments, or a list of them, as the whole answer or in a block."""

from __future__ import annotations

from tokenmill.text.tools._jsoncalls import JsonCalls


def matches(template: str) -> bool:
    """True for no template: it is what is left when nothing else matches."""
    return False


FORMAT = JsonCalls(
    name="generic",
    matches=matches,
    aliases=("json", "jamba", "xlam", "internlm"),
    opening="",
    between=", ",
    closing="",
    trigger="",
    starts=("<tool_call>", "<tool_calls>", "```json"),
    ends=("</tool_call>", "</tool_calls>", "```"),
    separators=(",", ";"),
    bare="{[",
    known=True,
)
