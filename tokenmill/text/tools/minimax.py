"""MiniMax M2: <invoke name="…"> and a <parameter name="…"> tag for each argument, all between two tags."""

from __future__ import annotations

from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._xml_style import XmlStyle

_BEGIN, _END, _HEAD = "<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="'


def matches(template: str) -> bool:
    """Return True for templates with such tags."""
    return _BEGIN in template


FORMAT = Calls(
    name="minimax",
    matches=matches,
    style=XmlStyle(
        head=_HEAD,
        head_end='">',
        key='<parameter name="',
        key_end='">',
        value_end="</parameter>",
        body_end="</invoke>",
    ),
    aliases=("minimax_m2", "minimax-m2"),
    opening=f"{_BEGIN}\n{_HEAD}",
    between=_HEAD,
    closing=_END,
    trigger=_HEAD,
    starts=(_BEGIN, _HEAD),
    ends=(_END,),
)
