"""Attention of an encoder and a decoder: tiles of tokens, and single tokens over the paged cache.

The keys that a token attends to begin and end where its slot's input does. SPAN: which of the three kinds it is.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.backends.cuda.kernels.decode import finish_split, token_of
from tokenmill.backends.cuda.kernels.heads import place_of, to_stored
from tokenmill.backends.cuda.kernels.parameters import NUM_PROMPT

WITHIN: tl.constexpr = tl.constexpr(0)  # all tokens of an input, whose keys are rows of this run of the encoder
OWN: tl.constexpr = tl.constexpr(1)  # the decoder's tokens so far, behind the input in the cache
CROSS: tl.constexpr = tl.constexpr(2)  # the input's keys in the cache


@triton.jit
def span_of(parameters_ptr, parameters_stride, slot, start, end, SPAN: tl.constexpr):
    """Return the first key and the end of those that the tokens [start, end) of a slot attend to, before a mask."""
    length = tl.maximum(tl.load(parameters_ptr + slot * parameters_stride + NUM_PROMPT) - 1, 1)
    if SPAN == OWN:
        return tl.minimum(length, start), end  # A padding slot's token is at 0, before the end of its input.
    else:
        return length * 0, length


@triton.jit
def bias_at(bias_ptr, head, distance, LONGEST: tl.constexpr):
    """Return the bias of distances, the positions of keys minus those of queries. `bias`: (heads, 2 · LONGEST + 1)."""
    near = tl.minimum(tl.maximum(distance, -LONGEST), LONGEST)
    return tl.load(bias_ptr + head * (2 * LONGEST + 1) + LONGEST + near)


@triton.jit
def write_rows(k_ptr, v_ptr, keys_ptr, values_ptr, pairs_ptr, tables_ptr, k_stride, v_stride, table_stride, k_fit,
               v_fit, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr):  # fmt: skip
    """Write each token's keys and values, WIDTH numbers each, to its place in the cache. Grid (T, WIDTH / BLOCK)."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(pairs_ptr + 2 * t).to(tl.int64)
    place = place_of(tables_ptr, table_stride, slot, tl.load(pairs_ptr + 2 * t + 1), BLOCK_SIZE)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = c < WIDTH
    stored: tl.constexpr = keys_ptr.dtype.element_ty
    keys = tl.load(k_ptr + t * k_stride + c, mask=ok, other=0.0)
    values = tl.load(v_ptr + t * v_stride + c, mask=ok, other=0.0)
    tl.store(keys_ptr + place * WIDTH + c, to_stored(keys, k_fit, stored), mask=ok)
    tl.store(values_ptr + place * WIDTH + c, to_stored(values, v_fit, stored), mask=ok)


@triton.jit
def attend_spans(q_ptr, keys_ptr, values_ptr, out_ptr, tiles_ptr, tables_ptr, parameters_ptr, bias_ptr, q_stride,
                 key_stride, value_stride, table_stride, parameters_stride, scale, v_scale, SPAN: tl.constexpr,
                 HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BLOCK_SIZE: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr, LONGEST: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Attend from tiles (first token of the run, its position, tokens, slot), of at most BM tokens each. What else is
    in the run does not change a token's result.

    `scale` and `bias` are in units of log2(e). P: a power of two, at least D. Grid (tiles, HEADS).
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(tiles_ptr + 4 * tile).to(tl.int64)
    start = tl.load(tiles_ptr + 4 * tile + 1)
    count = tl.load(tiles_ptr + 4 * tile + 2)
    slot = tl.load(tiles_ptr + 4 * tile + 3).to(tl.int64)
    first, stop = span_of(parameters_ptr, parameters_stride, slot, start, start + count, SPAN)
    row, c = tl.arange(0, BM), tl.arange(0, P)
    positions, there = start + row, (c < D)[None, :]
    ok = (row < count)[:, None] & there
    q = tl.load(q_ptr + (token + row)[:, None] * q_stride + head * D + c[None, :], mask=ok, other=0.0)
    m = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, P], tl.float32)
    for begin in tl.range(first, stop, BN, num_stages=STAGES):
        n = begin + tl.arange(0, BN)
        if SPAN == WITHIN:
            place = token - start + n
        else:
            block = tl.load(tables_ptr + slot * table_stride + n // BLOCK_SIZE, mask=n < stop, other=0)
            place = block.to(tl.int64) * BLOCK_SIZE + n % BLOCK_SIZE
        key_ok = (n < stop)[:, None] & there
        at = head * D + c[None, :]
        keys = tl.load(keys_ptr + place[:, None] * key_stride + at, mask=key_ok, other=0.0).to(q.dtype)
        s = tl.dot(q, keys.T, input_precision="ieee") * scale
        if SPAN != CROSS:
            s += bias_at(bias_ptr, head, n[None, :] - positions[:, None], LONGEST)
        seen = (n < stop)[None, :]
        if SPAN == OWN:
            seen = seen & (n[None, :] <= positions[:, None])
        s = tl.where(seen, s, -1e30)
        higher = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        fade = tl.exp2(m - higher)
        values = tl.load(values_ptr + place[:, None] * value_stride + at, mask=key_ok, other=0.0).to(q.dtype)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), values, acc * fade[:, None], input_precision="ieee")
        m = higher
    acc = acc * (v_scale / total)[:, None]
    to = out_ptr + ((token + row)[:, None] * HEADS + head) * D + c[None, :]
    tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def written(q, k_ptr, v_ptr, key_ptr, value_ptr, k_fit, v_fit, there, mine):
    """Write a token's key and value of a head to the cache, if this program is the writer (`mine`). Return the product
    of the query with that key, and that value, both as they are stored.
    """
    stored: tl.constexpr = key_ptr.dtype.element_ty
    key = to_stored(tl.load(k_ptr, mask=there, other=0.0), k_fit, stored)
    value = to_stored(tl.load(v_ptr, mask=there, other=0.0), v_fit, stored)
    tl.store(key_ptr, key, mask=there & mine)
    tl.store(value_ptr, value, mask=there & mine)
    return tl.sum(q * key.to(tl.float32), 0), value.to(tl.float32)


@triton.jit
def single_rounds(m, total, acc, q, keys_ptr, values_ptr, table_ptr, bias_ptr, head, first, stop, position,
                  SPAN: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                  BN: tl.constexpr, LONGEST: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Attend from one query (P,) to the keys [first, stop) of a table. Return largest score, sum, weighted values (P,).

    Pages are read one round ahead.
    """
    c, n = tl.arange(0, P)[None, :], first + tl.arange(0, BN)
    block = tl.load(table_ptr + n // BLOCK_SIZE, mask=n < stop, other=0)
    for start in tl.range(first, stop, BN, num_stages=STAGES):
        n = start + tl.arange(0, BN)
        at = ((block.to(tl.int64) * BLOCK_SIZE + n % BLOCK_SIZE) * HEADS + head)[:, None] * D + c
        ok = (n < stop)[:, None] & (c < D)
        keys = tl.load(keys_ptr + at, mask=ok, other=0.0).to(tl.float32)
        values = tl.load(values_ptr + at, mask=ok, other=0.0).to(tl.float32)
        block = tl.load(table_ptr + (n + BN) // BLOCK_SIZE, mask=n + BN < stop, other=0)
        s = tl.sum(keys * q[None, :], 1)
        if SPAN == OWN:
            s += bias_at(bias_ptr, head, n - position, LONGEST)
        s = tl.where(n < stop, s, -1e30)
        higher = tl.maximum(m, tl.max(s, 0))
        p = tl.exp2(s - higher)
        fade = tl.exp2(m - higher)
        total = total * fade + tl.sum(p, 0)
        acc = acc * fade + tl.sum(p[:, None] * values, 0)
        m = higher
    return m, total, acc


@triton.jit
def attend_single(q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, out_ptr, pairs_ptr, rows_ptr, tables_ptr, parameters_ptr,
                  bias_ptr, part_ptr, sum_ptr, count_ptr, q_stride, k_stride, v_stride, table_stride, parameters_stride,
                  scale, k_fit, v_fit, v_scale, SPAN: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
                  P: tl.constexpr, BLOCK_SIZE: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
                  LEAST: tl.constexpr, LONGEST: tl.constexpr, SOME: tl.constexpr, PDL: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """Attend from single tokens of a decoder; with OWN, cache their keys and values on the way.

    The keys of a token may be split over several programs. A head shares its keys with no other, so scores are sums of
    products, not tiles of tensor cores. SOME: only the step's tokens in `rows`. `k_fit`, `v_fit`: as for `decode`. The
    others are as for `attend_spans`. BN divides LEAST. Grid (HEADS, rows · SPLITS).
    """
    head = tl.program_id(0)
    if PDL:
        gdc_wait()
    b, split = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS
    t, slot, position = token_of(pairs_ptr, rows_ptr, b, SOME)
    first, stop = span_of(parameters_ptr, parameters_stride, slot, position, position, SPAN)
    chunk = tl.maximum(tl.cdiv(stop - first, SPLITS * BN) * BN, LEAST)
    active = tl.maximum(tl.cdiv(stop - first, chunk), 1)
    if split >= active:
        return
    begin = first + split * chunk
    stop = tl.minimum(begin + chunk, stop)
    c = tl.arange(0, P)
    there = c < D
    q = tl.load(q_ptr + t * q_stride + head * D + c, mask=there, other=0.0).to(tl.float32) * scale
    m = tl.full([1], -1e30, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([P], tl.float32)
    if SPAN == OWN:
        mine = split == active - 1
        new = (place_of(tables_ptr, table_stride, slot, position, BLOCK_SIZE) * HEADS + head) * D + c
        k_ptr += t * k_stride + head * D
        v_ptr += t * v_stride + head * D
        score, value = written(q, k_ptr + c, v_ptr + c, keys_ptr + new, values_ptr + new, k_fit, v_fit, there, mine)
        m = tl.where(mine, score + bias_at(bias_ptr, head, 0, LONGEST), m)
        total = tl.where(mine, 1.0, total)
        acc = tl.where(mine, value, acc)
    m, total, acc = single_rounds(
        m, total, acc, q, keys_ptr, values_ptr, tables_ptr + slot * table_stride, bias_ptr, head, begin, stop, position,
        SPAN, HEADS, D, P, BLOCK_SIZE, BN, LONGEST, STAGES,
    )  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    finish_split(
        part_ptr, sum_ptr, count_ptr, out_ptr + (t * HEADS + head) * D, (acc * (v_scale / total))[:, None],
        m + tl.log2(total), b * HEADS + head, split, active, 1, 1, D, P, SPLITS,
    )  # fmt: skip
