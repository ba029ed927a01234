"""Qwen3-Coder: <function=name> and a <parameter=key> tag for each argument."""

from __future__ import annotations

from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._xml_style import XmlStyle


def matches(template: str) -> bool:
    """Return True for templates with such tags, and no others around them."""
    return "<function=" in template and "<parameter=" in template and "<seed:tool_call>" not in template


STYLE = XmlStyle(
    head="<function=",
    head_end=">",
    key="<parameter=",
    key_end=">",
    value_end="</parameter>",
    body_end="</function>",
    lines=True,
)
FORMAT = Calls(
    name="qwen3_coder",
    matches=matches,
    style=STYLE,
    aliases=("qwen3_xml", "qwen3coder", "nemotron_v3", "step3p5"),
    opening="<tool_call>\n<function=",
    between="</tool_call>\n<tool_call>\n<function=",
    closing="</tool_call>",
    trigger="<function=",
    starts=("<tool_call>", "<function="),
    ends=("</tool_call>",),
    extra=("<parameter=", "</parameter>", "</function>"),
)
