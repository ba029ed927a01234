"""Attention kernels: write keys and values to the paged KV cache, then attend. Both apply norms and rotation first.

A work item is one key-value head and up to `Heads.item_rows` consecutive rows of one sequence. Its (row, query head)
pairs are computed in tiles (`attention_tiles.py`). Invariant: results are bitwise independent of the division into
items and of the assignment of items to threads.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import cast

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.attention_tiles import (
    BEGIN,
    BIAS,
    END,
    OUTPUT,
    PAIR_BYTES,
    QUERY,
    SCORES,
    SINK,
    SLOPE,
    Heads,
    Span,
    Tile,
)
from tokenmill.backends.cpu.ir import atomic_add, compiled, emit, inline, kernel, peek, peek32, poke, poke32
from tokenmill.backends.cpu.isa import Isa
from tokenmill.backends.cpu.pages import KvForm
from tokenmill.backends.cpu.rope import rotate
from tokenmill.backends.cpu.rows import quantize, rms_norm

__all__ = ["Heads", "attend", "named", "write_cache"]

Body = Callable[..., int]

(_X, _X_STRIDE, _OUT, _OUT_STRIDE, _OUT_SCALES, _HEADS, _CACHE, _KEYS, _VALUES) = (
    8 * c
    for c in (
        layout.X,
        layout.X_STRIDE,
        layout.OUT,
        layout.OUT_STRIDE,
        layout.OUT_SCALES,
        layout.WIDTH,
        layout.CACHE,
        layout.KEYS,
        layout.VALUES,
    )
)
(_ROPE, _ROPE_HALF, _ROPE_STRIDE, _SCALE, _CAP, _WINDOW, _EPS, _Q_NORM, _K_NORM, _PAGE_STRIDE) = (
    8 * c
    for c in (
        *(layout.ROPE, layout.ROPE_HALF, layout.ROPE_STRIDE, layout.ATTENTION_SCALE, layout.ATTENTION_CAP),
        *(layout.WINDOW, layout.HEAD_EPS, layout.Q_NORM, layout.K_NORM, layout.PAGE_STRIDE),
    )
)
_KEY_STRIDE, _VALUE_STRIDE, _TABLE_AT = 8 * layout.KEY_STRIDE, 8 * layout.VALUE_STRIDE, 8 * layout.TABLE_AT
_SLOPES, _SINKS, _ROPE_INTERLEAVED = 8 * layout.SLOPES, 8 * layout.SINKS, 8 * layout.ROPE_INTERLEAVED
_CHUNK, _BIASES, _BIAS_STRIDE = 8 * layout.CHUNK, 8 * layout.BIASES, 8 * layout.BIAS_STRIDE
_NUM_PROMPT, _NUM_PROMPT_STRIDE = 8 * layout.NUM_PROMPT, 8 * layout.NUM_PROMPT_STRIDE
(_THREADS, _TOKENS, _ITEMS, _SINGLE_TOKEN, _TABLES, _TABLE_STRIDE, _TILE, _TILE_SIZE) = (
    8 * c
    for c in (
        layout.THREADS,
        layout.TOKENS,
        layout.ITEMS,
        layout.SINGLE_TOKEN,
        layout.TABLES,
        layout.TABLE_STRIDE,
        layout.TILE,
        layout.TILE_SIZE,
    )
)
(_SCORE_AT, _SCORE_SIZE, _ROW, _ROW_SIZE, _POSITIONS, _SEQUENCES, _FIRST, _COUNT) = (
    8 * c
    for c in (
        layout.SCORES,
        layout.SCORES_SIZE,
        layout.ROW,
        layout.ROW_SIZE,
        layout.POSITIONS,
        layout.SEQUENCES,
        layout.FIRST,
        layout.COUNT,
    )
)
_SCORE_ROWS = layout.SCORE_ROWS


@inline
def prepare_head(row: int, r: int, x: int, vectors: int, weight: int) -> None:
    """Normalize and rotate one head of row r in place."""
    if weight:
        rms_norm(vectors, x, weight, x, peek(row + _EPS))
    if peek(row + _ROPE):
        cos_sin = peek(row + _ROPE) + r * peek(row + _ROPE_STRIDE)
        rotate(x, cos_sin, peek(row + _ROPE_HALF), peek(row + _ROPE_INTERLEAVED))


@inline
def blocks_of(row: int, context: int, r: int) -> int:
    """Return the address of the layer's block table of row r's sequence."""
    tables = peek(context + _TABLES) + peek(peek(context + _SEQUENCES) + r * 8) * peek(context + _TABLE_STRIDE)
    return int(tables + peek(row + _TABLE_AT))


@inline
def first_key(row: int, position: int) -> int:
    """Return the position of the first key that a row attends to."""
    window, chunk = peek(row + _WINDOW), peek(row + _CHUNK)
    first = position - position % chunk if chunk else 0
    return max(first, position - window + 1) if window else int(first)


@inline
def input_length(context: int, r: int) -> int:
    """Return the number of tokens of the encoder's input of row r's sequence."""
    slot = peek(peek(context + _SEQUENCES) + r * 8)
    return int(max(peek32(peek(context + _NUM_PROMPT) + slot * peek(context + _NUM_PROMPT_STRIDE)) - 1, 1))


def _bounds(isa: Isa, heads: Heads) -> tuple[Callable[..., int], Callable[..., int]]:
    """Make functions (row, context, r, position) that return the first key that a row attends to, and the end."""
    whole, answer = heads.span in ("input", "cross"), heads.span == "answer"

    def begin(row: int, context: int, r: int, position: int) -> int:
        if whole:
            return 0
        return input_length(context, r) if answer else first_key(row, position)

    def end(row: int, context: int, r: int, position: int) -> int:
        return input_length(context, r) if whole else position + 1

    name = f"{heads.name}_{isa.name}"
    return compiled(f"first_key_{name}", begin), compiled(f"end_of_keys_{name}", end)


def _token_writer(isa: Isa, heads: Heads) -> Callable[..., None]:
    """Make a function (row, context, r, h, position) that writes key and value of head h of row r to the cache."""
    pages, vectors, dim, value_dim, step = heads.pages, heads.dim // 16, heads.dim, heads.value_dim, heads.step
    store = emit(4, pages.store)

    def write(row: int, context: int, r: int, h: int, position: int) -> None:
        key = peek(row + _KEYS) + r * peek(row + _KEY_STRIDE) + h * dim * 4
        value = peek(row + _VALUES) + r * peek(row + _VALUE_STRIDE) + h * value_dim * 4
        prepare_head(row, r, key, vectors, peek(row + _K_NORM))
        block = peek32(blocks_of(row, context, r) + (position >> 4) * 4)
        page = peek(row + _CACHE) + block * peek(row + _PAGE_STRIDE) + h * step
        store(key, value, page, position & 15)

    return compiled(f"write_token_{heads.name}_{isa.name}", write)


def write_cache(isa: Isa, heads: Heads) -> Body:
    """Make the kernel that writes keys and values of all rows to the cache before attention.

    It does nothing if every sequence has one row: then `attend` writes them, unless all heads share a page. Adjacent
    rows share a page, so an item is up to 16 consecutive rows.
    """
    write, dim, group, vectors = _token_writer(isa, heads), heads.dim, heads.group, heads.dim // 16
    shared, always = heads.latent > 0, heads.writes_first

    def body(tid: int, row: int, context: int, counter: int) -> int:
        if peek(context + _SINGLE_TOKEN) and not always:
            return 1
        rows, kv_heads = peek(context + _TOKENS), 1 if shared else peek(row + _HEADS)
        many = min(16, max(1, rows // (2 * peek(context + _THREADS))))
        while True:
            first = atomic_add(counter, 1) * many
            if first >= rows:
                return 0
            for r in range(first, min(first + many, rows)):
                position = peek(peek(context + _POSITIONS) + r * 8)
                query = peek(row + _X) + r * peek(row + _X_STRIDE)
                for h in range(0 if always else kv_heads * group):
                    prepare_head(row, r, query + h * dim * 4, vectors, peek(row + _Q_NORM))
                for h in range(kv_heads):
                    write(row, context, r, h, position)

    name = heads.kernels[0]
    return kernel(name, compiled(f"{name}_{isa.name}", body))


def _tile(isa: Isa, heads: Heads, pairs: int) -> Callable[..., None]:
    """Make a function that attends for `pairs` pairs.

    Its parameters: (p0, n, table, kv, stride, pair, scores, bytes of a row of scores, factor, cap).
    """
    code, few = Tile(isa, heads, pairs), heads.scored(isa, pairs)
    scores, softmax, values = emit(8, Tile(isa, heads, few).scores), emit(6, code.softmax), emit(6, code.values)

    def attend(
        p0: int, n: int, table: int, kv: int, stride: int, pair: int, at: int, size: int, factor: int, cap: int
    ) -> None:
        for r in range(pairs):
            poke(pair + r * PAIR_BYTES + SCORES, at + r * size)
        for r in range(0, pairs, few):
            scores(p0, n, table, kv, stride, pair + min(r, pairs - few) * PAIR_BYTES, factor, cap)
        softmax(p0, n, table, kv, stride, pair)
        values(p0, n, table, kv, stride, pair)

    return compiled(f"attend{pairs}_{heads.name}_{isa.name}", attend)


def _pair_writer(isa: Isa, heads: Heads) -> Callable[..., None]:
    """Make a function (row, context, r0, n, h, pairs, tile) that writes the words of an item's pairs."""
    group, dim, vectors, alibi, sinks = heads.group, heads.dim, heads.dim // 16, heads.alibi, heads.sinks
    value_dim, shared, biased = heads.value_dim, heads.writes_first, heads.biased
    begin, end = _bounds(isa, heads)

    def write(row: int, context: int, r0: int, n: int, h: int, pairs: int, tile: int) -> None:
        position = peek(peek(context + _POSITIONS) + r0 * 8)
        for j in range(n * group):
            r, head, pair = r0 + j // group, h * group + j % group, pairs + j * PAIR_BYTES
            query, p = peek(row + _X) + r * peek(row + _X_STRIDE) + head * dim * 4, position + j // group
            if peek(context + _SINGLE_TOKEN) and not shared:
                prepare_head(row, r, query, vectors, peek(row + _Q_NORM))
            out = peek(row + _OUT) + r * peek(row + _OUT_STRIDE) + head * value_dim * 4
            poke(pair + QUERY, query)
            poke(pair + OUTPUT, tile + j * value_dim * 4 if peek(row + _OUT_SCALES) else out)
            poke(pair + END, end(row, context, r, p))
            poke(pair + BEGIN, begin(row, context, r, p))
            if biased:
                poke(pair + BIAS, peek(row + _BIASES) + head * peek(row + _BIAS_STRIDE) - p * 4)
            if alibi:
                poke32(pair + SLOPE, peek32(peek(row + _SLOPES) + head * 4))
            if sinks:
                poke32(pair + SINK, peek32(peek(row + _SINKS) + head * 4))

    return compiled(f"write_pairs_{heads.name}_{isa.name}", write)


def _item(isa: Isa, heads: Heads) -> Callable[..., None]:
    """Make a function (row, context, tid, r0, n, h) that computes attention of head h for rows [r0, r0 + n)."""
    group, dim, page = heads.group, heads.value_dim, heads.step
    big, small = heads.tiles(isa)
    many, few, write_pairs = _tile(isa, heads, big), _tile(isa, heads, small), _pair_writer(isa, heads)

    def item(row: int, context: int, tid: int, r0: int, n: int, h: int) -> None:
        pairs = peek(context + _ROW) + tid * peek(context + _ROW_SIZE)
        tile = peek(context + _TILE) + tid * peek(context + _TILE_SIZE)
        write_pairs(row, context, r0, n, h, pairs, tile)
        p0, last = peek(pairs + BEGIN) >> 4, peek(pairs + (n * group - 1) * PAIR_BYTES + END)
        stride = peek(row + _PAGE_STRIDE)
        table, kv, count = blocks_of(row, context, r0), peek(row + _CACHE) + h * page, ((last + 15) >> 4) - p0
        size, factor, cap = peek(context + _SCORE_SIZE), peek(row + _SCALE), peek(row + _CAP)
        scores = peek(context + _SCORE_AT) + tid * _SCORE_ROWS * size
        j = 0
        while j < n * group:
            # The last tile may overlap the one before it: computing pairs twice is cheaper than a tile of every size.
            if n * group >= big:
                j = min(j, n * group - big)
                many(p0, count, table, kv, stride, pairs + j * PAIR_BYTES, scores, size, factor, cap)
                j += big
            else:
                j = min(j, n * group - small)
                few(p0, count, table, kv, stride, pairs + j * PAIR_BYTES, scores, size, factor, cap)
                j += small
        if peek(row + _OUT_SCALES):
            at, scales = h * group * dim, peek(row + _OUT_SCALES)
            for m in range(n):
                out, by = (r0 + m) * peek(row + _OUT_STRIDE) + at, (r0 + m) * (peek(row + _OUT_STRIDE) // 4) + at // 4
                quantize(group * dim // 32, tile + m * group * dim * 4, peek(row + _OUT) + out, scales + by)

    return compiled(f"attend_item_{heads.name}_{isa.name}", item)


def _beginning(isa: Isa, heads: Heads) -> Callable[..., None]:
    """Make a function (row, context, r0, n, h) that prefetches the first pages of an item.

    It skips items of several rows: these belong to a prompt, whose pages are in the processor's cache already.
    """
    early, page = emit(5, Tile(isa, heads, 1).begin), heads.step
    begin, end = _bounds(isa, heads)

    def prefetch(row: int, context: int, r0: int, n: int, h: int) -> None:
        if n > 1:
            return
        position = peek(peek(context + _POSITIONS) + r0 * 8)
        p0, last = begin(row, context, r0, position) >> 4, end(row, context, r0, position)
        stride = peek(row + _PAGE_STRIDE)
        early(p0, ((last + 15) >> 4) - p0, blocks_of(row, context, r0), peek(row + _CACHE) + h * page, stride)

    return compiled(f"attend_begin_{heads.name}_{isa.name}", prefetch)


def attend(isa: Isa, heads: Heads) -> Body:
    """Make the kernel that computes attention of all items. If `write_cache` does nothing, it also writes the cache.

    While many items are left, a thread takes its next item early and prefetches its first pages.
    """
    item, write, prefetch = _item(isa, heads), _token_writer(isa, heads), _beginning(isa, heads)
    shared = heads.writes_first

    def body(tid: int, row: int, context: int, counter: int) -> int:
        kv_heads, first, count = peek(row + _HEADS), peek(context + _FIRST), peek(context + _COUNT)
        items = peek(context + _ITEMS) * kv_heads
        few = items - 2 * peek(context + _THREADS)
        i, prefetched = atomic_add(counter, 1), False
        while i < items:
            h, r0, n = i % kv_heads, peek(first + i // kv_heads * 8), peek(count + i // kv_heads * 8)
            if not prefetched:
                prefetch(row, context, r0, n, h)
            following, prefetched = -1, i < few
            if prefetched:
                following = atomic_add(counter, 1)
                at = following // kv_heads * 8
                if following < items:
                    prefetch(row, context, peek(first + at), peek(count + at), following % kv_heads)
            if peek(context + _SINGLE_TOKEN) and not shared:
                write(row, context, r0, h, peek(peek(context + _POSITIONS) + r0 * 8))
            item(row, context, tid, r0, n, h)
            i = following if prefetched else atomic_add(counter, 1)
        return 0

    name = heads.kernels[1]
    return kernel(name, compiled(f"{name}_{isa.name}", body))


_KERNEL_NAME = re.compile(
    r"(write|attend)_(f16|int8)_(\d+)x(\d+)"
    r"(_capped)?(_alibi)?(_sinks)?(?:_latent(\d+))?(?:_(input|answer|cross))?"
)


def named(name: str, isa: Isa) -> Body:
    """Make the kernel of a name. Raises KeyError for a name that does not describe an attention kernel."""
    match = _KERNEL_NAME.fullmatch(name)
    if match is None:
        raise KeyError(name)
    form: KvForm = "f16" if match[2] == "f16" else "int8"
    capped, alibi, sinks = map(bool, match.group(5, 6, 7))
    span = cast("Span", match[9] or "")
    heads = Heads(form, int(match[3]), int(match[4]), capped, alibi, sinks, int(match[8] or 0), span)
    return write_cache(isa, heads) if match[1] == "write" else attend(isa, heads)
