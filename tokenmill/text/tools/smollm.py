"""SmolLM2 and SmolLM3: JSON between <tool_call> tags, SmolLM2's as a list of all calls."""

from __future__ import annotations

from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._json_style import JsonStyle


def matches(template: str) -> bool:
    """True for SmolLM3's template, and for prompts that ask for a list in the tags."""
    return "<tool_call>[" in template or ("xml_tools" in template and "<tool_call>" in template)


FORMAT = Calls(
    name="smollm",
    matches=matches,
    style=JsonStyle(),
    aliases=("smollm2", "smollm3"),
    opening="<tool_call>\n",
    between="\n</tool_call>\n<tool_call>\n",
    closing="\n</tool_call>",
    trigger="<tool_call>",
    starts=("<tool_call>",),
    ends=("</tool_call>",),
)
