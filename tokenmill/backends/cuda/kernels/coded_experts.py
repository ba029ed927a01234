"""Products of rows with chosen experts' matrices whose weights stay quantized, on tensor cores.

`coded.py` has the layout of codes and words; the matrices of a layer's experts lie one behind the other. Codes are the
tensor cores' first operand, so a tile can hold any outputs: those of a gate beside those of what it gates, or those of
several experts, each multiplied with a row of its own.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.backends.cuda.kernels.coded import row_offsets, scale_of, with_slice, words_of
from tokenmill.backends.cuda.kernels.codes import e2m1_slice, table_slices, times
from tokenmill.backends.cuda.kernels.rows import gated


@triton.jit
def scaled_e2m1(w, scale, J: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """Return slice J times scales of at most 64, less 2^6: a scale makes up for what `e2m1_slice` lacks, too."""
    a = e2m1_slice(w, J, HALF, ASM)
    scale = (scale * (256.0 if HALF else 2.0**120)).to(a.dtype)
    return times(a, tl.broadcast_to(scale[:, None], a.shape), HALF, ASM)


@triton.jit
def ordered(order_at, k, ok, ORDER: tl.constexpr):
    """Return the columns of x that columns `k` of codes belong to."""
    if ORDER:
        return tl.load(order_at + k[None, :], mask=ok, other=0)
    else:
        return k[None, :]


@triton.jit
def coded_sums(x_ptr, starts, weight_ptr, words_ptr, table_ptr, order_ptr, m_ok, owners, e, n, split, x_split,
               HEIGHT: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
               KIND: tl.constexpr, META: tl.constexpr, G: tl.constexpr, SL: tl.constexpr, TEXT: tl.constexpr,
               ORDER: tl.constexpr, ASM: tl.constexpr, ON_WEIGHTS: tl.constexpr, SPLITS: tl.constexpr,
               STAGES: tl.constexpr):  # fmt: skip
    """Return sums (BN, BM) of the outputs `n` (BN,) of experts `e`, one or (BN,), for BM rows of x.

    `starts`, `owners`: the rows' places in x, and their experts (BM,), whose order of columns they take with ORDER. D:
    columns of a slice that are multiplied at a time. HEIGHT: rows of a matrix, as stored. ON_WEIGHTS: scales of groups
    multiply weights, not sums. `split` (BN,), `x_split` (BM,): the part of the columns, of SPLITS, that an output and a
    row of x are for.
    """
    HALF: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    SLICES: tl.constexpr = 4 if (KIND == "int4" or KIND == "e2m1" or KIND == "table") else 2
    BLOCK: tl.constexpr = SLICES * SL
    NB: tl.constexpr = (K + BLOCK - 1) // BLOCK
    GROUPS: tl.constexpr = 0 if META == "row" else BLOCK // G
    WORDS: tl.constexpr = (GROUPS + 1) // 2 if META == "scale" else GROUPS
    PARTS: tl.constexpr = SL // D  # of a slice
    EACH: tl.constexpr = (NB + SPLITS - 1) // SPLITS  # blocks of a split
    EVEN: tl.constexpr = NB * BLOCK == K and EACH * SPLITS == NB
    ONCE: tl.constexpr = KIND == "e2m1" and META == "scale" and ON_WEIGHTS and GROUPS > 1
    c = tl.arange(0, D)
    first, left = split * EACH, K - x_split * (EACH * BLOCK)  # block, columns
    x_at = x_ptr + (starts if ORDER else starts + K - left)[:, None]
    order_at = (owners * K + K - left)[:, None]
    at = weight_ptr + e.to(tl.int64) * (HEIGHT * NB * SL) + row_offsets(n, NB, 16, SL) + first * (16 * SL)
    words_at = words_ptr + e.to(tl.int64) * (HEIGHT * NB * WORDS) + n + first * (WORDS * HEIGHT)
    sums = tl.zeros([BN, BM], tl.float32)
    for t in tl.range(0, EACH * PARTS, num_stages=STAGES):
        b = t // PARTS
        h = (t % PARTS) * D
        if EACH * SPLITS != NB:
            b = tl.minimum(b, NB - 1 - first)  # What is behind the last block meets zeros of x.
        w = tl.load((at + b * (16 * SL))[:, None] + h + c[None, :])
        w0, w1, w2, w3 = t, t, t, t
        if META != "row":
            w0, w1, w2, w3 = words_of(words_at, b * (WORDS * HEIGHT), HEIGHT, META, GROUPS)
        every = (w, w, w, w)
        if KIND == "table":
            every = table_slices(w, table_ptr, TEXT, HALF, ASM)
        part = tl.zeros([BN, BM], tl.float32)
        for j in tl.static_range(SLICES):
            k = t // PARTS * BLOCK + j * SL + h + c
            ok = m_ok[:, None]
            if not EVEN:
                ok = ok & (k[None, :] < left[:, None])
            x = tl.load(x_at + ordered(order_ptr + order_at, k, ok, ORDER), mask=ok, other=0.0)
            if ONCE:
                a = scaled_e2m1(w, scale_of(w0, w1, w2, w3, j, META, SL, G, GROUPS), j, HALF, ASM)
                sums = tl.dot(a, x.T, sums, input_precision="ieee")
            else:
                sums, part = with_slice(
                    sums, part, x, w, every, w0, w1, w2, w3, j, KIND, META, SL, G, GROUPS, ON_WEIGHTS, HALF, ASM
                )
    if ONCE:
        sums *= 64.0
    elif META == "row":
        sums *= tl.load(words_ptr + e.to(tl.int64) * HEIGHT + n)[:, None]
    return sums


@triton.jit
def side_by_side(tile, N: tl.constexpr, BN: tl.constexpr, GATED: tl.constexpr):
    """Return the outputs of a tile: BN, or with GATED BN of the gate, then the same of what it gates."""
    if GATED:
        i = tl.arange(0, 2 * BN)
        n = tile * BN + i % BN
        return tl.where(n < N, n, 0) + (i // BN) * N
    else:
        n = tile * BN + tl.arange(0, BN)
        return tl.where(n < N, n, 0)


@triton.jit
def halves(sums, BN: tl.constexpr):
    """Return both halves of BN sums, along their first dimension."""
    if len(sums.shape) == 2:
        return tl.split(tl.permute(tl.reshape(sums, [2, BN // 2, sums.shape[1]]), (1, 2, 0)))
    else:
        return tl.split(tl.permute(tl.reshape(sums, [2, BN // 2]), (1, 0)))


@triton.jit
def coded_row_up(x_ptr, weight_ptr, words_ptr, table_ptr, whole_ptr, order_ptr, bias_ptr, ids_ptr, factors_ptr, out_ptr,
                 limit, offset, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 KIND: tl.constexpr, META: tl.constexpr, G: tl.constexpr, SL: tl.constexpr, HEIGHT: tl.constexpr,
                 TEXT: tl.constexpr, ORDER: tl.constexpr, ASM: tl.constexpr, ON_WEIGHTS: tl.constexpr,
                 SPLITS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr, BIAS: tl.constexpr,
                 SCALED: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """As `one_row_up`. A tile has the outputs once for each of SPLITS parts of the columns, and BK rows of x, of which
    the first SPLITS are for these parts: more warps share the columns, and none waits for another one.
    """
    size: tl.constexpr = 2 * BN if GATED else BN
    height: tl.constexpr = 2 * N if GATED else N
    tile, j = tl.program_id(0), tl.program_id(1)
    n = side_by_side(tile, N, BN, GATED)
    i, m = tl.arange(0, SPLITS * size), tl.arange(0, BK)
    split = i // size
    every = tl.reshape(tl.broadcast_to(n[None, :], [SPLITS, size]), [SPLITS * size])
    if PDL:
        gdc_wait()
    e = tl.load(ids_ptr + j)
    sums = coded_sums(
        x_ptr, m * 0, weight_ptr, words_ptr, table_ptr, order_ptr, m < SPLITS, m * 0 + e, e, every, split, m, HEIGHT, K,
        BK, SPLITS * size, SL, KIND, META, G, SL, TEXT, ORDER, ASM, ON_WEIGHTS, SPLITS, STAGES,
    )  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    y = tl.sum(tl.where(split[:, None] == m[None, :], sums, 0.0), 1)
    y = tl.sum(tl.reshape(y, [SPLITS, size]), 0) * tl.load(whole_ptr + e)
    if SCALED:
        y *= tl.load(factors_ptr + j).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + e.to(tl.int64) * height + n).to(tl.float32)
    up = y
    if GATED:
        y, up = halves(y, size)
    y = gated(y, up, limit, offset, ACT, GATED, LIMIT)
    n = tile * BN + tl.arange(0, BN)
    tl.store(out_ptr + j * N + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def coded_row_down(x_ptr, weight_ptr, words_ptr, table_ptr, whole_ptr, order_ptr, bias_ptr, ids_ptr,
                   factors_ptr, residual_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr,
                   KP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, META: tl.constexpr,
                   G: tl.constexpr, SL: tl.constexpr, HEIGHT: tl.constexpr, TEXT: tl.constexpr, ORDER: tl.constexpr,
                   ASM: tl.constexpr, ON_WEIGHTS: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr,
                   SCALED: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
                   STAGES: tl.constexpr):  # fmt: skip
    """As `one_row_down`. A tile has BN outputs of each expert for each of SPLITS parts of the columns, and of BK rows
    of x one for each part and expert. Of its sums, those of an output with the row of its part and expert are used.
    """
    i, m = tl.arange(0, SPLITS * KP * BN), tl.arange(0, BK)
    own = m % KP  # the place of a row's expert
    m_ok = (own < TOP_K) & (m < SPLITS * KP)
    n = tl.program_id(0) * BN + i % BN
    chosen = tl.load(ids_ptr + i // BN % KP, mask=i // BN % KP < TOP_K, other=0)
    owners = tl.load(ids_ptr + own, mask=m_ok, other=0)
    if PDL:
        gdc_wait()
    sums = coded_sums(
        x_ptr, own * K, weight_ptr, words_ptr, table_ptr, order_ptr, m_ok, owners, chosen, tl.where(n < N, n, 0),
        i // (KP * BN), m // KP, HEIGHT, K, BK, SPLITS * KP * BN, SL, KIND, META, G, SL, TEXT, ORDER, ASM, ON_WEIGHTS,
        SPLITS, STAGES,
    )  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    y = tl.sum(tl.where((i // BN)[:, None] == m[None, :], sums, 0.0), 1)
    y = tl.sum(tl.reshape(y, [SPLITS, KP * BN]), 0)
    i = tl.arange(0, KP * BN)
    j = i // BN
    n = tl.program_id(0) * BN + i % BN
    n = tl.where(n < N, n, 0)
    e = tl.load(ids_ptr + j, mask=j < TOP_K, other=0)
    y *= tl.load(whole_ptr + e)
    if BIAS:
        y += tl.load(bias_ptr + e.to(tl.int64) * N + n, mask=j < TOP_K, other=0.0).to(tl.float32)
    if not SCALED:
        y *= tl.load(factors_ptr + j, mask=j < TOP_K, other=0.0).to(tl.float32)
    y = tl.sum(tl.reshape(tl.where(j < TOP_K, y, 0.0), [KP, BN]), 0)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if RESIDUAL:
        y += tl.load(residual_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < N)
