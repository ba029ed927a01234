"""Attention of one new token per sequence over paged keys, with its rotation and cache write, in one launch.

The query heads that share a key-value head are one tile. A sequence's keys may be split over several programs; the last
one to finish merges the partial results, always in the same order. Page numbers are read one round ahead, so that the
loads of keys and values are pipelined.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.backends.cuda.kernels.heads import columns, in_head, place_of, rotated, to_stored


@triton.jit
def scaled_scores(s, scale, cap, CAPPED: tl.constexpr):
    """Return scores in units of log2(e): products times `scale`, or capped, where `scale` is already over the cap."""
    if CAPPED:
        return (1.0 - 2.0 / (tl.exp2(s * scale * 2.8853900817779268) + 1.0)) * cap  # tanh
    else:
        return s * scale


@triton.jit
def first_seen(position, WINDOW: tl.constexpr):
    """Return the first position that a token attends to. WINDOW: size of its window; if negative, that of the chunks
    within which tokens attend.
    """
    if WINDOW < 0:
        return position // -WINDOW * -WINDOW
    else:
        return tl.maximum(position + 1 - WINDOW, 0)


@triton.jit
def split_spans(position, WINDOW: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr):
    """Return the first key in the window, the keys of a split, and the number of splits, for `position` older keys."""
    first = position * 0
    if WINDOW:
        first = first_seen(position, WINDOW) // BN * BN
    chunk = tl.maximum(tl.cdiv(position - first, SPLITS * BN) * BN, LEAST)
    return first, chunk, tl.maximum(tl.cdiv(position - first, chunk), 1)


@triton.jit
def head_offsets(G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """Return the offsets of the columns of G padded heads, (GP, 2 · HALF), in a row of heads."""
    return tl.arange(0, GP)[:, None] * D + columns(tl.arange(0, 2 * HALF), D, HALF)[None, :]


@triton.jit
def head_mask(G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """Return which of these columns are not padding."""
    return (tl.arange(0, GP) < G)[:, None] & in_head(tl.arange(0, 2 * HALF), D, HALF)[None, :]


@triton.jit
def assigned_split(items_ptr, SPLITS: tl.constexpr, LISTED: tl.constexpr):
    """Return row and split of this program; beyond the list, a split that no row has."""
    item = tl.program_id(1)
    if LISTED:
        listed = item < tl.load(items_ptr)
        item = tl.load(items_ptr + 1 + item, mask=listed, other=255)
        return item // 256, item % 256
    else:
        return item // SPLITS, item % SPLITS


@triton.jit
def finish_split(part_ptr, sum_ptr, count_ptr, out_ptr, acc, sums, group, split, active, G: tl.constexpr,
                 GP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """Store a split's result. The last split of a group to finish merges all of them."""
    g = tl.arange(0, GP)
    at = group * SPLITS + split
    tl.store(part_ptr + at * (G * D) + head_offsets(G, GP, D, HALF), acc, mask=head_mask(G, GP, D, HALF))
    tl.store(sum_ptr + at * G + g, sums, mask=g < G)
    tl.debug_barrier()
    if tl.atomic_add(count_ptr + group, 1, sem="acq_rel") == active - 1:
        tl.store(count_ptr + group, 0)
        merge_splits(part_ptr, sum_ptr, out_ptr, group * SPLITS, active, G, GP, D, HALF, SPLITS)


@triton.jit
def merge_splits(part_ptr, sum_ptr, out_ptr, base, active, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr,
                 HALF: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """Merge `active` partial results (SPLITS, G, D), weighted by their sums (SPLITS, G), in order."""
    g = tl.arange(0, GP)
    ok = g < G
    most = tl.full([GP], -1e30, tl.float32)
    for s in range(active):
        most = tl.maximum(most, tl.load(sum_ptr + (base + s) * G + g, mask=ok, other=-1e30, cache_modifier=".cg"))
    total = tl.zeros([GP], tl.float32)
    made = tl.zeros([GP, 2 * HALF], tl.float32)
    at = part_ptr + head_offsets(G, GP, D, HALF)
    both = head_mask(G, GP, D, HALF)
    for s in range(active):
        found = tl.load(sum_ptr + (base + s) * G + g, mask=ok, other=-1e30, cache_modifier=".cg")
        weight = tl.exp2(found - most)
        total += weight
        made += tl.load(at + (base + s) * (G * D), mask=both, other=0.0, cache_modifier=".cg") * weight[:, None]
    to = out_ptr + head_offsets(G, GP, D, HALF)
    tl.store(to, (made / total[:, None]).to(out_ptr.dtype.element_ty), mask=both)


@triton.jit
def before_keys(sinks_ptr, heads, ok, first, N: tl.constexpr, SINKS: tl.constexpr):
    """Return largest score and sum of N queries that have attended to no key. With SINKS the sum already has the
    share of their heads' sinks, in the `first` of several splits.
    """
    m = tl.full([N], -1e30, tl.float32)
    total = tl.zeros([N], tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + heads, mask=ok, other=0.0).to(tl.float32) * 1.4426950408889634
        m = tl.where(first, sink, m)
        total = tl.where(first, 1.0, total)
    return m, total


@triton.jit
def decode_rounds(m, total, q, keys_ptr, values_ptr, table_ptr, head, first, stop, position, slopes, scale, cap,
                  KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, GP: tl.constexpr,
                  BLOCK_SIZE: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
                  ALIBI: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Attend to the keys [first, stop) of a table. Return largest score, sum and weighted values of each query."""
    j = tl.arange(0, 2 * HALF)
    col = columns(j, D, HALF)
    n = tl.arange(0, BN)
    acc = tl.zeros([GP, 2 * HALF], tl.float32)
    block = tl.load(table_ptr + (first + n) // BLOCK_SIZE, mask=first + n < stop, other=0)
    for start in tl.range(first, stop, BN, num_stages=STAGES):
        t = start + n
        ok = t < stop
        if WINDOW:  # blocks before it may be others'
            ok = ok & (t >= first_seen(position, WINDOW))
        there = ok[:, None]
        if D != 2 * HALF:
            there = there & in_head(j, D, HALF)[None, :]
        place = block.to(tl.int64) * BLOCK_SIZE + t % BLOCK_SIZE
        at = (place * KV_HEADS + head)[:, None] * D + col[None, :]
        keys = tl.load(keys_ptr + at, mask=there, other=0.0).to(q.dtype)
        s = scaled_scores(tl.dot(q, keys.T, input_precision="ieee"), scale, cap, CAPPED)
        if ALIBI:
            s += slopes[:, None] * (t - position).to(tl.float32)[None, :]
        s = tl.where(ok[None, :], s, -1e30)
        higher = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        fade = tl.exp2(m - higher)
        values = tl.load(values_ptr + at, mask=there, other=0.0).to(q.dtype)
        block = tl.load(table_ptr + (t + BN) // BLOCK_SIZE, mask=t + BN < stop, other=0)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), values, acc * fade[:, None], input_precision="ieee")
        m = higher
    return m, total, acc


@triton.jit
def own_token(m, total, acc, a1, a2, k_ptr, v_ptr, key_ptr, value_ptr, norm_ptr, cos, sin, eps, scale, cap, k_fit,
              v_fit, D: tl.constexpr, HALF: tl.constexpr, CAPPED: tl.constexpr, NORM: tl.constexpr,
              ROPE: tl.constexpr):  # fmt: skip
    """Write the new token's key and value to the cache, and attend to them as they are stored."""
    half = tl.arange(0, HALF)[None, :]
    half_ok = half < D // 2
    b1, b2 = rotated(k_ptr + half * 0, half_ok, norm_ptr, cos, sin, eps, D, HALF, NORM, ROPE)
    stored: tl.constexpr = key_ptr.dtype.element_ty
    b1, b2 = to_stored(b1.to(a1.dtype), k_fit, stored), to_stored(b2.to(a1.dtype), k_fit, stored)
    tl.store(key_ptr + half, b1, mask=half_ok)
    tl.store(key_ptr + D // 2 + half, b2, mask=half_ok)
    j = tl.arange(0, 2 * HALF)
    col = columns(j, D, HALF)
    value = to_stored(tl.load(v_ptr + col, mask=in_head(j, D, HALF), other=0.0), v_fit, stored)
    tl.store(value_ptr + col, value, mask=in_head(j, D, HALF))
    s = tl.sum(a1.to(tl.float32) * b1.to(tl.float32), 1) + tl.sum(a2.to(tl.float32) * b2.to(tl.float32), 1)
    s = scaled_scores(s, scale, cap, CAPPED)
    higher = tl.maximum(m, s)
    p = tl.exp2(s - higher)
    fade = tl.exp2(m - higher)
    return higher, total * fade + p, acc * fade[:, None] + p[:, None] * value.to(tl.float32)[None, :]


@triton.jit
def token_of(pairs_ptr, rows_ptr, b, SOME: tl.constexpr):
    """Return the step's token of row b, its slot, and its position. SOME: the token is that of `rows`."""
    t = b
    if SOME:
        t = tl.load(rows_ptr + b)
    return t.to(tl.int64), tl.load(pairs_ptr + 2 * t).to(tl.int64), tl.load(pairs_ptr + 2 * t + 1)


@triton.jit
def turn_of(cos_ptr, sin_ptr, position, half, half_ok, D: tl.constexpr, HALF: tl.constexpr, ROPE: tl.constexpr):
    """Return the cosines and sines (1, HALF) of a position; zeros without a rotation."""
    cos = tl.zeros([1, HALF], tl.float32)
    sin = cos
    if ROPE != 0:
        cos = tl.load(cos_ptr + position.to(tl.int64) * (D // 2) + half, mask=half_ok, other=0.0)
        sin = tl.load(sin_ptr + position.to(tl.int64) * (D // 2) + half, mask=half_ok, other=0.0)
    return cos, sin


@triton.jit(do_not_specialize=["n"])
def list_splits(items_ptr, pairs_ptr, rows_ptr, n, BN: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
                WINDOW: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """List the work of `decode` for n rows: items[0] is the number of all splits, each of the next is
    row · 256 + split. Whole splits come first, then the rows' last ones, which are shorter, so that the device is busy
    to the end. Grid (1,); BLOCK >= n.
    """
    row = tl.arange(0, BLOCK)
    ok = row < n
    t = row
    if SOME:
        t = tl.load(rows_ptr + row, mask=ok, other=0)
    position = tl.load(pairs_ptr + 2 * t + 1, mask=ok, other=0)
    _, _, active = split_spans(position, WINDOW, BN, SPLITS, LEAST)
    whole = tl.where(ok, active - 1, 0)
    before = tl.cumsum(whole, 0) - whole
    total = tl.sum(whole, 0)
    tl.store(items_ptr, total + n)
    for split in tl.static_range(SPLITS - 1):
        tl.store(items_ptr + 1 + before + split, row * 256 + split, mask=split < whole)
    tl.store(items_ptr + 1 + total + row, row * 256 + active - 1, mask=ok)


@triton.jit
def decode(q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, out_ptr, pairs_ptr, rows_ptr, tables_ptr, cos_ptr, sin_ptr,
           q_norm_ptr, k_norm_ptr, sinks_ptr, slopes_ptr, part_ptr, sum_ptr, count_ptr, items_ptr, q_stride, k_stride,
           v_stride, table_stride, eps, scale, cap, k_fit, v_fit, v_scale, KV_HEADS: tl.constexpr, G: tl.constexpr,
           GP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, BN: tl.constexpr,
           SPLITS: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
           ALIBI: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, SOME: tl.constexpr, LISTED: tl.constexpr,
           PDL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Attend from single tokens: normalize, rotate and cache their keys and values on the way.

    SOME: only the step's tokens in `rows`. LISTED: `items` assigns splits to programs. GP: at least 16 and G. The cache
    holds keys times `k_fit` and values times `v_fit`, which `scale` and `v_scale` undo. SINKS: a score by head that
    takes a share of the softmax. ALIBI: slopes by head, in units of log2(e). WINDOW: 0 for all keys, else as of
    `first_seen`. Grid (KV_HEADS, rows · SPLITS).
    """
    head = tl.program_id(0)
    if PDL:
        gdc_wait()
    b, split = assigned_split(items_ptr, SPLITS, LISTED)
    t, slot, position = token_of(pairs_ptr, rows_ptr, b, SOME)
    first, chunk, active = split_spans(position, WINDOW, BN, SPLITS, LEAST)
    if split >= active:
        return
    kind: tl.constexpr = out_ptr.dtype.element_ty
    half = tl.arange(0, HALF)[None, :]
    half_ok = half < D // 2
    cos, sin = turn_of(cos_ptr, sin_ptr, position, half, half_ok, D, HALF, ROPE)
    g = tl.arange(0, GP)
    q_at = q_ptr + t * q_stride + (head * G + g)[:, None] * D
    a1, a2 = rotated(q_at, (g < G)[:, None], q_norm_ptr, cos, sin, eps, D, HALF, NORM, ROPE)
    a1, a2 = a1.to(kind), a2.to(kind)
    q = tl.reshape(tl.permute(tl.join(a1, a2), (0, 2, 1)), (GP, 2 * HALF))
    begin = first + split * chunk
    m, total = before_keys(sinks_ptr, head * G + g, g < G, split == 0, GP, SINKS)
    slopes = m
    if ALIBI:
        slopes = tl.load(slopes_ptr + head * G + g, mask=g < G, other=0.0)
    m, total, acc = decode_rounds(
        m, total, q, keys_ptr, values_ptr, tables_ptr + slot * table_stride, head, begin,
        tl.minimum(begin + chunk, position), position, slopes, scale, cap, KV_HEADS, D, HALF, GP, BLOCK_SIZE, BN,
        WINDOW, CAPPED, ALIBI, STAGES,
    )  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    if split == active - 1:
        place = (place_of(tables_ptr, table_stride, slot, position, BLOCK_SIZE) * KV_HEADS + head) * D
        m, total, acc = own_token(
            m, total, acc, a1, a2, k_ptr + t * k_stride + head * D, v_ptr + t * v_stride + head * D, keys_ptr + place,
            values_ptr + place, k_norm_ptr, cos, sin, eps, scale, cap, k_fit, v_fit, D, HALF, CAPPED, NORM, ROPE,
        )  # fmt: skip
    acc = acc * (v_scale / total)[:, None]
    out_at = out_ptr + (t * KV_HEADS + head) * (G * D)
    if active == 1:
        tl.store(out_at + head_offsets(G, GP, D, HALF), acc.to(kind), mask=head_mask(G, GP, D, HALF))
    else:
        finish_split(
            part_ptr, sum_ptr, count_ptr, out_at, acc, m + tl.log2(total), b * KV_HEADS + head, split, active, G, GP, D,
            HALF, SPLITS,
        )  # fmt: skip
