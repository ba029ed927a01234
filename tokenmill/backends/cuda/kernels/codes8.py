"""Codes of 8-bit floats, read as 16-bit elements of two, as float16 operands of tensor cores.

The instructions that bring whole tiles to tensor cores exist for elements of 16 bits, not of 8. So pairs of codes
travel as int16 elements and become numbers in registers, by moving bits alone, two elements at a time. Number i of a
row is in element i // 2: slice 0 holds the even numbers of a row, slice 1 the odd ones.
"""

import triton
import triton.language as tl


@triton.jit
def numbers(elements, SLICE: tl.constexpr, CODES: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr):
    """Return cached elements as numbers of KIND: with CODES slice SLICE of int16 elements. Exact.

    CODES: "e4m3", whose numbers are returned over 256, as its bias is 7 and that of float16 15; "e5m2"; or "": the
    elements are numbers. ASM: False under the interpreter.
    """
    if CODES == "":
        return elements.to(KIND)
    elif CODES == "e4m3":
        return _of_e4m3(elements, SLICE, ASM).to(KIND)
    else:
        return _of_e5m2(elements, SLICE, ASM).to(KIND)


@triton.jit
def _of_e4m3(elements, SLICE: tl.constexpr, ASM: tl.constexpr):
    """Move sign, exponent and mantissa to their places in float16: bits 15, 13–10 and 9–7."""
    if ASM:
        if SLICE == 0:
            return tl.inline_asm_elementwise(
                "{.reg .b32 sign, rest; shl.b32 rest, $1, 7; shl.b32 sign, $1, 8; and.b32 rest, rest, 0x3f803f80; "
                "lop3.b32 $0, sign, 0x80008000, rest, 0xEA;}",
                "=r,r", [elements], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "{.reg .b32 rest; shr.u32 rest, $1, 1; and.b32 rest, rest, 0x3f803f80; "
                "lop3.b32 $0, $1, 0x80008000, rest, 0xEA;}",
                "=r,r", [elements], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
    elif SLICE == 0:
        return (((elements << 8) & -32768) | ((elements << 7) & 0x3F80)).to(tl.float16, bitcast=True)
    else:
        return ((elements & -32768) | ((elements >> 1) & 0x3F80)).to(tl.float16, bitcast=True)


@triton.jit
def _of_e5m2(elements, SLICE: tl.constexpr, ASM: tl.constexpr):
    """Move a code to the upper byte: e5m2 is float16 without the last eight bits."""
    if ASM:
        if SLICE == 0:
            return tl.inline_asm_elementwise(
                "{.reg .b32 code; shl.b32 code, $1, 8; and.b32 $0, code, 0xff00ff00;}",
                "=r,r", [elements], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "and.b32 $0, $1, 0xff00ff00;", "=r,r", [elements], dtype=tl.float16, is_pure=True, pack=2
            )
    elif SLICE == 0:
        return (elements << 8).to(tl.float16, bitcast=True)
    else:
        return (elements & -256).to(tl.float16, bitcast=True)
