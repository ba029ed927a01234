"""Qwen3-Coder: <function=name> and a <parameter=key> tag for each argument."""

from __future__ import annotations

from tokenmill.text.tools._xml import XmlCalls


def matches(template: str) -> bool:
    """True for templates with such tags."""
    return "<function=" in template and "<parameter=" in template


FORMAT = XmlCalls(
    name="qwen3_coder",
    matches=matches,
    aliases=("qwen3_xml", "qwen3coder", "nemotron_v3", "step3p5"),
    begin="<tool_call>",
    head="<function=",
    head_end=">",
    key="<parameter=",
    key_end=">",
    value="",
    value_end="</parameter>",
    body_end="</function>",
    end="</tool_call>",
    lines=True,
)
