"""Numbers of packed codes, two at a time in a register: slices of tiles of 16-bit elements (`products/layout.py`).

Weights become operands of tensor cores where they are, so all is done with the bits of 16-bit floats. A code put under
the mantissa of 128 in bfloat16 (1024 in float16) is a number: 128 + code. Codes that are floats are moved to the places
of sign, exponent and mantissa; the difference of the exponents' biases is a power of two, multiplied afterwards.

ASM: in PTX, of which Triton would make more instructions; without, the same in Triton's language, for its interpreter.
Sums and products of bfloat16 are `fma` with ±1 and -0, the only such instruction before compute capability 9.0.
HALF: float16, else bfloat16. Triton compiles what stands behind a `return` in a constant branch, hence if and else.
"""

import triton
import triton.language as tl


@triton.jit
def two(w, text: tl.constexpr, HALF: tl.constexpr):
    """Apply PTX to two elements of int16 in a register; the results are two 16-bit floats."""
    if HALF:
        return tl.inline_asm_elementwise(text, "=r,r", [w], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(text, "=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def minus(a, b, HALF: tl.constexpr, ASM: tl.constexpr):
    """Return a - b of 16-bit floats."""
    if not ASM:
        return (a.to(tl.float32) - b.to(tl.float32)).to(a.dtype)
    elif HALF:
        return tl.inline_asm_elementwise(
            "sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            "{.reg .b32 c; mov.b32 c, 0xbf80bf80; fma.rn.bf16x2 $0, $2, c, $1;}", "=r,r,r", [a, b], dtype=tl.bfloat16,
            is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def times(a, b, HALF: tl.constexpr, ASM: tl.constexpr):
    """Return a · b of 16-bit floats."""
    if not ASM:
        return (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype)
    elif HALF:
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            "{.reg .b32 c; mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, $1, $2, c;}", "=r,r,r", [a, b], dtype=tl.bfloat16,
            is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def times_plus(a, b, c, HALF: tl.constexpr, ASM: tl.constexpr):
    """Return a · b + c of 16-bit floats, rounded once."""
    if not ASM:
        return (a.to(tl.float32) * b.to(tl.float32) + c.to(tl.float32)).to(a.dtype)
    elif HALF:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def sixteen(bits, HALF: tl.constexpr):
    """Return the 16-bit float of these bits (int32)."""
    if HALF:
        return bits.to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def alike(a, number: tl.constexpr):
    """Return a tile as `a`, full of a number."""
    return tl.full(a.shape, number, tl.float32).to(a.dtype)


@triton.jit
def int4_slice(w, J: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """Return 128 + code (1024 + code) of slice J: a shift and an and-or for two weights."""
    if not ASM:
        return sixteen(((w.to(tl.int32) >> (4 * J)) & 15) | (0x6400 if HALF else 0x4300), HALF)
    elif HALF:
        if J == 0:
            return two(w, "lop3.b32 $0, $1, 0x000f000f, 0x64006400, 0xEA;", True)
        elif J == 1:
            return two(w, "{.reg .b32 t; shr.u32 t, $1, 4; lop3.b32 $0, t, 0x000f000f, 0x64006400, 0xEA;}", True)
        elif J == 2:
            return two(w, "{.reg .b32 t; shr.u32 t, $1, 8; lop3.b32 $0, t, 0x000f000f, 0x64006400, 0xEA;}", True)
        else:
            return two(w, "{.reg .b32 t; shr.u32 t, $1, 12; lop3.b32 $0, t, 0x000f000f, 0x64006400, 0xEA;}", True)
    else:
        if J == 0:
            return two(w, "lop3.b32 $0, $1, 0x000f000f, 0x43004300, 0xEA;", False)
        elif J == 1:
            return two(w, "{.reg .b32 t; shr.u32 t, $1, 4; lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xEA;}", False)
        elif J == 2:
            return two(w, "{.reg .b32 t; shr.u32 t, $1, 8; lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xEA;}", False)
        else:
            return two(w, "{.reg .b32 t; shr.u32 t, $1, 12; lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xEA;}", False)


@triton.jit
def int8_slice(w, J: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """Return the int8 code of slice J, exactly.

    In bfloat16, 7 bits have room over 128: (128 + low bits) - 128 is a code without sign, (128 + low bits) - 256 one
    with, so 128 with the sign as the last bit of its exponent is subtracted. In float16: 1024 + code + 128, less 1152.
    """
    if not ASM:
        value = ((((w.to(tl.int32) >> (8 * J)) & 255) ^ 128) - 128).to(tl.float32)
        return value.to(tl.float16 if HALF else tl.bfloat16)
    elif HALF:
        if J == 0:
            return two(w, "{.reg .b32 a, c; lop3.b32 a, $1, 0x00ff00ff, 0x64806480, 0x6A; mov.b32 c, 0x64806480;"
                          " sub.rn.f16x2 $0, a, c;}", True)  # fmt: skip
        else:
            return two(w, "{.reg .b32 a, c, t; shr.u32 t, $1, 8; lop3.b32 a, t, 0x00ff00ff, 0x64806480, 0x6A;"
                          " mov.b32 c, 0x64806480; sub.rn.f16x2 $0, a, c;}", True)  # fmt: skip
    else:
        if J == 0:
            return two(w, "{.reg .b32 a, b, c; lop3.b32 a, $1, 0x007f007f, 0x43004300, 0xEA; mov.b32 c, 0xbf80bf80;"
                          " lop3.b32 b, $1, 0x00800080, 0x43004300, 0xEA; fma.rn.bf16x2 $0, b, c, a;}",
                       False)  # fmt: skip
        else:
            return two(w, "{.reg .b32 a, b, c, t; shr.u32 t, $1, 8; lop3.b32 a, t, 0x007f007f, 0x43004300, 0xEA;"
                          " mov.b32 c, 0xbf80bf80; lop3.b32 b, t, 0x00800080, 0x43004300, 0xEA;"
                          " fma.rn.bf16x2 $0, b, c, a;}", False)  # fmt: skip


@triton.jit
def e2m1_slice(w, J: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """Return e2m1 of slice J times 2^-126 (2^-14): its three bits of size are the exponent's last two and the first of
    the mantissa, so codes that are subnormal are subnormal here, too."""
    if not ASM:
        code = (w.to(tl.int32) >> (4 * J)) & 15
        return sixteen(((code & 8) << 12) | ((code & 7) << (9 if HALF else 6)), HALF)
    elif HALF:
        if J == 0:
            return two(w, "{.reg .b32 s, t; shl.b32 s, $1, 12; shl.b32 t, $1, 9; and.b32 t, t, 0x0e000e00;"
                          " lop3.b32 $0, s, 0x80008000, t, 0xEA;}", True)  # fmt: skip
        elif J == 1:
            return two(w, "{.reg .b32 s, t; shl.b32 s, $1, 8; shl.b32 t, $1, 5; and.b32 t, t, 0x0e000e00;"
                          " lop3.b32 $0, s, 0x80008000, t, 0xEA;}", True)  # fmt: skip
        elif J == 2:
            return two(w, "{.reg .b32 s, t; shl.b32 s, $1, 4; shl.b32 t, $1, 1; and.b32 t, t, 0x0e000e00;"
                          " lop3.b32 $0, s, 0x80008000, t, 0xEA;}", True)  # fmt: skip
        else:
            return two(w, "{.reg .b32 t; shr.u32 t, $1, 3; and.b32 t, t, 0x0e000e00;"
                          " lop3.b32 $0, $1, 0x80008000, t, 0xEA;}", True)  # fmt: skip
    else:
        if J == 0:
            return two(w, "{.reg .b32 s, t; shl.b32 s, $1, 12; shl.b32 t, $1, 6; and.b32 t, t, 0x01c001c0;"
                          " lop3.b32 $0, s, 0x80008000, t, 0xEA;}", False)  # fmt: skip
        elif J == 1:
            return two(w, "{.reg .b32 s, t; shl.b32 s, $1, 8; shl.b32 t, $1, 2; and.b32 t, t, 0x01c001c0;"
                          " lop3.b32 $0, s, 0x80008000, t, 0xEA;}", False)  # fmt: skip
        elif J == 2:
            return two(w, "{.reg .b32 s, t; shl.b32 s, $1, 4; shr.u32 t, $1, 2; and.b32 t, t, 0x01c001c0;"
                          " lop3.b32 $0, s, 0x80008000, t, 0xEA;}", False)  # fmt: skip
        else:
            return two(w, "{.reg .b32 t; shr.u32 t, $1, 6; and.b32 t, t, 0x01c001c0;"
                          " lop3.b32 $0, $1, 0x80008000, t, 0xEA;}", False)  # fmt: skip


@triton.jit
def e4m3_slice(w, J: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """Return e4m3 of slice J times 2^-120 (2^-8). The codes of NaN become ± 480."""
    if not ASM:
        code = (w.to(tl.int32) >> (8 * J)) & 255
        return sixteen(((code & 128) << 8) | ((code & 127) << (7 if HALF else 4)), HALF)
    elif HALF:
        if J == 0:
            return two(w, "{.reg .b32 s, t; shl.b32 s, $1, 8; shl.b32 t, $1, 7; and.b32 t, t, 0x3f803f80;"
                          " lop3.b32 $0, s, 0x80008000, t, 0xEA;}", True)  # fmt: skip
        else:
            return two(w, "{.reg .b32 t; shr.u32 t, $1, 1; and.b32 t, t, 0x3f803f80;"
                          " lop3.b32 $0, $1, 0x80008000, t, 0xEA;}", True)  # fmt: skip
    else:
        if J == 0:
            return two(w, "{.reg .b32 s, t; shl.b32 s, $1, 8; shl.b32 t, $1, 4; and.b32 t, t, 0x07f007f0;"
                          " lop3.b32 $0, s, 0x80008000, t, 0xEA;}", False)  # fmt: skip
        else:
            return two(w, "{.reg .b32 t; shr.u32 t, $1, 4; and.b32 t, t, 0x07f007f0;"
                          " lop3.b32 $0, $1, 0x80008000, t, 0xEA;}", False)  # fmt: skip


@triton.jit
def e5m2_slice(w, J: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """Return e5m2 of slice J times 2^-112; in float16, whose first byte it is, itself."""
    if not ASM:
        code = (w.to(tl.int32) >> (8 * J)) & 255
        if HALF:
            return sixteen(code << 8, True)
        else:
            return sixteen(((code & 128) << 8) | ((code & 127) << 5), False)
    elif HALF:
        if J == 0:
            return two(w, "{.reg .b32 t; shl.b32 t, $1, 8; and.b32 $0, t, 0xff00ff00;}", True)
        else:
            return two(w, "and.b32 $0, $1, 0xff00ff00;", True)
    else:
        if J == 0:
            return two(w, "{.reg .b32 s, t; shl.b32 s, $1, 8; shl.b32 t, $1, 5; and.b32 t, t, 0x0fe00fe0;"
                          " lop3.b32 $0, s, 0x80008000, t, 0xEA;}", False)  # fmt: skip
        else:
            return two(w, "{.reg .b32 t; shr.u32 t, $1, 3; and.b32 t, t, 0x0fe00fe0;"
                          " lop3.b32 $0, $1, 0x80008000, t, 0xEA;}", False)  # fmt: skip


@triton.jit
def table_slices(w, table_ptr, TEXT: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """Return the numbers of all four slices of paired elements. TEXT: `products.tables.lookup` of the table."""
    if ASM:
        if HALF:
            return tl.inline_asm_elementwise(
                TEXT, "=r,=r,=r,=r,r", [w], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True,
                pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                TEXT, "=r,=r,=r,=r,r", [w], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True,
                pack=2,
            )  # fmt: skip
    else:
        low, high = tl.split(tl.reshape(w, [w.shape[0], w.shape[1] // 2, 2]))
        low = tl.reshape(tl.join(low, low), [w.shape[0], w.shape[1]]).to(tl.int32)
        high = tl.reshape(tl.join(high, high), [w.shape[0], w.shape[1]]).to(tl.int32)
        odd = (tl.arange(0, w.shape[1]) % 2)[None, :] * 4
        kind = tl.float16 if HALF else tl.bfloat16
        a0, a1 = tl.load(table_ptr + ((low >> odd) & 15)), tl.load(table_ptr + ((low >> (odd + 8)) & 15))
        a2, a3 = tl.load(table_ptr + ((high >> odd) & 15)), tl.load(table_ptr + ((high >> (odd + 8)) & 15))
        return a0.to(kind), a1.to(kind), a2.to(kind), a3.to(kind)
