"""Products with matrices of e4m3 codes: of codes of x on FP8 tensor cores, and of x in 16 bits (weight-only).

The bytes of a matrix lie row by row, and those of each 128 columns in pairs: column c beside column c + 64. So a pair
is an int16 element of two slices of 64 columns, which become operands of 16-bit tensor cores without a move between
threads, and FP8 tensor cores read the same bytes if the codes of x lie in the same order. KP: columns of a row as
stored, whole 128. Scales: one for each row of the matrix, or with BLOCKED one for each 128 × 128 numbers.

The conversion moves bits: e4m3's seven bits of size, put across the border of exponent and mantissa of a wider float,
are the number times a power of two, subnormals included.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.backends.cuda.kernels.products import finished, gathered, summed


@triton.jit
def halves(w, J: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """Return slice J of int16 pairs of codes as bfloat16, or with HALF as float16, exactly."""
    if not ASM:
        code = (w.to(tl.int32) >> (8 * J)) & 255
        bits = (((code & 128) << 8) | ((code & 127) << (7 if HALF else 4))).to(tl.int16)
        a = bits.to(tl.float16 if HALF else tl.bfloat16, bitcast=True).to(tl.float32) * (256.0 if HALF else 2.0**120)
        return a.to(tl.float16 if HALF else tl.bfloat16)
    elif HALF:
        if J == 0:
            return tl.inline_asm_elementwise(
                "{.reg .b32 s, t, m; shl.b32 s, $1, 8; shl.b32 t, $1, 7; and.b32 t, t, 0x3f803f80;"
                " and.b32 s, s, 0x80008000; or.b32 s, s, t; mov.b32 m, 0x5c005c00; mul.rn.f16x2 $0, s, m;}",
                "=r,r", [w], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "{.reg .b32 s, t, m; shr.u32 t, $1, 1; and.b32 t, t, 0x3f803f80; and.b32 s, $1, 0x80008000;"
                " or.b32 s, s, t; mov.b32 m, 0x5c005c00; mul.rn.f16x2 $0, s, m;}",
                "=r,r", [w], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    else:
        if J == 0:
            return tl.inline_asm_elementwise(
                "{.reg .b32 s, t, m; shl.b32 s, $1, 8; shl.b32 t, $1, 4; and.b32 t, t, 0x07f007f0;"
                " and.b32 s, s, 0x80008000; or.b32 s, s, t; mov.b32 m, 0x7b807b80; mov.b32 t, 0x80008000;"
                " fma.rn.bf16x2 $0, s, m, t;}",
                "=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=2)  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "{.reg .b32 s, t, m; shr.u32 t, $1, 4; and.b32 t, t, 0x07f007f0; and.b32 s, $1, 0x80008000;"
                " or.b32 s, s, t; mov.b32 m, 0x7b807b80; mov.b32 t, 0x80008000;"
                " fma.rn.bf16x2 $0, s, m, t;}",
                "=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=2)  # fmt: skip


@triton.jit
def scaled_tile(sums, ups, scale_ptr, rows, n_ok, N, GATED: tl.constexpr):
    """Return sums (BN, …) times the scales of their rows, and `ups` times those of rows N further."""
    sums *= tl.load(scale_ptr + rows, mask=n_ok, other=0.0)
    if GATED:
        ups *= tl.load(scale_ptr + N + rows, mask=n_ok, other=0.0)
    return sums, ups


@triton.jit
def weight_only(x_ptr, weight_ptr, x_stride, M, tile, split, scale_ptr, N: tl.constexpr, K: tl.constexpr,
                KP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, BLOCKED: tl.constexpr,
                GATED: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Return a split's sums (BN, BM) of a tile, and with GATED those of the other half of the matrix."""
    HALF: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    NB: tl.constexpr = KP // 128
    EACH: tl.constexpr = NB // SPLITS
    rows, c, m = tile * BN + tl.arange(0, BN), tl.arange(0, 64), tl.arange(0, BM)
    safe = tl.where(rows < N, rows, 0).to(tl.int64)
    at = weight_ptr + safe[:, None] * (KP // 2) + c[None, :]
    x_at = x_ptr + m.to(tl.int64)[:, None] * x_stride + c[None, :]
    sums = tl.zeros([BN, BM], tl.float32)
    ups = tl.zeros([BN, BM], tl.float32)
    for b in tl.range(split * EACH, split * EACH + EACH, num_stages=STAGES):
        w = tl.load(at + b * 64)
        v = w
        if GATED:
            v = tl.load(at + N * (KP // 2) + b * 64)
        part = tl.zeros([BN, BM], tl.float32)
        part_up = tl.zeros([BN, BM], tl.float32)
        for j in tl.static_range(2):
            if K == KP:
                x = tl.load(x_at + b * 128 + j * 64, mask=m[:, None] < M, other=0.0)
            else:
                inside = c[None, :] < K - b * 128 - j * 64
                x = tl.load(x_at + b * 128 + j * 64, mask=(m[:, None] < M) & inside, other=0.0)
            if BLOCKED:
                part = tl.dot(halves(w, j, HALF, ASM), x.T, part)
            else:
                sums = tl.dot(halves(w, j, HALF, ASM), x.T, sums)
            if GATED:
                if BLOCKED:
                    part_up = tl.dot(halves(v, j, HALF, ASM), x.T, part_up)
                else:
                    ups = tl.dot(halves(v, j, HALF, ASM), x.T, ups)
        if BLOCKED:
            sums += part * tl.load(scale_ptr + (tile * BN // 128) * NB + b)
            if GATED:
                ups += part_up * tl.load(scale_ptr + ((N + tile * BN) // 128) * NB + b)
    return sums, ups


@triton.jit(do_not_specialize=["M"])
def few_weight_only(x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, part_ptr, count_ptr, x_stride, M, N: tl.constexpr,
                    K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
                    BLOCKED: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, ASM: tl.constexpr,
                    PDL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Compute out (M, N) of x (M, K) in 16 bits and int16 pairs of codes, M <= BM. Grid (N / BN, SPLITS)."""
    tile, split = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
    sums, ups = weight_only(
        x_ptr, weight_ptr, x_stride, M, tile, split, scale_ptr, N, K, KP, BM, BN, SPLITS, BLOCKED, ACT != "", ASM,
        STAGES,
    )  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    finish_tile(sums, ups, scale_ptr, scale_ptr, bias_ptr, out_ptr, part_ptr, count_ptr, tile, split, 0, M, N, BM, BN,
                SPLITS, not BLOCKED, False, BIAS, ACT)  # fmt: skip


@triton.jit
def finish_tile(sums, ups, x_scale_ptr, scale_ptr, bias_ptr, out_ptr, part_ptr, count_ptr, tile, split, block, M,
                N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, BY_ROW: tl.constexpr,
                X_SCALED: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr):  # fmt: skip
    """Add up splits, multiply by the scales of the matrix's rows (BY_ROW) and of x's (X_SCALED), finish and store."""
    last = True
    if SPLITS > 1:
        last, sums, ups = gathered(sums, ups, part_ptr, count_ptr, tile, split, BM, BN, SPLITS, ACT != "")
    if last:
        column = (tile * BN + tl.arange(0, BN))[:, None]
        m = block * BM + tl.arange(0, BM)
        if BY_ROW:
            sums, ups = scaled_tile(sums, ups, scale_ptr, column, column < N, N, ACT != "")
        if X_SCALED:
            scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[None, :]
            sums *= scale
            ups *= scale
        y = finished(sums, ups, column, column < N, bias_ptr, bias_ptr, N, BIAS, False, ACT)
        to = out_ptr + m.to(tl.int64)[None, :] * N + column
        tl.store(to, y.to(out_ptr.dtype.element_ty), mask=(column < N) & (m[None, :] < M))


@triton.jit
def summed_blocks(x_ptr, weight_ptr, x_scale_ptr, scale_ptr, x_scale_stride, M, tile, split, block, N: tl.constexpr,
                  KP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, GATED: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """Return what `summed` does, with each 128 columns times their scales of x, (KP / 128, `x_scale_stride`), and of
    the matrix.
    """
    rows, k = tile * BN + tl.arange(0, BN), tl.arange(0, 128)
    m = block * BM + tl.arange(0, BM)
    NB: tl.constexpr = KP // 128
    EACH: tl.constexpr = NB // SPLITS
    at = weight_ptr + tl.where(rows < N, rows, 0).to(tl.int64)[:, None] * KP + k[None, :]
    x_at = x_ptr + m.to(tl.int64)[:, None] * KP + k[None, :]
    sums = tl.zeros([BN, BM], tl.float32)
    ups = tl.zeros([BN, BM], tl.float32)
    for b in tl.range(split * EACH, split * EACH + EACH, num_stages=STAGES):
        w = tl.load(at + b * 128)
        x = tl.load(x_at + b * 128, mask=m[:, None] < M, other=0.0)
        x_scale = tl.load(x_scale_ptr + b * x_scale_stride + m, mask=m < M, other=0.0)
        scale = tl.load(scale_ptr + (tile * BN // 128) * NB + b)
        sums += tl.dot(w, x.T) * (x_scale * scale)[None, :]
        if GATED:
            up = tl.load(at + N * KP + b * 128)
            scale = tl.load(scale_ptr + ((N + tile * BN) // 128) * NB + b)
            ups += tl.dot(up, x.T) * (x_scale * scale)[None, :]
    return sums, ups


@triton.jit(do_not_specialize=["M", "x_scale_stride"])
def codes_by_codes(x_ptr, weight_ptr, x_scale_ptr, scale_ptr, bias_ptr, out_ptr, part_ptr, count_ptr, M, x_scale_stride,
                   N: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                   SPLITS: tl.constexpr, BLOCKED: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
                   TMA: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Compute out (M, N) of codes of x (M, KP), with scales (M,), or (KP / 128, `x_scale_stride`) if BLOCKED, and codes
    of the matrix.

    BK · SPLITS divides KP. Grid (N / BN, SPLITS, M / BM). Splits and TMA as of `few_rows`. Without splits, an output is
    the same for any M and BM.
    """
    tile, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if SPLITS == 1:  # Neighbours share tiles of both operands.
        block, tile = tl.swizzle2d(block, tile, tl.num_programs(2), tl.num_programs(0), 16)
    if PDL:
        gdc_wait()
    if BLOCKED:
        sums, ups = summed_blocks(
            x_ptr,
            weight_ptr,
            x_scale_ptr,
            scale_ptr,
            x_scale_stride,
            M,
            tile,
            split,
            block,
            N,
            KP,
            BM,
            BN,
            SPLITS,
            ACT != "",
            STAGES,
        )
    else:
        sums, ups = summed(
            x_ptr, weight_ptr, KP, M, tile, split, block, N, KP, BM, BN, BK, SPLITS, ACT != "", TMA, STAGES
        )
    if PDL:
        gdc_launch_dependents()
    finish_tile(sums, ups, x_scale_ptr, scale_ptr, bias_ptr, out_ptr, part_ptr, count_ptr, tile, split, block, M, N, BM,
                BN, SPLITS, not BLOCKED, not BLOCKED, BIAS, ACT)  # fmt: skip
