"""DeepSeek V3 and R1: the name, then its arguments in a block of JSON."""

from __future__ import annotations

import re

from tokenmill.text.reader import Reading, TextCursor, expect, peek, spaces, take, word
from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._headed_style import HeadedStyle

BEGIN, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
SECTION, SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_NAME = re.compile(r"[^<\n]+")


def matches(template: str) -> bool:
    """Return True for templates that write arguments in a block."""
    return SECTION in template and "```json" in template


def read_head(r: TextCursor) -> Reading[tuple[str, str | None]]:
    """Read function, separator, name and ```json; or, since V3.1, name and separator."""
    first = yield from word(r, _NAME)
    yield from expect(r, SEPARATOR)
    yield from spaces(r)
    if first.strip() != "function" or (yield from peek(r)) in ("{", '"'):
        return first.strip(), None
    name = yield from word(r, _NAME)
    yield from spaces(r)
    yield from take(r, "```json", "```")
    return name.strip(), None


FORMAT = Calls(
    name="deepseek",
    matches=matches,
    aliases=("deepseek_v3", "deepseekv3", "deepseek_r1", "deepseekr1"),
    style=HeadedStyle(
        head=read_head,
        written=f"function{SEPARATOR}{{name}}\n```json\n",
        tail=f"\n```{END}",
        tails=("```", END),
    ),
    opening=f"{SECTION}{BEGIN}",
    between=f"\n{BEGIN}",
    closing=SECTION_END,
    trigger=BEGIN,
    starts=(SECTION, BEGIN),
    ends=(SECTION_END,),
    extra=(SEPARATOR, END),
)
