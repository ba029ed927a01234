"""Parts that kernels of layers with a state share, and the kernels of short convolutions.

A slot has a ring of two states: the one after p tokens is at place p % 2 (`backends.steps.STATE_RING`). At position 0
the state is zero, whatever the ring holds.
"""

import triton
import triton.language as tl

from tokenmill.backends.cuda.kernels.rows import activated


@triton.jit
def row_of(r, pairs_ptr, rows_ptr, runs_ptr, SOME: tl.constexpr, RUNS: tl.constexpr):
    """Return a row of a step: its first token, the position of that token, its number of tokens, its slot.

    RUNS: row r of `runs`. SOME: token rows[r]. Neither: token r.
    """
    if RUNS:
        first = tl.load(runs_ptr + 4 * r).to(tl.int64)
        start = tl.load(runs_ptr + 4 * r + 1)
        count = tl.load(runs_ptr + 4 * r + 2)
        slot = tl.load(runs_ptr + 4 * r + 3).to(tl.int64)
    else:
        first = r.to(tl.int64)
        if SOME:
            first = tl.load(rows_ptr + r).to(tl.int64)
        slot = tl.load(pairs_ptr + 2 * first).to(tl.int64)
        start = tl.load(pairs_ptr + 2 * first + 1)
        count = 1
    return first, start, count, slot


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)), precise for small results, too."""
    e = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.where(e < 0.01, e * (1.0 - e * (0.5 - e / 3.0)), tl.log(1.0 + e))


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def chained(decay, added, next_decay, next_added):
    """Return two steps of x -> decay · x + added as one."""
    return decay * next_decay, next_decay * added + next_added


@triton.jit
def same_row(pairs_ptr, t, n, slot, position):
    """Return True where token t of the n tokens of a step is the one of `slot` at `position`."""
    ok = (t >= 0) & (t < n)
    s = tl.load(pairs_ptr + 2 * t, mask=ok, other=-1)
    p = tl.load(pairs_ptr + 2 * t + 1, mask=ok, other=-1)
    return ok & (s == slot) & (p == position)


@triton.jit(do_not_specialize=["n"])
def convolve(x_ptr, weight_ptr, bias_ptr, ring_ptr, pairs_ptr, out_ptr, x_stride, n, WIDTH: tl.constexpr,
             TAPS: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, BT: tl.constexpr,
             BC: tl.constexpr):  # fmt: skip
    """Convolve n tokens of any rows, and apply ACT. Grid (n / BT, WIDTH / BC).

    `weight` (WIDTH, TAPS), `ring` (slots, 2, TAPS - 1, WIDTH): last inputs. Rows of one token write theirs, at another
    place of the ring than they read; `keep_inputs` does it for the others.
    """
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    row_ok, col_ok = t < n, c < WIDTH
    ok = row_ok[:, None] & col_ok[None, :]
    slot = tl.load(pairs_ptr + 2 * t, mask=row_ok, other=0).to(tl.int64)
    position = tl.load(pairs_ptr + 2 * t + 1, mask=row_ok, other=0)
    alone = row_ok & (same_row(pairs_ptr, t - 1, n, slot, position - 1) == 0)
    alone = alone & (same_row(pairs_ptr, t + 1, n, slot, position + 1) == 0)
    written = ring_ptr + (slot * 2 + (position + 1) % 2) * ((TAPS - 1) * WIDTH)
    x = tl.load(x_ptr + t[:, None] * x_stride + c[None, :], mask=ok, other=0.0)
    tl.store(written[:, None] + (TAPS - 2) * WIDTH + c[None, :], x, mask=ok & alone[:, None])
    acc = x.to(tl.float32) * tl.load(weight_ptr + c * TAPS + TAPS - 1, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    within = row_ok  # token t - j is in the row of token t
    before = tl.zeros([BT], tl.int32)  # tokens of the row before token t, as far as they matter
    for j in tl.static_range(1, TAPS):
        within = within & same_row(pairs_ptr, t - j, n, slot, position - j)
        before += within.to(tl.int32)
        start = position - before
        v = tl.load(x_ptr + (t - j)[:, None] * x_stride + c[None, :], mask=ok & within[:, None], other=0.0)
        read = ring_ptr + ((slot * 2 + start % 2) * (TAPS - 1) + TAPS - 1 - j + before) * WIDTH
        kept = row_ok & (within == 0) & (start > 0)
        v += tl.load(read[:, None] + c[None, :], mask=ok & kept[:, None], other=0.0)
        if j < TAPS - 1:
            tl.store(written[:, None] + (TAPS - 2 - j) * WIDTH + c[None, :], v, mask=ok & alone[:, None])
        w = tl.load(weight_ptr + c * TAPS + TAPS - 1 - j, mask=col_ok, other=0.0).to(tl.float32)
        acc += v.to(tl.float32) * w[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + c, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    if ACT != "":
        acc = activated(acc, ACT)
    tl.store(out_ptr + t[:, None] * WIDTH + c[None, :], acc.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def keep_inputs(x_ptr, ring_ptr, runs_ptr, x_stride, WIDTH: tl.constexpr, TAPS: tl.constexpr, BR: tl.constexpr,
                BC: tl.constexpr):  # fmt: skip
    """Write the last TAPS - 1 inputs of each run of tokens to the ring, behind `convolve`. Grid (runs, WIDTH / BC)."""
    first, start, count, slot = row_of(tl.program_id(0), runs_ptr, runs_ptr, runs_ptr, False, True)
    i = tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    ok = (i < TAPS - 1)[:, None] & (c < WIDTH)[None, :]
    at = count - (TAPS - 1) + i  # among the run's tokens; below 0: those of the state before
    x = tl.load(x_ptr + (first + at)[:, None] * x_stride + c[None, :], mask=ok & (at >= 0)[:, None], other=0.0)
    read = ring_ptr + ((slot * 2 + start % 2) * (TAPS - 1) + TAPS - 1 + at) * WIDTH
    x += tl.load(read[:, None] + c[None, :], mask=ok & ((at < 0) & (start > 0))[:, None], other=0.0)
    tl.debug_barrier()  # A short run moves inputs within one place of the ring.
    written = ring_ptr + ((slot * 2 + (start + count) % 2) * (TAPS - 1) + i) * WIDTH
    tl.store(written[:, None] + c[None, :], x, mask=ok)
