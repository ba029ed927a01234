"""DeepSeek V3.1 and V3.2-Exp: a name, a separator, its arguments."""

from __future__ import annotations

from tokenmill.text.tools._headed import HeadedCalls
from tokenmill.text.tools.deepseek import BEGIN, END, SECTION, SECTION_END, SEPARATOR, read_head


def matches(template: str) -> bool:
    """True for templates that write arguments without a block."""
    return SECTION in template and "```json" not in template


FORMAT = HeadedCalls(
    name="deepseek_v31",
    matches=matches,
    aliases=("deepseekv31", "deepseek_v3_1"),
    head=read_head,
    section=SECTION,
    begin=BEGIN,
    written=f"{{name}}{SEPARATOR}",
    tail=END,
    tails=("```", END),
    section_ends=(SECTION_END,),
    extra=(SEPARATOR,),
)
