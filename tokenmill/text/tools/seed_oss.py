"""Seed-OSS: Qwen3-Coder's tags between others, values beside theirs."""

from __future__ import annotations

from dataclasses import replace

from tokenmill.text.tools.qwen3_coder import FORMAT as QWEN3_CODER
from tokenmill.text.tools.qwen3_coder import STYLE

_BEGIN, _END = "<seed:tool_call>", "</seed:tool_call>"


def matches(template: str) -> bool:
    """Return True for templates with such tags."""
    return _BEGIN in template


FORMAT = replace(
    QWEN3_CODER,
    name="seed_oss",
    matches=matches,
    style=replace(STYLE, lines=False),
    aliases=("seed",),
    opening=f"{_BEGIN}\n<function=",
    between=f"{_END}\n{_BEGIN}\n<function=",
    closing=_END,
    starts=(_BEGIN, "<function="),
    ends=(_END,),
)
