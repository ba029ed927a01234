"""Products with matrices of packed codes: few rows on tensor cores, with the codes unpacked in registers; and unpacking
of a whole matrix to 16 bits, for the rows of prompts.

The operands are swapped, as in `products.py`: weights are the first one, rows of x the second. A block of columns is 4
or 2 slices (`codes.py`), each an operand of a product of depth D. Words of a block (`products/layout.py`) are read 32
bits at a time, because asynchronous copies move no less.

KIND, META, G (columns of a group) and SL (columns of a slice): `products.forms.Form`; D <= SL: columns of a slice that
are multiplied at a time. Scales multiply the float32 sums of a group, or with OPERAND the weights: one rounding more,
and fewer instructions from some 64 rows on. If numbers are added too (META "low"), they always multiply the weights.
All results are multiplied by `factor` at the end.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.backends.cuda.kernels.codes import (
    alike,
    e2m1_slice,
    e4m3_slice,
    e5m2_slice,
    int4_slice,
    int8_slice,
    minus,
    sixteen,
    table_slices,
    times,
    times_plus,
)
from tokenmill.backends.cuda.kernels.products import finished, gathered

NORM_SHRINK = tl.constexpr(0.0625)
"""Factor of float16 rows that are multiplied by a norm's weight before they are divided by their size."""


@triton.jit
def low_half(word):
    """Return the float16 in the low half of words, as float32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high_half(word):
    """Return the float16 in the high half of words, as float32."""
    return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def words_of(meta_ptr, at, n, META: tl.constexpr, GROUPS: tl.constexpr):
    """Return the words of a block, up to four; where there are fewer, the first one again. n: distance of two."""
    COUNT: tl.constexpr = (GROUPS + 1) // 2 if META == "scale" else GROUPS
    w0 = tl.load(meta_ptr + at)
    w1, w2, w3 = w0, w0, w0
    if COUNT > 1:
        w1 = tl.load(meta_ptr + at + n)
    if COUNT > 2:
        w2 = tl.load(meta_ptr + at + 2 * n)
        w3 = tl.load(meta_ptr + at + 3 * n)
    return w0, w1, w2, w3


@triton.jit
def word_of(w0, w1, w2, w3, AT: tl.constexpr):
    """Return the word at AT."""
    return w0 if AT == 0 else (w1 if AT == 1 else (w2 if AT == 2 else w3))


@triton.jit
def scale_of(w0, w1, w2, w3, J: tl.constexpr, META: tl.constexpr, SL: tl.constexpr, G: tl.constexpr,
             GROUPS: tl.constexpr):  # fmt: skip
    """Return the float32 scales of slice J."""
    g: tl.constexpr = J * SL // G
    if META != "scale":
        return low_half(word_of(w0, w1, w2, w3, g))
    elif GROUPS == 1:
        return w0.to(tl.float32, bitcast=True)
    else:
        word = word_of(w0, w1, w2, w3, g // 2)
        if g % 2 == 0:
            return low_half(word)
        else:
            return high_half(word)


@triton.jit
def number(w, every, J: tl.constexpr, KIND: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """Return slice J of a tile without scales. `every`: all slices, if a table is looked up.

    int4 with zero points, whose middle is not known here, is `int4_slice`.
    """
    if KIND == "table":
        a = every[J]
    elif KIND == "int4":
        a = int4_slice(w, J, HALF, ASM)
        a = minus(a, alike(a, 1032.0 if HALF else 136.0), HALF, ASM)
    elif KIND == "int8":
        a = int8_slice(w, J, HALF, ASM)
    elif KIND == "e2m1":
        a = e2m1_slice(w, J, HALF, ASM)
        a = times(a, alike(a, 2.0**14 if HALF else 2.0**126), HALF, ASM)
    elif KIND == "e4m3":
        a = e4m3_slice(w, J, HALF, ASM)
        a = times(a, alike(a, 256.0 if HALF else 2.0**120), HALF, ASM)
    else:
        a = e5m2_slice(w, J, HALF, ASM)
        if not HALF:
            a = times(a, alike(a, 2.0**112), HALF, ASM)
    return a


@triton.jit
def weights_of(w, every, w0, w1, w2, w3, J: tl.constexpr, KIND: tl.constexpr, META: tl.constexpr, SL: tl.constexpr,
               G: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Return slice J of a tile, with zero points subtracted; with minima (META "low"), scaled, too."""
    g: tl.constexpr = J * SL // G if META != "row" else 0
    if META == "zero":
        a = int4_slice(w, J, HALF, ASM) if KIND == "int4" else int8_slice(w, J, HALF, ASM)
        zero = sixteen(word_of(w0, w1, w2, w3, g) >> 16, HALF)[:, None]
        a = minus(a, tl.broadcast_to(zero, a.shape), HALF, ASM)
    else:
        a = number(w, every, J, KIND, HALF, ASM)
        if META == "low":
            word = word_of(w0, w1, w2, w3, g)
            scale = tl.broadcast_to(low_half(word).to(a.dtype)[:, None], a.shape)
            low = tl.broadcast_to(high_half(word).to(a.dtype)[:, None], a.shape)
            a = times_plus(a, scale, low, HALF, ASM)
    return a


@triton.jit
def with_slice(sums, part, x, w, every, w0, w1, w2, w3, J: tl.constexpr, KIND: tl.constexpr, META: tl.constexpr,
               SL: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr, OPERAND: tl.constexpr, HALF: tl.constexpr,
               ASM: tl.constexpr):  # fmt: skip
    """Return sums (BN, BM) and those of the group at hand, with the product of slice J and x (BM, D) added."""
    PER: tl.constexpr = G // SL if G > SL else 1  # slices of a group
    a = weights_of(w, every, w0, w1, w2, w3, J, KIND, META, SL, G, HALF, ASM)
    if META == "row" or META == "low":
        sums = tl.dot(a, x.T, sums, input_precision="ieee")
    elif OPERAND:
        s = scale_of(w0, w1, w2, w3, J, META, SL, G, GROUPS)
        a = times(a, tl.broadcast_to(s.to(a.dtype)[:, None], a.shape), HALF, ASM)
        sums = tl.dot(a, x.T, sums, input_precision="ieee")
    else:
        part = tl.dot(a, x.T, part, input_precision="ieee")
        if (J + 1) % PER == 0:
            sums += part * scale_of(w0, w1, w2, w3, J, META, SL, G, GROUPS)[:, None]
            part = tl.zeros(part.shape, tl.float32)
    return sums, part


@triton.jit
def row_offsets(rows, NB: tl.constexpr, R: tl.constexpr, SL: tl.constexpr):
    """Return where rows of packed codes begin."""
    if R == 1:
        return rows * (NB * SL)
    else:
        return (rows // R) * (NB * R * SL) + (rows % R) * SL


@triton.jit
def tile_of(at, place, word_at, row, table_ptr, ROWS: tl.constexpr, GROUPS: tl.constexpr, KIND: tl.constexpr,
            META: tl.constexpr, TEXT: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Return a tile of elements, all slices of it if a table is looked up, and the words of its rows."""
    w = tl.load(at + place)
    w0, w1, w2, w3 = row, row, row, row
    if META != "row":
        w0, w1, w2, w3 = words_of(word_at, row, ROWS, META, GROUPS)
    every = (w, w, w, w)
    if KIND == "table":
        every = table_slices(w, table_ptr, TEXT, HALF, ASM)
    return w, every, w0, w1, w2, w3


@triton.jit
def summed_codes(x_ptr, w_ptr, meta_ptr, table_ptr, tile, block, M, x_stride, split, N: tl.constexpr,
                 K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SL: tl.constexpr, D: tl.constexpr,
                 R: tl.constexpr, G: tl.constexpr, KIND: tl.constexpr, META: tl.constexpr, TEXT: tl.constexpr,
                 OPERAND: tl.constexpr, SPLITS: tl.constexpr, GATED: tl.constexpr, STAGES: tl.constexpr,
                 ASM: tl.constexpr):  # fmt: skip
    """Return a split's sums (BN, BM), and with GATED those of the other half of the matrix."""
    HALF: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    SLICES: tl.constexpr = 4 if (KIND == "int4" or KIND == "e2m1" or KIND == "table") else 2
    BLOCK: tl.constexpr = SLICES * SL
    NB: tl.constexpr = (K + BLOCK - 1) // BLOCK
    GROUPS: tl.constexpr = 0 if META == "row" else BLOCK // G
    WORDS: tl.constexpr = (GROUPS + 1) // 2 if META == "scale" else GROUPS
    ROWS: tl.constexpr = ((2 * N if GATED else N) + 15) // 16 * 16  # as stored
    PARTS: tl.constexpr = SL // D  # of a slice
    EACH: tl.constexpr = (NB * PARTS + SPLITS - 1) // SPLITS
    first_row = tile * BN
    row = tl.arange(0, BN)  # of the tile: offsets within it have 32 bits, and are the same for all tiles
    row = row if N % BN == 0 else tl.where(row < N - first_row, row, 0)
    c = tl.arange(0, D)
    at = w_ptr + (first_row // R).to(tl.int64) * (NB * R * SL)
    place = row_offsets(row, NB, R, SL)[:, None] + c[None, :]
    up_at = w_ptr + ((first_row + N) // R).to(tl.int64) * (NB * R * SL)
    up_place = row_offsets(row + N % R, NB, R, SL)[:, None] + c[None, :]
    m = tl.arange(0, BM)
    m_ok = (m < M - block * BM)[:, None]
    x_at = x_ptr + (block * BM).to(tl.int64) * x_stride
    x_place = m[:, None] * x_stride + c[None, :]
    word_at = meta_ptr + first_row
    sums = tl.zeros([BN, BM], tl.float32)
    ups = tl.zeros([BN, BM], tl.float32)
    first = split * EACH
    end = first + EACH
    if NB * PARTS % SPLITS != 0:  # A loop that may not run at all makes the tensor cores wait for each product.
        end = tl.minimum(end, NB * PARTS)
    for t in tl.range(first, end, num_stages=STAGES):
        b, h = t // PARTS, (t % PARTS) * D
        w, every_w, w0, w1, w2, w3 = tile_of(
            at + (b * (R * SL) + h), place, word_at + b * (WORDS * ROWS), row, table_ptr, ROWS, GROUPS, KIND, META,
            TEXT, HALF, ASM,
        )  # fmt: skip
        v, every_v, v0, v1, v2, v3 = w, every_w, w0, w1, w2, w3
        if GATED:
            v, every_v, v0, v1, v2, v3 = tile_of(
                up_at + (b * (R * SL) + h), up_place, word_at + (b * (WORDS * ROWS) + N), row, table_ptr, ROWS, GROUPS,
                KIND, META, TEXT, HALF, ASM,
            )  # fmt: skip
        part = tl.zeros([BN, BM], tl.float32)
        part2 = tl.zeros([BN, BM], tl.float32)
        for j in tl.static_range(SLICES):
            k = b * BLOCK + j * SL + h
            if K % BLOCK == 0:
                x = tl.load(x_at + k + x_place, mask=m_ok, other=0.0)
            else:
                x = tl.load(x_at + k + x_place, mask=m_ok & (c[None, :] < K - k), other=0.0)
            sums, part = with_slice(sums, part, x, w, every_w, w0, w1, w2, w3, j, KIND, META, SL, G, GROUPS, OPERAND,
                                    HALF, ASM)  # fmt: skip
            if GATED:
                ups, part2 = with_slice(ups, part2, x, v, every_v, v0, v1, v2, v3, j, KIND, META, SL, G, GROUPS,
                                        OPERAND, HALF, ASM)  # fmt: skip
    return sums, ups


@triton.jit
def norm_weights(norm_ptr, column, n_ok, NORM: tl.constexpr, HALF: tl.constexpr):
    """Return a norm's weights (BN, 1), or zeros."""
    weight = column * 0.0
    if NORM:
        weight = tl.load(norm_ptr + column, mask=n_ok, other=0.0).to(tl.float32)
    if HALF:
        weight *= NORM_SHRINK
    return weight


@triton.jit(do_not_specialize=["M"])
def few_coded(x_ptr, w_ptr, meta_ptr, table_ptr, bias_ptr, residual_ptr, norm_ptr, normed_ptr, squares_ptr, out_ptr,
              part_ptr, count_ptr, factor, eps, x_stride, M, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
              BN: tl.constexpr, SL: tl.constexpr, D: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
              KIND: tl.constexpr, META: tl.constexpr, TEXT: tl.constexpr, OPERAND: tl.constexpr, SPLITS: tl.constexpr,
              SQUARES: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
              ACT: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Compute out (M, N) of x (M, K) and packed weights. Grid (N / BN, SPLITS, M / BM).

    With ACT the matrix has 2 · N rows: out = act(gate) · up. With splits, which require M <= BM, the last program of a
    tile to finish adds them in order. Of a single row: RESIDUAL: a row is added. NORM: the result times `norm` is
    stored at `normed`, and the sum of the squares of each tile's results at `squares`. SQUARES: x was stored so, with
    so many sums of squares, and results are divided by the size of the row that it was made of.
    """
    tile, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if SPLITS == 1:  # Neighbours share tiles of both operands.
        block, tile = tl.swizzle2d(block, tile, tl.num_programs(2), tl.num_programs(0), 16)
    if PDL:
        gdc_wait()
    i = tl.arange(0, triton.next_power_of_2(max(SQUARES, 16)))
    squares = tl.load(squares_ptr + i, mask=i < SQUARES, other=0.0)  # Under way while the codes are read.
    sums, ups = summed_codes(
        x_ptr, w_ptr, meta_ptr, table_ptr, tile, block, M, x_stride, split, N, K, BM, BN, SL, D, R, G, KIND, META, TEXT,
        OPERAND, SPLITS, ACT != "", STAGES, ASM,
    )  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    last = True
    if SPLITS > 1:
        last, sums, ups = gathered(sums, ups, part_ptr, count_ptr, tile, split, BM, BN, SPLITS, ACT != "")
    if last:
        HALF: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
        column = (tile * BN + tl.arange(0, BN))[:, None]
        m = (block * BM + tl.arange(0, BM))[None, :]
        n_ok = column < N
        scale = factor
        if SQUARES > 0:
            scale = factor * tl.rsqrt(tl.sum(squares, 0) / K + eps)
            if HALF:
                scale = scale / NORM_SHRINK
        sums, ups = sums * scale, ups * scale
        if META == "row":
            sums *= tl.load(meta_ptr + column, mask=n_ok, other=0.0)
            if ACT != "":
                ups *= tl.load(meta_ptr + N + column, mask=n_ok, other=0.0)
        weight = norm_weights(norm_ptr, column, n_ok, NORM, HALF)  # Under way beside what `finished` loads.
        y = finished(sums, ups, column, n_ok, bias_ptr, residual_ptr, N, BIAS, RESIDUAL, ACT)
        y = y.to(out_ptr.dtype.element_ty)
        ok = n_ok & (m < M)
        place = m.to(tl.int64) * N + column
        tl.store(out_ptr + place, y, mask=ok)
        if NORM:
            wide = tl.where(ok, y.to(tl.float32), 0.0)
            tl.store(squares_ptr + tile, tl.sum(tl.sum(wide * wide, 1), 0))
            tl.store(normed_ptr + place, (wide * weight).to(y.dtype), mask=ok)


@triton.jit
def wide_numbers(w, every, w0, w1, w2, w3, J: tl.constexpr, KIND: tl.constexpr, META: tl.constexpr, SL: tl.constexpr,
                 G: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Return slice J of a tile in float32, with its scales but those of rows."""
    if META == "low":
        word = word_of(w0, w1, w2, w3, J * SL // G)
        return number(w, every, J, KIND, HALF, ASM).to(tl.float32) * low_half(word)[:, None] + high_half(word)[:, None]
    else:
        y = weights_of(w, every, w0, w1, w2, w3, J, KIND, META, SL, G, HALF, ASM).to(tl.float32)
        if META != "row":
            y *= scale_of(w0, w1, w2, w3, J, META, SL, G, GROUPS)[:, None]
        return y


@triton.jit
def unpack(w_ptr, meta_ptr, table_ptr, out_ptr, factor, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr,
           SL: tl.constexpr, R: tl.constexpr, G: tl.constexpr, KIND: tl.constexpr, META: tl.constexpr,
           TEXT: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Write a matrix (N, K) in 16 bits. Grid (N / BN, blocks of columns)."""
    HALF: tl.constexpr = out_ptr.dtype.element_ty == tl.float16
    SLICES: tl.constexpr = 4 if (KIND == "int4" or KIND == "e2m1" or KIND == "table") else 2
    BLOCK: tl.constexpr = SLICES * SL
    NB: tl.constexpr = (K + BLOCK - 1) // BLOCK
    GROUPS: tl.constexpr = 0 if META == "row" else BLOCK // G
    WORDS: tl.constexpr = (GROUPS + 1) // 2 if META == "scale" else GROUPS
    ROWS: tl.constexpr = (N + 15) // 16 * 16
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    b = tl.program_id(1)
    safe = rows if N % BN == 0 else tl.where(rows < N, rows, 0)
    c = tl.arange(0, SL)
    at = w_ptr + (tl.program_id(0) * BN // R).to(tl.int64) * (NB * R * SL) + b * (R * SL)
    within = safe - tl.program_id(0) * BN if N % BN == 0 else tl.where(rows < N, tl.arange(0, BN), 0)
    w = tl.load(at + row_offsets(within, NB, R, SL)[:, None] + c[None, :])
    w0, w1, w2, w3 = b, b, b, b
    if META != "row":
        w0, w1, w2, w3 = words_of(meta_ptr, b * (WORDS * ROWS) + safe, ROWS, META, GROUPS)
    every = (w, w, w, w)
    if KIND == "table":
        every = table_slices(w, table_ptr, TEXT, HALF, ASM)
    for j in tl.static_range(SLICES):
        y = wide_numbers(w, every, w0, w1, w2, w3, j, KIND, META, SL, G, GROUPS, HALF, ASM)
        if META == "row":
            y *= tl.load(meta_ptr + safe)[:, None]
        k = b * BLOCK + j * SL + c
        to = out_ptr + rows.to(tl.int64)[:, None] * K + k[None, :]
        y = (y * factor).to(out_ptr.dtype.element_ty)
        if K % BLOCK == 0 and N % BN == 0:
            tl.store(to, y)
        else:
            tl.store(to, y, mask=(rows[:, None] < N) & (k[None, :] < K))


@triton.jit
def take_columns(x_ptr, order_ptr, out_ptr, x_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    """Write row r of x with its columns in another order. Grid (rows, K / BLOCK)."""
    r = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = k < K
    order = tl.load(order_ptr + k, mask=ok, other=0)
    tl.store(out_ptr + r * K + k, tl.load(x_ptr + r * x_stride + order, mask=ok, other=0.0), mask=ok)
