"""GLM 4.5 and later: a name, then an <arg_key> and an <arg_value> tag for each argument."""

from __future__ import annotations

from tokenmill.text.tools._xml import XmlCalls


def matches(template: str) -> bool:
    """True for templates with such tags."""
    return "<arg_key>" in template


FORMAT = XmlCalls(
    name="glm",
    matches=matches,
    aliases=("glm4", "glm45", "glm47", "glm4_moe"),
    begin="<tool_call>",
    head="",
    head_end="\n",
    key="<arg_key>",
    key_end="</arg_key>",
    value="<arg_value>",
    value_end="</arg_value>",
    body_end="",
    end="</tool_call>",
    lines=False,
)
