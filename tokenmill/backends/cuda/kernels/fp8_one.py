"""Product of one row with a matrix of e4m3 codes on CUDA cores, with the norm before it and the sum behind it.

Matrices lie as in `fp8.py`. A word of 32 bits is two pairs of codes, of columns c and c + 64, c + 1 and c + 65 of 128.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.backends.cuda.kernels.products import finished


@triton.jit
def two_floats(word, HALF: tl.constexpr):
    """Return the 16-bit floats in a word's lower and upper half as float32."""
    if HALF:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return low, (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def one_code(word, J: tl.constexpr):
    """Return the number of a word's byte J as float32, times 2^-120."""
    top = word << (24 - 8 * J)
    return ((top >> 4) & -0x78100000).to(tl.float32, bitcast=True)  # The sign, shifted in, and seven bits of size.


@triton.jit
def added(sums, w, x0, x1, x2, x3, scale_at, BLOCKED: tl.constexpr):
    """Return sums (BN, BW) plus the products of four columns a word, with BLOCKED times the scales of their blocks."""
    part = sums
    if BLOCKED:
        part = tl.zeros(sums.shape, tl.float32)
    part += one_code(w, 0) * x0[None, :]
    part += one_code(w, 1) * x2[None, :]
    part += one_code(w, 2) * x1[None, :]
    part += one_code(w, 3) * x3[None, :]
    if BLOCKED:
        part = sums + part * tl.load(scale_at)[None, :]
    return part


@triton.jit
def four_columns(x_at, norm_at, HALF: tl.constexpr, NORM: tl.constexpr):
    """Return x of a word's columns c, c + 1, c + 64, c + 65, with NORM times the norm's weight, and their squares."""
    x0, x1 = two_floats(tl.load(x_at), HALF)
    x2, x3 = two_floats(tl.load(x_at + 32), HALF)
    squares = x0 * x0
    if NORM:
        squares += x1 * x1 + x2 * x2 + x3 * x3
        n0, n1 = two_floats(tl.load(norm_at), HALF)
        n2, n3 = two_floats(tl.load(norm_at + 32), HALF)
        x0, x1, x2, x3 = x0 * n0, x1 * n1, x2 * n2, x3 * n3
    return x0, x1, x2, x3, squares


@triton.jit
def one_weight_only(x_ptr, weight_ptr, scale_ptr, norm_ptr, bias_ptr, residual_ptr, out_ptr, eps, N: tl.constexpr,
                    K: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BLOCKED: tl.constexpr, NORM: tl.constexpr,
                    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr, PDL: tl.constexpr,
                    STAGES: tl.constexpr):  # fmt: skip
    """Compute out (N,) of x (K,); x, the norm's weight and the matrix are words. BW words, a multiple of 32, a round
    divide K / 4. With ACT the matrix has 2 · N rows. BLOCKED: BN divides 128. Grid (N / BN,).
    """
    HALF: tl.constexpr = out_ptr.dtype.element_ty == tl.float16
    W: tl.constexpr = K // 4
    NB: tl.constexpr = K // 128
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    n_ok = rows < N
    i = tl.arange(0, BW)
    at = weight_ptr + tl.where(n_ok, rows, 0).to(tl.int64)[:, None] * W + i[None, :]
    x_at, norm_at = x_ptr + (i // 32) * 64 + i % 32, norm_ptr + (i // 32) * 64 + i % 32
    scale_at = scale_ptr + (tl.program_id(0) * BN // 128) * NB + i // 32
    up_scale_at = scale_ptr + ((N + tl.program_id(0) * BN) // 128) * NB + i // 32
    w = tl.load(at)  # Under way before the wait.
    v = w
    if ACT != "":
        v = tl.load(at + N * W)
    if PDL:
        gdc_wait()
    sums = tl.zeros([BN, BW], tl.float32)
    ups = tl.zeros([BN, BW], tl.float32)
    x0, x1, x2, x3, squares = four_columns(x_at, norm_at, HALF, NORM)
    sums = added(sums, w, x0, x1, x2, x3, scale_at, BLOCKED)
    if ACT != "":
        ups = added(ups, v, x0, x1, x2, x3, up_scale_at, BLOCKED)
    for start in tl.range(BW, W, BW, num_stages=STAGES):
        w = tl.load(at + start)
        v = w
        if ACT != "":
            v = tl.load(at + N * W + start)
        x0, x1, x2, x3, more = four_columns(x_at + 2 * start, norm_at + 2 * start, HALF, NORM)
        squares += more
        sums = added(sums, w, x0, x1, x2, x3, scale_at + start // 32, BLOCKED)
        if ACT != "":
            ups = added(ups, v, x0, x1, x2, x3, up_scale_at + start // 32, BLOCKED)
    if PDL:
        gdc_launch_dependents()
    factor = 2.0**120
    y, up = tl.sum(sums, 1) * factor, tl.sum(ups, 1) * factor
    if not BLOCKED:
        y *= tl.load(scale_ptr + rows, mask=n_ok, other=0.0)
        if ACT != "":
            up *= tl.load(scale_ptr + N + rows, mask=n_ok, other=0.0)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        y, up = y * scale, up * scale
    y = finished(y, up, rows, n_ok, bias_ptr, residual_ptr, N, BIAS, RESIDUAL, ACT)
    tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), mask=n_ok)
