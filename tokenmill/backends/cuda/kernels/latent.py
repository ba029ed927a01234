"""Attention to compressed rows (DeepSeek's MLA), of which the cache holds one for each token: `latent` | rotated key.

Single tokens attend to the rows themselves: the expansion of keys is applied to their queries (`absorb`), and that of
values to their results (`expand_values`). For runs of several tokens that would be more work than to expand the rows
(`gather_rows` and a product) and to attend to keys and values of every head (`attend_expanded`).

A head of a query has PLAIN columns and K rotated ones, a value V, a compressed row R. P2, R2, V2 and 2 · HALF are
powers of two of at least PLAIN, R, V and K, and of at least 16.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.backends.cuda.kernels.decode import assigned_split, split_spans
from tokenmill.backends.cuda.kernels.heads import columns, in_head, rotated, to_stored
from tokenmill.backends.cuda.kernels.prefill import merge_splits, part_of


@triton.jit
def tokens_of(rows_ptr, b, ok, first, SOME: tl.constexpr):
    """Return the step's tokens of rows b: with SOME those listed in `rows`, else from `first` on."""
    if SOME:
        return tl.load(rows_ptr + b, mask=ok, other=0).to(tl.int64)
    else:
        return (first + b).to(tl.int64)


@triton.jit
def row_at(block, positions, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Return the offset in the cache of the rows at `positions`, of WIDTH numbers each.

    Block and row of the block are multiplied before they are added: of their sum Triton would assume that every number
    is a multiple of the block's size, and load more numbers at once than the alignment of rows allows.
    """
    return block.to(tl.int64) * (BLOCK_SIZE * WIDTH) + (positions % BLOCK_SIZE) * WIDTH


@triton.jit
def turned(x_ptr, ok, cos_ptr, sin_ptr, positions, K: tl.constexpr, HALF: tl.constexpr, ROPE: tl.constexpr):
    """Return the halves (N, HALF) of the K columns at `x_ptr` (N, 1), rotated by `positions`. ROPE: as of `rotated`."""
    j = tl.arange(0, HALF)[None, :]
    cos = tl.zeros([1, HALF], tl.float32)
    sin = cos
    if ROPE != 0:
        at = positions.to(tl.int64)[:, None] * (K // 2) + j
        cos = tl.load(cos_ptr + at, mask=ok & (j < K // 2), other=0.0)
        sin = tl.load(sin_ptr + at, mask=ok & (j < K // 2), other=0.0)
    return rotated(x_ptr, ok, x_ptr, cos, sin, 0.0, K, HALF, False, ROPE)


@triton.jit
def write_rows(latent_ptr, key_ptr, cache_ptr, tables_ptr, cos_ptr, sin_ptr, t, ok, slots, positions, part,
               latent_stride, key_stride, table_stride, fit, R: tl.constexpr, BR: tl.constexpr, K: tl.constexpr,
               HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROPE: tl.constexpr):  # fmt: skip
    """Write a part of the compressed rows of tokens t to their places in the cache: BR columns, of the first part the
    rotated key, too. An 8-bit cache holds numbers times `fit`.
    """
    block = tl.load(tables_ptr + slots * table_stride + positions // BLOCK_SIZE, mask=ok, other=0)
    to = cache_ptr + row_at(block, positions, R + K, BLOCK_SIZE)[:, None]
    kind: tl.constexpr = latent_ptr.dtype.element_ty
    stored: tl.constexpr = cache_ptr.dtype.element_ty
    r = part * BR + tl.arange(0, BR)[None, :]
    there = ok[:, None] & (r < R)
    x = tl.load(latent_ptr + t[:, None] * latent_stride + r, mask=there, other=0.0)
    tl.store(to + r, to_stored(x, fit, stored), mask=there)
    if part == 0:
        a, b = turned(key_ptr + t[:, None] * key_stride, ok[:, None], cos_ptr, sin_ptr, positions, K, HALF, ROPE)
        j = tl.arange(0, HALF)[None, :]
        of_half = ok[:, None] & (j < K // 2)
        tl.store(to + R + j, to_stored(a.to(kind), fit, stored), mask=of_half)
        tl.store(to + R + K // 2 + j, to_stored(b.to(kind), fit, stored), mask=of_half)


@triton.jit(do_not_specialize=["first", "n"])
def absorb(q_ptr, latent_ptr, key_ptr, expand_ptr, cache_ptr, out_ptr, pairs_ptr, rows_ptr, tables_ptr, cos_ptr,
           sin_ptr, q_stride, latent_stride, key_stride, table_stride, fit, first, n, HEADS: tl.constexpr,
           PLAIN: tl.constexpr, P2: tl.constexpr, V: tl.constexpr, R: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
           BM: tl.constexpr, BR: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROPE: tl.constexpr,
           ATTEND: tl.constexpr, SOME: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Write n tokens' compressed rows to the cache. With ATTEND also set out (n, HEADS, R + K) to their queries: of
    each head the expansion of keys, transposed, applied to its plain columns, and its rotated columns.

    Grid (n / BM, HEADS + 1, R / BR); without ATTEND (n / BM, 1, R / BR).
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    b = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = b < n
    t = tokens_of(rows_ptr, b, ok, first, SOME)
    slots = tl.load(pairs_ptr + 2 * t, mask=ok, other=0).to(tl.int64)
    positions = tl.load(pairs_ptr + 2 * t + 1, mask=ok, other=0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    if not ATTEND or head == HEADS:
        write_rows(
            latent_ptr, key_ptr, cache_ptr, tables_ptr, cos_ptr, sin_ptr, t, ok, slots, positions, part, latent_stride,
            key_stride, table_stride, fit, R, BR, K, HALF, BLOCK_SIZE, ROPE,
        )  # fmt: skip
    else:
        kind: tl.constexpr = out_ptr.dtype.element_ty
        p = tl.arange(0, P2)
        r = part * BR + tl.arange(0, BR)
        q_at = q_ptr + t[:, None] * q_stride + head * (PLAIN + K)
        x = tl.load(q_at + p[None, :], mask=ok[:, None] & (p < PLAIN)[None, :], other=0.0)
        rows = (head * (PLAIN + V) + p)[:, None].to(tl.int64) * R
        of_keys = tl.load(expand_ptr + rows + r[None, :], mask=(p < PLAIN)[:, None] & (r < R)[None, :], other=0.0)
        to = out_ptr + (b.to(tl.int64) * HEADS + head)[:, None] * (R + K)
        y = tl.dot(x, of_keys, input_precision="ieee")
        tl.store(to + r[None, :], y.to(kind), mask=ok[:, None] & (r < R)[None, :])
        if part == 0:
            first_half, second_half = turned(q_at + PLAIN, ok[:, None], cos_ptr, sin_ptr, positions, K, HALF, ROPE)
            j = tl.arange(0, HALF)[None, :]
            there = ok[:, None] & (j < K // 2)
            tl.store(to + R + j, first_half.to(kind), mask=there)
            tl.store(to + R + K // 2 + j, second_half.to(kind), mask=there)


@triton.jit
def row_rounds(query, query_turned, cache_ptr, table, begin, stop, turned_at, scale, GP: tl.constexpr, R: tl.constexpr,
               R2: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, BN: tl.constexpr,
               STAGES: tl.constexpr):  # fmt: skip
    """Attend to the rows [begin, stop) of a table. Return largest score, sum and weighted rows of each query."""
    r = tl.arange(0, R2)
    j = tl.arange(0, 2 * HALF)
    n = tl.arange(0, BN)
    m = tl.full([GP], -1e30, tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, R2], tl.float32)
    block = tl.load(table + (begin + n) // BLOCK_SIZE, mask=begin + n < stop, other=0)
    for start in tl.range(begin, stop, BN, num_stages=STAGES):
        places = start + n
        ok = places < stop
        at = row_at(block, places, R + K, BLOCK_SIZE)[:, None]
        there, turned_there = ok[:, None], ok[:, None]
        if R != R2:
            there = there & (r < R)[None, :]
        if K != 2 * HALF:
            turned_there = turned_there & in_head(j, K, HALF)[None, :]
        latent = tl.load(cache_ptr + at + r[None, :], mask=there, other=0.0).to(query.dtype)
        key = tl.load(cache_ptr + at + turned_at, mask=turned_there, other=0.0).to(query.dtype)
        s = tl.dot(query_turned, key.T, input_precision="ieee")
        s = tl.dot(query, latent.T, s, input_precision="ieee") * scale
        s = tl.where(ok[None, :], s, -1e30)
        higher = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        fade = tl.exp2(m - higher)
        block = tl.load(table + (places + BN) // BLOCK_SIZE, mask=places + BN < stop, other=0)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(query.dtype), latent, acc * fade[:, None], input_precision="ieee")
        m = higher
    return m, total, acc


@triton.jit(do_not_specialize=["first"])
def attend_rows(q_ptr, cache_ptr, out_ptr, part_ptr, sum_ptr, pairs_ptr, rows_ptr, tables_ptr, items_ptr, table_stride,
                scale, value_scale, first, HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, R: tl.constexpr,
                R2: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, BN: tl.constexpr,
                SPLITS: tl.constexpr, LEAST: tl.constexpr, SOME: tl.constexpr, LISTED: tl.constexpr,
                PDL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Attend from the queries of `absorb` to the compressed rows, G heads at a time, all of which share a row.

    A split stores its result (rows, SPLITS, HEADS, R) and its sums (rows, SPLITS, HEADS), an only one `out` (rows,
    HEADS, R). LISTED: `items` assigns splits to programs. Grid (HEADS / G, rows · SPLITS).
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    b, split = assigned_split(items_ptr, SPLITS, LISTED)
    t = tokens_of(rows_ptr, b, True, first, SOME)
    slot = tl.load(pairs_ptr + 2 * t).to(tl.int64)
    position = tl.load(pairs_ptr + 2 * t + 1)
    _, chunk, active = split_spans(position, 0, BN, SPLITS, LEAST)
    if split >= active:
        return
    begin = split * chunk
    stop = tl.where(split == active - 1, position + 1, begin + chunk)
    g = tl.arange(0, GP)
    r = tl.arange(0, R2)
    j = tl.arange(0, 2 * HALF)
    heads = tl.program_id(0) * G + g
    within = (g < G) & (heads < HEADS)
    q_at = q_ptr + (b.to(tl.int64) * HEADS + heads)[:, None] * (R + K)
    query = tl.load(q_at + r[None, :], mask=within[:, None] & (r < R)[None, :], other=0.0)
    turned_at = R + columns(j, K, HALF)[None, :]
    query_turned = tl.load(q_at + turned_at, mask=within[:, None] & in_head(j, K, HALF)[None, :], other=0.0)
    m, total, acc = row_rounds(
        query, query_turned, cache_ptr, tables_ptr + slot * table_stride, begin, stop, turned_at, scale, GP, R, R2, K,
        HALF, BLOCK_SIZE, BN, STAGES,
    )  # fmt: skip
    acc = acc * (value_scale / total)[:, None]
    there = within[:, None] & (r < R)[None, :]
    if active == 1:
        to = out_ptr + (b.to(tl.int64) * HEADS + heads)[:, None] * R + r[None, :]
        tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=there)
    else:
        at = (b.to(tl.int64) * SPLITS + split) * HEADS + heads
        tl.store(part_ptr + at[:, None] * R + r[None, :], acc, mask=there)
        tl.store(sum_ptr + at, m + tl.log2(total), mask=within)


@triton.jit(do_not_specialize=["first"])
def merge_rows(part_ptr, sum_ptr, out_ptr, pairs_ptr, rows_ptr, first, HEADS: tl.constexpr, R: tl.constexpr,
               BC: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr, SOME: tl.constexpr,
               PDL: tl.constexpr):  # fmt: skip
    """Merge the splits of rows that have several, always in the same order. Grid (rows, HEADS, R / BC)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    b = tl.program_id(0)
    head = tl.program_id(1)
    t = tokens_of(rows_ptr, b, True, first, SOME)
    position = tl.load(pairs_ptr + 2 * t + 1)
    _, _, active = split_spans(position, 0, BN, SPLITS, LEAST)
    if active == 1:
        return
    s = tl.arange(0, SPLITS)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    at = (b.to(tl.int64) * SPLITS + s) * HEADS + head
    sums = tl.load(sum_ptr + at, mask=s < active, other=-1e30)
    weights = tl.exp2(sums - tl.max(sums, 0))
    there = (s < active)[:, None] & (c < R)[None, :]
    parts = tl.load(part_ptr + at[:, None] * R + c[None, :], mask=there, other=0.0)
    made = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out_ptr + (b.to(tl.int64) * HEADS + head) * R + c, made.to(out_ptr.dtype.element_ty), mask=c < R)


@triton.jit(do_not_specialize=["first", "n"])
def expand_values(x_ptr, expand_ptr, out_ptr, rows_ptr, first, n, HEADS: tl.constexpr, PLAIN: tl.constexpr,
                  V: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
                  SOME: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Set the tokens' values of each head to the expansion of x (n, HEADS, R). Grid (n / BM, HEADS, V / BV)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    b = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = b < n
    head = tl.program_id(1)
    v = tl.program_id(2) * BV + tl.arange(0, BV)
    k = tl.arange(0, BK)
    x_at = x_ptr + (b.to(tl.int64) * HEADS + head)[:, None] * R + k[None, :]
    rows = (head * (PLAIN + V) + PLAIN + v)[:, None].to(tl.int64) * R
    acc = tl.zeros([BM, BV], tl.float32)
    for start in tl.range(0, R, BK, num_stages=STAGES):
        x = tl.load(x_at + start, mask=ok[:, None] & (start + k < R)[None, :], other=0.0)
        there = (v < V)[:, None] & (start + k < R)[None, :]
        of_values = tl.load(expand_ptr + rows + start + k[None, :], mask=there, other=0.0)
        acc = tl.dot(x, of_values.T, acc, input_precision="ieee")
    t = tokens_of(rows_ptr, b, ok, first, SOME)
    to = out_ptr + (t * HEADS + head)[:, None] * V + v[None, :]
    tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=ok[:, None] & (v < V)[None, :])


@triton.jit(do_not_specialize=["first"])
def gather_rows(cache_ptr, out_ptr, runs_ptr, tables_ptr, table_stride, scale, first, R: tl.constexpr, K: tl.constexpr,
                WIDTH: tl.constexpr, BM: tl.constexpr, BLOCK_SIZE: tl.constexpr):  # fmt: skip
    """Copy the cached rows of runs (slot, keys, place of the first one in `out`), from run `first` on, to `out` (keys,
    R + K), times `scale`. WIDTH: a power of two of at least R + K. Grid (most keys / BM, runs).
    """
    run = first + tl.program_id(1)
    slot = tl.load(runs_ptr + 3 * run).to(tl.int64)
    count = tl.load(runs_ptr + 3 * run + 1)
    begin = tl.load(runs_ptr + 3 * run + 2).to(tl.int64)
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = t < count
    block = tl.load(tables_ptr + slot * table_stride + t // BLOCK_SIZE, mask=ok, other=0)
    c = tl.arange(0, WIDTH)[None, :]
    there = ok[:, None] & (c < R + K)
    x = tl.load(cache_ptr + row_at(block, t, R + K, BLOCK_SIZE)[:, None] + c, mask=there, other=0.0)
    to = out_ptr + (begin + t)[:, None] * (R + K) + c
    tl.store(to, (x.to(tl.float32) * scale).to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def expanded_rounds(acc, m, total, q, q_turned, positions, expanded_ptr, held_ptr, first, stop, row_width, scale,
                    PLAIN: tl.constexpr, P2: tl.constexpr, V: tl.constexpr, V2: tl.constexpr, R: tl.constexpr,
                    K: tl.constexpr, HALF: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
                    STAGES: tl.constexpr):  # fmt: skip
    """Attend to the expanded keys [first, stop) and update the results. MASKED: as for `prefill.rounds`."""
    p = tl.arange(0, P2)
    v = tl.arange(0, V2)
    j = tl.arange(0, 2 * HALF)
    n = tl.arange(0, BN)
    for start in tl.range(first, stop, BN, num_stages=STAGES):
        t = start + n
        at = t.to(tl.int64)[:, None] * row_width
        turned_at = t.to(tl.int64)[:, None] * (R + K) + columns(j, K, HALF)[None, :]
        if MASKED or P2 != PLAIN or V2 != V or K != 2 * HALF:
            ok = (t < stop)[:, None]
            keys = tl.load(expanded_ptr + at + p[None, :], mask=ok & (p < PLAIN)[None, :], other=0.0)
            turned_keys = tl.load(held_ptr + turned_at, mask=ok & in_head(j, K, HALF)[None, :], other=0.0)
            values = tl.load(expanded_ptr + at + PLAIN + v[None, :], mask=ok & (v < V)[None, :], other=0.0)
        else:
            keys = tl.load(expanded_ptr + at + p[None, :])
            turned_keys = tl.load(held_ptr + turned_at)
            values = tl.load(expanded_ptr + at + PLAIN + v[None, :])
        s = tl.dot(q, keys.T, input_precision="ieee")
        s = tl.dot(q_turned, turned_keys.T, s, input_precision="ieee") * scale
        if MASKED:
            s = tl.where(t[None, :] <= positions[:, None], s, -1e30)
        higher = tl.maximum(m, tl.max(s, 1))
        shares = tl.exp2(s - higher[:, None])
        fade = tl.exp2(m - higher)
        total = total * fade + tl.sum(shares, 1)
        acc = tl.dot(shares.to(q.dtype), values, acc * fade[:, None], input_precision="ieee")
        m = higher
    return acc, m, total


@triton.jit(do_not_specialize=["first_tile", "first_head", "heads", "splits"])
def attend_expanded(q_ptr, held_ptr, expanded_ptr, out_ptr, tiles_ptr, cos_ptr, sin_ptr, part_ptr, sum_ptr, count_ptr,
                    q_stride, first_tile, first_head, heads, splits, scale, HEADS: tl.constexpr, PLAIN: tl.constexpr,
                    P2: tl.constexpr, V: tl.constexpr, V2: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
                    HALF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LEAST: tl.constexpr, ROPE: tl.constexpr,
                    SPLIT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Attend from tiles (first token of the step, its position, tokens, slot, place of the run's first key), of at
    most BM tokens each, to expanded keys and values (keys, heads, PLAIN + V) and rotated keys in `held` (keys, R + K).

    Only `heads` heads from `first_head` on are expanded. Grid (tiles, heads), with SPLIT (tiles, heads, splits):
    several programs then share the keys of a tile.
    """
    tile = first_tile + tl.program_id(0)
    head = first_head + tl.program_id(1)
    token = tl.load(tiles_ptr + 5 * tile).to(tl.int64)
    start = tl.load(tiles_ptr + 5 * tile + 1)
    count = tl.load(tiles_ptr + 5 * tile + 2)
    place = tl.load(tiles_ptr + 5 * tile + 4).to(tl.int64)
    begin, stop, active = part_of(start, count, splits, 0, BN, LEAST, SPLIT)
    if begin >= stop:
        return
    row = tl.arange(0, BM)
    ok = row < count
    positions = start + row
    p = tl.arange(0, P2)
    q_at = q_ptr + (token + row)[:, None] * q_stride + head * (PLAIN + K)
    q = tl.load(q_at + p[None, :], mask=ok[:, None] & (p < PLAIN)[None, :], other=0.0)
    a, b = turned(q_at + PLAIN, ok[:, None], cos_ptr, sin_ptr, positions, K, HALF, ROPE)
    q_turned = tl.reshape(tl.permute(tl.join(a.to(q.dtype), b.to(q.dtype)), (0, 2, 1)), (BM, 2 * HALF))
    row_width = heads.to(tl.int64) * (PLAIN + V)
    own = expanded_ptr + place * row_width + tl.program_id(1) * (PLAIN + V)
    held = held_ptr + place * (R + K) + R
    m = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, V2], tl.float32)
    seen = tl.maximum(tl.minimum(start // BN * BN, stop), begin)  # All queries attend to all keys before it.
    acc, m, total = expanded_rounds(
        acc, m, total, q, q_turned, positions, own, held, begin, seen, row_width, scale, PLAIN, P2, V, V2, R, K, HALF,
        BN, False, STAGES,
    )  # fmt: skip
    acc, m, total = expanded_rounds(
        acc, m, total, q, q_turned, positions, own, held, seen, stop, row_width, scale, PLAIN, P2, V, V2, R, K, HALF,
        BN, True, STAGES,
    )  # fmt: skip
    acc = acc / total[:, None]
    last = True
    if SPLIT:
        last, acc = merge_splits(acc, m + tl.log2(total), part_ptr, sum_ptr, count_ptr, active, splits, BM, V2)
    if last:
        v = tl.arange(0, V2)
        to = out_ptr + ((token + row) * HEADS + head)[:, None] * V + v[None, :]
        tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=ok[:, None] & (v < V)[None, :])
