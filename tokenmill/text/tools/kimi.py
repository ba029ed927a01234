"""Kimi K2: an id that contains the function's name, functions.name:0, then its arguments. The ids are kept."""

from __future__ import annotations

import re

from tokenmill.text.reader import Reading, TextCursor, expect, spaces, word
from tokenmill.text.tools._calls import Calls
from tokenmill.text.tools._headed_style import HeadedStyle

_BEGIN, _ARGUMENTS, _END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_SECTION, _SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_ID = re.compile(r"[^<\n]+")


def matches(template: str) -> bool:
    """Return True for Kimi's templates; the first of them show no call, only how tools are declared."""
    return _BEGIN in template or ("tool_declare" in template and "<|im_middle|>" in template)


def read_head(r: TextCursor) -> Reading[tuple[str, str | None]]:
    """Read the id. Its name is the text between "functions." and the number."""
    call_id = (yield from word(r, _ID)).strip()
    yield from expect(r, _ARGUMENTS)
    yield from spaces(r)
    name, colon, number = call_id.rpartition(":")
    return (name if colon and number.isdecimal() else call_id).removeprefix("functions."), call_id


FORMAT = Calls(
    name="kimi",
    matches=matches,
    aliases=("kimi_k2", "kimi-k2"),
    style=HeadedStyle(head=read_head, written=f"functions.{{name}}:{{index}}{_ARGUMENTS}", tail=_END, tails=(_END,)),
    opening=f"{_SECTION}{_BEGIN}",
    between=_BEGIN,
    closing=_SECTION_END,
    trigger=_BEGIN,
    starts=(_SECTION, _BEGIN),
    ends=(_SECTION_END,),
    extra=(_ARGUMENTS, _END),
)
