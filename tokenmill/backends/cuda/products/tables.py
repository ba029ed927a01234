"""Look-up of 16 numbers by codes of 4 bits, in PTX: no loads, the numbers are constants of the instructions."""

from __future__ import annotations

from functools import cache

import torch

from tokenmill.quant.formats import FORMATS

_HALF_OF_CODES = """
shr.u32 m, s, 3;
and.b32 s, s, 0x7777;
and.b32 m, m, 0x1111;
prmt.b32 m, 0x0000ff00, 0, m;
prmt.b32 a, {0}, {1}, s;
prmt.b32 b, {2}, {3}, s;
lop3.b32 l, m, b, a, 0xCA;
prmt.b32 a, {4}, {5}, s;
prmt.b32 b, {6}, {7}, s;
lop3.b32 h, m, b, a, 0xCA;
prmt.b32 {out0}, l, h, 0x5140;
prmt.b32 {out1}, l, h, 0x7362;
"""
"""Four codes at a time choose low and high bytes among the first eight numbers and the last eight; bit 3 of a code
chooses between the two. Low and high bytes are then put together."""


@cache
def lookup(name: str, half: bool) -> str:
    """Return PTX that makes the numbers of a format's codes, four registers of two, of a register of paired elements.

    `half`: float16, else bfloat16, rounded.
    """
    table = FORMATS[name].table
    assert table is not None
    assert len(table) == 16
    numbers = torch.from_numpy(table).to(torch.float16 if half else torch.bfloat16).view(torch.int16).tolist()
    bytes_of = [[number >> at & 255 for number in numbers] for at in (0, 8)]
    words = [_word(part[i : i + 4]) for part in bytes_of for i in (0, 4, 8, 12)]
    first = _HALF_OF_CODES.format(*words, out0="$0", out1="$1")
    second = _HALF_OF_CODES.format(*words, out0="$2", out1="$3")
    text = f"{{ .reg .b32 s, t, m, a, b, l, h; mov.b32 s, $4; shr.u32 t, $4, 16; {first} mov.b32 s, t; {second} }}"
    return text.replace("\n", " ")


def _word(numbers: list[int]) -> str:
    return f"0x{sum(number << 8 * i for i, number in enumerate(numbers)):08X}"
