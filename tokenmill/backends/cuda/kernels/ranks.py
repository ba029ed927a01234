"""Collective operations of ranks that can write to each other's memory: sums, gathered columns, rank 0's tokens.

Each rank pushes its numbers to the others, sets a flag there, and waits for their flags. A program of a grid meets the
programs of the same number on the other ranks, and nothing else, so the order in which programs run does not matter.
A program counts its launches; the count is the flag's value, and its parity selects one of two places for the numbers.
Two are enough: a rank that has seen the flags of launch n knows that the others have ended launch n - 1. Nothing is
written by the host between launches, so a captured graph can be replayed. Sums are in float32 in the order of ranks,
so all ranks have equal bits.

Arguments that all kernels here have, in this order: `data` and `flags`, the rank's own memory for numbers and for
flags; `deltas`, bytes from there to that of each rank; `counts`, launches by program; `polls`, how often a flag is read
before the wait is given up; `fault`, where the absent rank plus one is then stored.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.backends.cuda.kernels.rows import normed


@triton.jit
def delta_of(deltas_ptr, peer, ITEM: tl.constexpr):
    """Return the distance to a rank's memory in items of so many bytes."""
    return tl.multiple_of(tl.load(deltas_ptr + peer) // ITEM, 16)


@triton.jit
def meet(flags_ptr, deltas_ptr, polls_ptr, fault_ptr, place, value, rank, SIZE: tl.constexpr, LANES: tl.constexpr):
    """Set this rank's flag of `place` on all ranks, after all earlier stores of the program, and wait for theirs.

    LANES: the least power of two that is at least SIZE.
    """
    peers = tl.arange(0, LANES)
    ok = peers < SIZE
    there = tl.load(deltas_ptr + peers, mask=ok, other=0) // 4
    tl.debug_barrier()
    tl.atomic_xchg(flags_ptr + there + (place * SIZE + rank), value, mask=ok, sem="release", scope="sys")
    for peer in range(SIZE):
        flag = flags_ptr + (place * SIZE + peer)
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        if seen - value < 0:
            left = tl.load(polls_ptr)
            while (seen - value < 0) & (left > 0):
                seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
                left -= 1
            if seen - value < 0:
                tl.store(polls_ptr, 0)  # Later waits end at once: the host gives up this engine.
                tl.store(fault_ptr, peer + 1)
    tl.debug_barrier()


@triton.jit
def sum_of(place_ptr, stride, c, ok, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of the ranks' numbers, `stride` apart, in their order."""
    total = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(SIZE):
        total += tl.load(place_ptr + peer * stride + c, mask=ok, other=0.0, cache_modifier=".cg").to(tl.float32)
    return total


@triton.jit(do_not_specialize=["rank"])
def reduce_rows(data_ptr, flags_ptr, deltas_ptr, counts_ptr, polls_ptr, fault_ptr, x_ptr, y_ptr, weight_ptr, bias_ptr,
                total_ptr, out_ptr, x_stride, y_stride, eps, rank, SIZE: tl.constexpr, LANES: tl.constexpr,
                ROWS: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                NORM: tl.constexpr, ADD: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr,
                BIAS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Set total = Σ x over the ranks, with ADD plus y; with NORM out = norm(total), RMS, or LayerNorm if CENTER.

    One shot: all numbers go to all ranks. ROWS, STRIDE: rows that `data` has room for, and numbers of one. Grid
    (rows,).
    """
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    ok = c < WIDTH
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    count = tl.load(counts_ptr + r)
    x = tl.load(x_ptr + r * x_stride + c, mask=ok, other=0.0)
    place = ((count & 1) * ROWS + r) * (SIZE * STRIDE)
    for peer in tl.static_range(SIZE):
        there = delta_of(deltas_ptr, peer, x_ptr.dtype.element_ty.primitive_bitwidth // 8)
        tl.store(data_ptr + there + place + rank * STRIDE + c, x, mask=ok)
    meet(flags_ptr, deltas_ptr, polls_ptr, fault_ptr, r, count + 1, rank, SIZE, LANES)
    tl.store(counts_ptr + r, count + 1)
    total = sum_of(data_ptr + place, STRIDE, c, ok, SIZE, BLOCK).to(total_ptr.dtype.element_ty)
    if ADD:
        y = tl.load(y_ptr + r * y_stride + c, mask=ok, other=0.0).to(tl.float32)
        total = (total.to(tl.float32) + y).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + r * WIDTH + c, total, mask=ok)
    if NORM:
        z = normed(total.to(tl.float32), c, ok, weight_ptr, bias_ptr, eps, WIDTH, CENTER, WEIGHT, BIAS)
        tl.store(out_ptr + r * WIDTH + c, z.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["groups", "rank"])
def reduce_tiles(data_ptr, flags_ptr, deltas_ptr, counts_ptr, polls_ptr, fault_ptr, x_ptr, out_ptr, groups, rank,
                 SIZE: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
                 GROUP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Set out = Σ x over the ranks, of groups · GROUP adjacent numbers.

    Two shots: of SIZE tiles each rank sums one, and sends the sums to all. TILES: programs that `data` has room for.
    Grid (numbers / (SIZE · TILE),).
    """
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, TILE)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    item: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth // 8
    n = groups * GROUP  # A multiple of vectors is loaded and stored by these.
    count = tl.load(counts_ptr + b)
    first = ((count & 1) * TILES + b) * (2 * SIZE * TILE)
    second = first + SIZE * TILE
    for peer in tl.static_range(SIZE):
        at = (b * SIZE + peer) * TILE + c
        x = tl.load(x_ptr + at, mask=at < n, other=0.0)
        tl.store(data_ptr + delta_of(deltas_ptr, peer, item) + first + rank * TILE + c, x)
    meet(flags_ptr, deltas_ptr, polls_ptr, fault_ptr, 2 * b, count + 1, rank, SIZE, LANES)
    total = sum_of(data_ptr + first, TILE, c, c < TILE, SIZE, TILE).to(x_ptr.dtype.element_ty)
    for peer in tl.static_range(SIZE):
        tl.store(data_ptr + delta_of(deltas_ptr, peer, item) + second + rank * TILE + c, total)
    meet(flags_ptr, deltas_ptr, polls_ptr, fault_ptr, 2 * b + 1, count + 1, rank, SIZE, LANES)
    tl.store(counts_ptr + b, count + 1)
    for peer in tl.static_range(SIZE):
        at = (b * SIZE + peer) * TILE + c
        x = tl.load(data_ptr + second + peer * TILE + c, cache_modifier=".cg")
        tl.store(out_ptr + at, x, mask=at < n)


@triton.jit(do_not_specialize=["rank"])
def gather_rows(data_ptr, flags_ptr, deltas_ptr, counts_ptr, polls_ptr, fault_ptr, x_ptr, out_ptr, x_stride, rank,
                SIZE: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, STRIDE: tl.constexpr,
                COLUMNS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
                FIRST: tl.constexpr):  # fmt: skip
    """Set out (rows, WIDTH) to the ranks' COLUMNS columns side by side; what is beyond WIDTH is padding, and dropped.

    FIRST: on rank 0 alone. ROWS, STRIDE: as of `reduce_rows`. Grid (rows, CHUNKS); CHUNKS · BLOCK >= COLUMNS.
    """
    r, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = chunk * BLOCK + tl.arange(0, BLOCK)
    ok = c < COLUMNS
    own = r * CHUNKS + chunk
    count = tl.load(counts_ptr + own)
    x = tl.load(x_ptr + r * x_stride + c, mask=ok, other=0.0)
    place = ((count & 1) * ROWS + r) * (SIZE * STRIDE)
    for peer in tl.static_range(1 if FIRST else SIZE):
        there = delta_of(deltas_ptr, peer, x_ptr.dtype.element_ty.primitive_bitwidth // 8)
        tl.store(data_ptr + there + place + rank * STRIDE + c, x, mask=ok)
    meet(flags_ptr, deltas_ptr, polls_ptr, fault_ptr, own, count + 1, rank, SIZE, LANES)
    tl.store(counts_ptr + own, count + 1)
    if (rank == 0) | (not FIRST):
        for peer in tl.static_range(SIZE):
            x = tl.load(data_ptr + place + peer * STRIDE + c, mask=ok, other=0.0, cache_modifier=".cg")
            tl.store(out_ptr + r * WIDTH + peer * COLUMNS + c, x, mask=ok & (peer * COLUMNS + c < WIDTH))


@triton.jit(do_not_specialize=["rows", "rank"])
def spread_tokens(data_ptr, flags_ptr, deltas_ptr, counts_ptr, polls_ptr, fault_ptr, chosen_ptr, pairs_ptr, rows_ptr,
                  tokens_ptr, tokens_stride, rows, rank, SIZE: tl.constexpr, LANES: tl.constexpr,
                  ROWS: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Set chosen (rows,) to that of rank 0, and append it to the tokens of the slots, as `choose` does.

    SOME: as of `choose`. ROWS: as of `reduce_rows`. Grid (rows / BLOCK,).
    """
    b = tl.program_id(0)
    r = b * BLOCK + tl.arange(0, BLOCK)
    ok = r < rows
    count = tl.load(counts_ptr + b)
    place = (count & 1) * ROWS + r
    if rank == 0:
        chosen = tl.load(chosen_ptr + r, mask=ok, other=0)
        for peer in tl.static_range(SIZE):
            tl.store(data_ptr + delta_of(deltas_ptr, peer, 4) + place, chosen, mask=ok)
    meet(flags_ptr, deltas_ptr, polls_ptr, fault_ptr, b, count + 1, rank, SIZE, LANES)
    tl.store(counts_ptr + b, count + 1)
    if rank != 0:
        found = tl.load(data_ptr + place, mask=ok, other=0, cache_modifier=".cg")
        t = r
        if SOME:
            t = tl.load(rows_ptr + r, mask=ok, other=0)
        slot = tl.load(pairs_ptr + 2 * t, mask=ok, other=0).to(tl.int64)
        position = tl.load(pairs_ptr + 2 * t + 1, mask=ok, other=0) + 1
        tl.store(chosen_ptr + r, found, mask=ok)
        tl.store(tokens_ptr + slot * tokens_stride + position, tl.maximum(found, 0), mask=ok)
