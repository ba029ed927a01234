"""Attention of one new token per sequence over paged keys, with its rotation and cache write, in one launch.

Keys and values are the first operand of tensor cores, whose tiles have 16 rows; the query heads that share a key-value
head are the second, whose tiles have 8 columns. 8-bit codes of a cache become numbers in registers: see `codes8.py`. A
sequence's keys may be split over several programs; the last one to finish merges the partial results, always in the
same order. Page numbers are read one round ahead, so that the loads of keys and values are pipelined.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.backends.cuda.kernels.codes8 import numbers
from tokenmill.backends.cuda.kernels.heads import place_of, rotated_at, to_stored


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
                 GP: tl.constexpr, D: tl.constexpr, P: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """Store the result (P, GP) of the only split of a group, or of one of several, of which the last one to finish
    merges all.
    """
    g, place = tl.arange(0, GP), tl.arange(0, P)
    offsets = g[None, :] * D + place[:, None]
    there = (g < G)[None, :] & (place < D)[:, None]
    if active == 1:
        tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=there)
    else:
        at = group * SPLITS + split
        tl.store(part_ptr + at * (G * D) + offsets, acc, mask=there)
        tl.store(sum_ptr + at * G + g, sums, mask=g < G)
        tl.debug_barrier()
        if tl.atomic_add(count_ptr + group, 1, sem="acq_rel") == active - 1:
            tl.store(count_ptr + group, 0)
            merge_splits(part_ptr, sum_ptr, out_ptr, offsets, there, group * SPLITS, active, G, GP, D, P)


@triton.jit
def merge_splits(part_ptr, sum_ptr, out_ptr, offsets, there, base, active, G: tl.constexpr, GP: tl.constexpr,
                 D: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """Merge `active` partial results (SPLITS, G, D), weighted by their sums (SPLITS, G), in order."""
    g = tl.arange(0, GP)
    ok = g < G
    most = tl.full([GP], -1e30, tl.float32)
    for s in range(active):
        most = tl.maximum(most, tl.load(sum_ptr + (base + s) * G + g, mask=ok, other=-1e30, cache_modifier=".cg"))
    total = tl.zeros([GP], tl.float32)
    made = tl.zeros([P, GP], tl.float32)
    for s in range(active):
        found = tl.load(sum_ptr + (base + s) * G + g, mask=ok, other=-1e30, cache_modifier=".cg")
        weight = tl.exp2(found - most)
        total += weight
        part = part_ptr + (base + s) * (G * D) + offsets
        made += tl.load(part, mask=there, other=0.0, cache_modifier=".cg") * weight[None, :]
    tl.store(out_ptr + offsets, (made / total[None, :]).to(out_ptr.dtype.element_ty), mask=there)


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
def own_token(q, k_ptr, v_ptr, key_ptr, value_ptr, mine, place, norm_ptr, cos, sin, eps, k_fit, v_fit, D: tl.constexpr,
              NORM: tl.constexpr, ROPE: tl.constexpr):  # fmt: skip
    """Write the new token's key and value to the cache, if this program is its writer (`mine`). Return the products of
    the queries (GP, P) with that key, and that value, both as they are stored.
    """
    there = place < D
    stored: tl.constexpr = key_ptr.dtype.element_ty
    key = rotated_at(k_ptr, place, there, norm_ptr, cos, sin, eps, D, NORM, ROPE)
    key = to_stored(key.to(q.dtype), k_fit, stored)
    value = to_stored(tl.load(v_ptr + place, mask=there, other=0.0), v_fit, stored)
    tl.store(key_ptr + place, key, mask=there & mine)
    tl.store(value_ptr + place, value, mask=there & mine)
    return tl.sum(q.to(tl.float32) * key.to(tl.float32), 1), value.to(tl.float32)


@triton.jit
def sums_with(s, mine, sinks_ptr, heads, ok, first, N: tl.constexpr, SINKS: tl.constexpr):
    """Return largest scores and sums of N queries that have attended to one token with scores s, if it is `mine`, and
    to no other; and that token's weights. The rest as for `before_keys`.

    The new token is where sums begin: its loads then have their latency in common with those of the queries.
    """
    m, total = before_keys(sinks_ptr, heads, ok, first, N, SINKS)
    s = tl.where(mine, s, -1e30)
    higher = tl.maximum(m, s)
    p = tl.where(mine, tl.exp2(s - higher), 0.0)
    return higher, total * tl.exp2(m - higher) + p, p


@triton.jit
def slopes_of(slopes_ptr, heads, ok, N: tl.constexpr, ALIBI: tl.constexpr):
    """Return the slopes of N heads; zeros without ALiBi."""
    if ALIBI:
        return tl.load(slopes_ptr + heads, mask=ok, other=0.0)
    else:
        return tl.zeros([N], tl.float32)


@triton.jit
def slices(x, CODES: tl.constexpr):
    """Return the even and the odd columns of x (N, P); without CODES all of them twice."""
    if CODES == "":
        return x, x
    else:
        return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def products(elements, q0, q1, CODES: tl.constexpr, ASM: tl.constexpr):
    """Return the products (BN, GP) of cached keys (BN, C) and queries: slices (GP, C)."""
    kind: tl.constexpr = q0.dtype
    s = tl.dot(numbers(elements, 0, CODES, kind, ASM), tl.trans(q0), input_precision="ieee")
    if CODES != "":
        s = tl.dot(numbers(elements, 1, CODES, kind, ASM), tl.trans(q1), s, input_precision="ieee")
    return s


@triton.jit
def decode_rounds(m, total, acc0, acc1, q0, q1, block, keys_ptr, values_ptr, table_ptr, head, first, stop, position,
                  slopes, scale, cap, KV_HEADS: tl.constexpr, E: tl.constexpr, GP: tl.constexpr,
                  BLOCK_SIZE: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
                  ALIBI: tl.constexpr, CODES: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Attend to the keys [first, stop) of a table. Return largest score, sum and weighted values of each query: for
    each slice (C, GP).

    `block`: pages of the first round. A cached head has E elements.
    """
    C: tl.constexpr = q0.shape[1]
    c, n = tl.arange(0, C), tl.arange(0, BN)
    kind: tl.constexpr = q0.dtype
    weights = tl.zeros([BN, GP], tl.float32)
    for start in tl.range(first, stop, BN, num_stages=STAGES):
        t = start + n
        ok = t < stop
        if WINDOW:  # blocks before it may be others'
            ok = ok & (t >= first_seen(position, WINDOW))
        if BN % BLOCK_SIZE == 0:
            inside = n % BLOCK_SIZE
        else:
            inside = t % BLOCK_SIZE
        row = ((block.to(tl.int64) * BLOCK_SIZE + inside) * KV_HEADS + head) * E
        key_ok, value_ok = ok[:, None], ok[None, :]
        if C != E:
            key_ok, value_ok = key_ok & (c < E)[None, :], value_ok & (c < E)[:, None]
        keys = tl.load(keys_ptr + row[:, None] + c[None, :], mask=key_ok, other=0)
        s = scaled_scores(products(keys, q0, q1, CODES, ASM), scale, cap, CAPPED)
        if ALIBI:
            s += slopes[None, :] * (t - position).to(tl.float32)[:, None]
        s = tl.where(ok[:, None], s, -1e30)
        higher = tl.maximum(m, tl.max(s, 0))
        p = tl.exp2(s - higher[None, :])
        fade = tl.exp2(m - higher)
        # Loaded as (C, BN), not transposed behind the load: that would not be pipelined.
        values = tl.load(values_ptr + row[None, :] + c[:, None], mask=value_ok, other=0)
        block = tl.load(table_ptr + (t + BN) // BLOCK_SIZE, mask=t + BN < stop, other=0)
        total = total * fade
        weights = weights * fade[None, :] + p
        p = p.to(kind)
        acc0 = tl.dot(numbers(values, 0, CODES, kind, ASM), p, acc0 * fade[None, :], input_precision="ieee")
        if CODES != "":
            acc1 = tl.dot(numbers(values, 1, CODES, kind, ASM), p, acc1 * fade[None, :], input_precision="ieee")
        m = higher
    return m, total + tl.sum(weights, 0), acc0, acc1


@triton.jit
def token_of(pairs_ptr, rows_ptr, b, SOME: tl.constexpr):
    """Return the step's token of row b, its slot, and its position. SOME: the token is that of `rows`."""
    t = b
    if SOME:
        t = tl.load(rows_ptr + b)
    return t.to(tl.int64), tl.load(pairs_ptr + 2 * t).to(tl.int64), tl.load(pairs_ptr + 2 * t + 1)


@triton.jit
def turn_of(cos_ptr, sin_ptr, position, place, D: tl.constexpr, ROPE: tl.constexpr):
    """Return the cosines and sines of a position for each place (1, P) of a head; zeros without a rotation."""
    cos = tl.zeros_like(place).to(tl.float32)
    sin = cos
    if ROPE != 0:
        at = position.to(tl.int64) * (D // 2) + place % (D // 2)
        cos = tl.load(cos_ptr + at, mask=place < D, other=0.0)
        sin = tl.load(sin_ptr + at, mask=place < D, other=0.0)
    return cos, sin


@triton.jit
def operand_of(q, CODES: tl.constexpr):
    """Return queries as operands: beside codes of 8 bits, 16-bit ones as float16, which is exact in its range."""
    if CODES == "":
        return q
    elif q.dtype == tl.bfloat16:
        return tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    else:
        return q


@triton.jit
def result_of(acc0, acc1, CODES: tl.constexpr):
    """Return weighted values (P, GP), by place, of those of the slices."""
    if CODES == "":
        return acc0
    else:
        return tl.reshape(tl.permute(tl.join(acc0, acc1), (0, 2, 1)), (2 * acc0.shape[0], acc0.shape[1]))


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


@triton.jit(do_not_specialize=["n"])
def list_rows(items_ptr, pairs_ptr, rows_ptr, n, SOME: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr):
    """List the work of `decode` for n rows that are not split, as `list_splits` does: the longest first, so that the
    programs that start last are short, and each multiprocessor gets long ones and short ones. Grid (rows / BM,);
    BLOCK >= n.
    """
    own, row = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BLOCK)
    t, u = own, row
    if SOME:
        t = tl.load(rows_ptr + own, mask=own < n, other=0)
        u = tl.load(rows_ptr + row, mask=row < n, other=0)
    position = tl.load(pairs_ptr + 2 * t + 1, mask=own < n, other=0)[:, None]
    others = tl.load(pairs_ptr + 2 * u + 1, mask=row < n, other=-1)[None, :]
    before = (others > position) | ((others == position) & (row[None, :] < own[:, None]))
    tl.store(items_ptr + 1 + tl.sum(before.to(tl.int32), 1), own * 256, mask=own < n)
    tl.store(items_ptr, n, mask=tl.program_id(0) == 0)


@triton.jit
def decode(q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, key_codes_ptr, value_codes_ptr, out_ptr, pairs_ptr, rows_ptr,
           tables_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, sinks_ptr, slopes_ptr, part_ptr, sum_ptr, count_ptr,
           items_ptr, q_stride, k_stride, v_stride, table_stride, eps, scale, cap, k_fit, v_fit, v_scale,
           KV_HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
           BLOCK_SIZE: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr,
           CAPPED: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
           SOME: tl.constexpr, LISTED: tl.constexpr, PDL: tl.constexpr, CODES: tl.constexpr, ASM: tl.constexpr,
           STAGES: tl.constexpr):  # fmt: skip
    """Attend from single tokens: normalize, rotate and cache their keys and values on the way.

    SOME: only the step's tokens in `rows`. LISTED: `items` assigns splits to programs. GP: at least 8 and G. The cache
    holds keys times `k_fit` and values times `v_fit`, which `scale` and `v_scale` undo. CODES, ASM: see `numbers`; with
    CODES `key_codes`, `value_codes` are the same cache as int16. SINKS: a score by head that takes a share of the
    softmax. ALIBI: slopes by head, in units of log2(e). WINDOW: 0 for all keys, else as of `first_seen`. BN divides
    LEAST. Grid (KV_HEADS, rows · SPLITS).
    """
    head = tl.program_id(0)
    if PDL:
        gdc_wait()
    b, split = assigned_split(items_ptr, SPLITS, LISTED)
    t, slot, position = token_of(pairs_ptr, rows_ptr, b, SOME)
    first, chunk, active = split_spans(position, WINDOW, BN, SPLITS, LEAST)
    if split >= active:
        return
    table_ptr = tables_ptr + slot * table_stride
    begin = first + split * chunk
    stop = tl.minimum(begin + chunk, position)
    n = begin + tl.arange(0, BN)
    block = tl.load(table_ptr + n // BLOCK_SIZE, mask=n < stop, other=0)
    new = (place_of(tables_ptr, table_stride, slot, position, BLOCK_SIZE) * KV_HEADS + head) * D
    place = tl.arange(0, 2 * HALF)[None, :]
    cos, sin = turn_of(cos_ptr, sin_ptr, position, place, D, ROPE)
    g = tl.arange(0, GP)
    q_ptr += t * q_stride + (head * G + g)[:, None] * D
    q_ok = (g < G)[:, None] & (place < D)
    q = rotated_at(q_ptr, place, q_ok, q_norm_ptr, cos, sin, eps, D, NORM, ROPE).to(out_ptr.dtype.element_ty)
    mine = split == active - 1
    s, value = own_token(
        q, k_ptr + t * k_stride + head * D, v_ptr + t * v_stride + head * D, keys_ptr + new, values_ptr + new, mine,
        place, k_norm_ptr, cos, sin, eps, k_fit, v_fit, D, NORM, ROPE,
    )  # fmt: skip
    s = scaled_scores(s, scale, cap, CAPPED)
    m, total, p = sums_with(s, mine, sinks_ptr, head * G + g, g < G, split == 0, GP, SINKS)
    slopes = slopes_of(slopes_ptr, head * G + g, g < G, GP, ALIBI)
    less: tl.constexpr = 256.0 if CODES == "e4m3" else 1.0
    q0, q1 = slices(operand_of(q, CODES), CODES)
    value0, value1 = slices(value, CODES)
    p = (p / less)[None, :]
    m, total, acc0, acc1 = decode_rounds(
        m, total, tl.trans(value0) * p, tl.trans(value1) * p, q0, q1, block, key_codes_ptr, value_codes_ptr, table_ptr,
        head, begin, stop, position, slopes, scale * less, cap, KV_HEADS, D if CODES == "" else D // 2, GP, BLOCK_SIZE,
        BN, WINDOW, CAPPED, ALIBI, CODES, ASM, STAGES,
    )  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    acc = result_of(acc0, acc1, CODES) * (v_scale * less / total)[None, :]
    finish_split(
        part_ptr, sum_ptr, count_ptr, out_ptr + (t * KV_HEADS + head) * (G * D), acc, m + tl.log2(total),
        b * KV_HEADS + head, split, active, G, GP, D, 2 * HALF, SPLITS,
    )  # fmt: skip
