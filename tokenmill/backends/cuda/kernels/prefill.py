"""Attention of runs of tokens over the paged cache, which already holds keys and values of the run itself.

A tile is a few tokens of one sequence times the query heads that share a key-value head.
"""

import triton
import triton.language as tl

from tokenmill.backends.cuda.kernels.codes8 import numbers
from tokenmill.backends.cuda.kernels.decode import before_keys, first_seen, operand_of, scaled_scores, slices


@triton.jit
def rounds(acc0, acc1, m, total, q0, q1, positions, keys_ptr, values_ptr, table_ptr, head, first, stop, slopes, scale,
           cap, KV_HEADS: tl.constexpr, E: tl.constexpr, BLOCK_SIZE: tl.constexpr, BN: tl.constexpr,
           MASKED: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, ALIBI: tl.constexpr, CODES: tl.constexpr,
           ASM: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Attend to the keys [first, stop) and update the results. MASKED: not every query attends to all of them; without
    it BN divides their number. A cached head has E elements."""
    C: tl.constexpr = q0.shape[1]
    kind: tl.constexpr = q0.dtype
    none: tl.constexpr = 0.0 if CODES == "" else 0
    c = tl.arange(0, C)
    n = tl.arange(0, BN)
    block = tl.load(table_ptr + (first + n) // BLOCK_SIZE, mask=first + n < stop, other=0)
    for start in tl.range(first, stop, BN, num_stages=STAGES):
        t = start + n
        place = block.to(tl.int64) * BLOCK_SIZE + t % BLOCK_SIZE
        at = (place * KV_HEADS + head)[:, None] * E + c[None, :]
        there = (t < stop)[:, None]
        if WINDOW:  # blocks before it may be others'
            there = there & (t >= first_seen(tl.min(positions, 0), WINDOW))[:, None]
        if C != E:
            there = there & (c < E)[None, :]
        if MASKED or C != E:
            keys = tl.load(keys_ptr + at, mask=there, other=none)
        else:
            keys = tl.load(keys_ptr + at)
        s = tl.dot(q0, numbers(keys, 0, CODES, kind, ASM).T, input_precision="ieee")
        if CODES != "":
            s = tl.dot(q1, numbers(keys, 1, CODES, kind, ASM).T, s, input_precision="ieee")
        s = scaled_scores(s, scale, cap, CAPPED)
        if ALIBI:
            s += slopes[:, None] * (t.to(tl.float32)[None, :] - positions.to(tl.float32)[:, None])
        if MASKED:
            seen = t[None, :] <= positions[:, None]
            if WINDOW:
                seen = seen & (t[None, :] >= first_seen(positions, WINDOW)[:, None])
            s = tl.where(seen, s, -1e30)
        higher = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        fade = tl.exp2(m - higher)
        if MASKED or C != E:
            values = tl.load(values_ptr + at, mask=there, other=none)
        else:
            values = tl.load(values_ptr + at)
        block = tl.load(table_ptr + (t + BN) // BLOCK_SIZE, mask=t + BN < stop, other=0)
        total = total * fade + tl.sum(p, 1)
        p = p.to(kind)
        acc0 = tl.dot(p, numbers(values, 0, CODES, kind, ASM), acc0 * fade[:, None], input_precision="ieee")
        if CODES != "":
            acc1 = tl.dot(p, numbers(values, 1, CODES, kind, ASM), acc1 * fade[:, None], input_precision="ieee")
        m = higher
    return acc0, acc1, m, total


@triton.jit
def part_of(start, count, splits, WINDOW: tl.constexpr, BN: tl.constexpr, LEAST: tl.constexpr, SPLIT: tl.constexpr):
    """Return the first and the end of this program's part of a tile's keys, and the number of parts."""
    low = start * 0
    if WINDOW:
        low = first_seen(start, WINDOW) // BN * BN
    stop = start + count
    if SPLIT:
        chunk = tl.maximum(tl.cdiv(stop - low, splits * BN) * BN, LEAST)
        begin = low + tl.program_id(2) * chunk
        return begin, tl.minimum(begin + chunk, stop), tl.cdiv(stop - low, chunk)
    else:
        return low, stop, start * 0 + 1


@triton.jit
def merge_splits(acc, sums, part_ptr, sum_ptr, count_ptr, active, splits, BM: tl.constexpr, WIDTH: tl.constexpr):
    """Store a part's result. Return True for the last part to finish, with all parts merged in order."""
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    row = tl.arange(0, BM)
    at = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    base = tile * splits
    tl.store(part_ptr + (base + tl.program_id(2)).to(tl.int64) * (BM * WIDTH) + at, acc)
    tl.store(sum_ptr + (base + tl.program_id(2)) * BM + row, sums)
    tl.debug_barrier()
    last = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == active - 1
    if last:
        tl.store(count_ptr + tile, 0)
        most = tl.full([BM], -1e38, tl.float32)
        for i in range(active):
            most = tl.maximum(most, tl.load(sum_ptr + (base + i) * BM + row, cache_modifier=".cg"))
        acc = tl.zeros([BM, WIDTH], tl.float32)
        total = tl.zeros([BM], tl.float32)
        for i in range(active):
            weight = tl.exp2(tl.load(sum_ptr + (base + i) * BM + row, cache_modifier=".cg") - most)
            found = tl.load(part_ptr + (base + i).to(tl.int64) * (BM * WIDTH) + at, cache_modifier=".cg")
            total += weight
            acc += found * weight[:, None]
        acc = acc / total[:, None]
    return last, acc


@triton.jit(do_not_specialize=["splits"])
def attend_tiles(q_ptr, keys_ptr, values_ptr, out_ptr, tiles_ptr, tables_ptr, sinks_ptr, slopes_ptr, part_ptr, sum_ptr,
                 count_ptr, table_stride, splits, scale, cap, v_scale, KV_HEADS: tl.constexpr, G: tl.constexpr,
                 D: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 LEAST: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
                 ALIBI: tl.constexpr, INVARIANT: tl.constexpr, SPLIT: tl.constexpr, CODES: tl.constexpr,
                 ASM: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Attend from tiles (first token of the step, its position, tokens, slot), of at most BM // G tokens each. Grid
    (tiles, KV_HEADS), with SPLIT (tiles, KV_HEADS, splits): several programs then share the keys of a tile.

    `scale`, `v_scale`, `sinks`, `slopes`, CODES, ASM: as for `decode`; with CODES the cache is given as int16.
    INVARIANT: a token's result does not depend on its tile. Keys that all queries attend to then have no loop of their
    own, in which the compiler would round differently.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(tiles_ptr + 4 * tile).to(tl.int64)
    start = tl.load(tiles_ptr + 4 * tile + 1)
    count = tl.load(tiles_ptr + 4 * tile + 2)
    slot = tl.load(tiles_ptr + 4 * tile + 3).to(tl.int64)
    begin, stop, active = part_of(start, count, splits, WINDOW, BN, LEAST, SPLIT)
    if begin >= stop:
        return
    row = tl.arange(0, BM)
    within, g = row // G, row % G
    j = tl.arange(0, 2 * HALF)
    at = ((token + within) * KV_HEADS + head)[:, None] * (G * D) + g[:, None] * D + j[None, :]
    ok = (within < count)[:, None] & (within < BM // G)[:, None]
    if D != 2 * HALF:
        ok = ok & (j < D)[None, :]
    q0, q1 = slices(operand_of(tl.load(q_ptr + at, mask=ok, other=0.0), CODES), CODES)
    positions = start + within
    m, total = before_keys(sinks_ptr, head * G + g, g < G, tl.program_id(2) == 0, BM, SINKS)
    slopes = m
    if ALIBI:
        slopes = tl.load(slopes_ptr + head * G + g)
    less: tl.constexpr = 256.0 if CODES == "e4m3" else 1.0
    E: tl.constexpr = D if CODES == "" else D // 2
    scale = scale * less
    acc0 = tl.zeros([BM, q0.shape[1]], tl.float32)
    acc1 = acc0
    table = tables_ptr + slot * table_stride
    if not WINDOW and not INVARIANT:
        seen = tl.maximum(tl.minimum(start // BN * BN, stop), begin)  # All queries attend to all keys before it.
        acc0, acc1, m, total = rounds(
            acc0, acc1, m, total, q0, q1, positions, keys_ptr, values_ptr, table, head, begin, seen, slopes, scale, cap,
            KV_HEADS, E, BLOCK_SIZE, BN, False, WINDOW, CAPPED, ALIBI, CODES, ASM, STAGES,
        )  # fmt: skip
        begin = seen
    acc0, acc1, m, total = rounds(
        acc0, acc1, m, total, q0, q1, positions, keys_ptr, values_ptr, table, head, begin, stop, slopes, scale, cap,
        KV_HEADS, E, BLOCK_SIZE, BN, True, WINDOW, CAPPED, ALIBI, CODES, ASM, STAGES,
    )  # fmt: skip
    acc = acc0
    if CODES != "":
        acc = tl.reshape(tl.join(acc0, acc1), (BM, 2 * HALF))
    acc = acc * (v_scale * less / total)[:, None]
    last = True
    if SPLIT:
        last, acc = merge_splits(acc, m + tl.log2(total), part_ptr, sum_ptr, count_ptr, active, splits, BM, 2 * HALF)
    if last:
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def tile_each(pairs_ptr, rows_ptr, tiles_ptr, SOME: tl.constexpr):
    """Write a tile for each token of a step, with SOME only for those in `rows`. Grid (tokens,)."""
    i = tl.program_id(0)
    t = i
    if SOME:
        t = tl.load(rows_ptr + i)
    tl.store(tiles_ptr + 4 * i, t)
    tl.store(tiles_ptr + 4 * i + 1, tl.load(pairs_ptr + 2 * t + 1))
    tl.store(tiles_ptr + 4 * i + 2, 1)
    tl.store(tiles_ptr + 4 * i + 3, tl.load(pairs_ptr + 2 * t))
