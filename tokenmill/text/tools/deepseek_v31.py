"""DeepSeek V3.1 and V3.2-Exp: a name, a separator, its arguments."""

from __future__ import annotations

from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._headed_style import HeadedStyle
from tokenmill.text.tools.deepseek import BEGIN, END, SECTION, SECTION_END, SEPARATOR, read_head


def matches(template: str) -> bool:
    """Return True for templates that write arguments without a block."""
    return SECTION in template and "```json" not in template


FORMAT = Calls(
    name="deepseek_v31",
    matches=matches,
    aliases=("deepseekv31", "deepseek_v3_1"),
    style=HeadedStyle(head=read_head, written=f"{{name}}{SEPARATOR}", tail=END, tails=("```", END)),
    opening=f"{SECTION}{BEGIN}",
    between=BEGIN,
    closing=SECTION_END,
    trigger=BEGIN,
    starts=(SECTION, BEGIN),
    ends=(SECTION_END,),
    extra=(SEPARATOR, END),
)
