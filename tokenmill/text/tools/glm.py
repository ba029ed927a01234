"""GLM 4.5 and later: a name, then an <arg_key> and an <arg_value> tag for each argument."""

from __future__ import annotations

from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._xml_style import XmlStyle


def matches(template: str) -> bool:
    """Return True for templates with such tags."""
    return "<arg_key>" in template


FORMAT = Calls(
    name="glm",
    matches=matches,
    aliases=("glm4", "glm45", "glm47", "glm4_moe"),
    style=XmlStyle(
        key="<arg_key>",
        key_end="</arg_key>",
        value="<arg_value>",
        value_end="</arg_value>",
    ),
    opening="<tool_call>",
    between="</tool_call>\n<tool_call>",
    closing="</tool_call>",
    trigger="<tool_call>",
    starts=("<tool_call>",),
    ends=("</tool_call>",),
    extra=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
