"""Kernels of the real-gated linear recurrent unit (`program.recurrence.RgLru`)."""

import triton
import triton.language as tl

from tokenmill.backends.cuda.kernels.states import chained, row_of, sigmoid, softplus


@triton.jit
def gates(x_ptr, matrices_ptr, biases_ptr, a_ptr, t, there, x_stride, h, c, HEADS: tl.constexpr, D: tl.constexpr,
          BK: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Return for tokens t and columns c of head h: the input times its gate, and the logarithm of the decay.

    `matrices` (2, HEADS, D, D) and `biases` (2, HEADS, D): of the input's gate, then of the recurrence's.
    """
    of_input = tl.zeros([BM, BC], tl.float32)
    of_decay = tl.zeros([BM, BC], tl.float32)
    c_ok = c < D
    for done in range(0, D, BK):
        j = done + tl.arange(0, BK)
        j_ok = j < D
        at = x_ptr + t[:, None] * x_stride + (h * D + j)[None, :]
        x = tl.load(at, mask=there[:, None] & j_ok[None, :], other=0.0)
        matrix = matrices_ptr + h * (D * D) + c[None, :] * D + j[:, None]
        ok = j_ok[:, None] & c_ok[None, :]
        of_input = tl.dot(x, tl.load(matrix, mask=ok, other=0.0), of_input, input_precision="tf32x3")
        other = tl.load(matrix + HEADS * D * D, mask=ok, other=0.0)
        of_decay = tl.dot(x, other, of_decay, input_precision="tf32x3")
    bias = biases_ptr + h * D + c
    of_input = sigmoid(of_input + tl.load(bias, mask=c_ok, other=0.0).to(tl.float32)[None, :])
    of_decay = sigmoid(of_decay + tl.load(bias + HEADS * D, mask=c_ok, other=0.0).to(tl.float32)[None, :])
    own = tl.load(x_ptr + t[:, None] * x_stride + (h * D + c)[None, :], mask=there[:, None] & c_ok[None, :], other=0.0)
    speed = -8.0 * softplus(tl.load(a_ptr + h * D + c, mask=c_ok, other=0.0).to(tl.float32))
    return own.to(tl.float32) * of_input, of_decay * speed[None, :]


@triton.jit(do_not_specialize=["n"])
def lru_single(x_ptr, matrices_ptr, biases_ptr, a_ptr, ring_ptr, out_ptr, pairs_ptr, rows_ptr, x_stride, n,
               HEADS: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
               SOME: tl.constexpr):  # fmt: skip
    """Apply the unit to n rows of one token. Grid (n / BM, HEADS, D / BC). `ring` (slots, 2, HEADS · D) float32."""
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    h = tl.program_id(1)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    there = r < n
    t = r.to(tl.int64)
    if SOME:
        t = tl.load(rows_ptr + r, mask=there, other=0).to(tl.int64)
    slot = tl.load(pairs_ptr + 2 * t, mask=there, other=0).to(tl.int64)
    start = tl.load(pairs_ptr + 2 * t + 1, mask=there, other=0)
    added, log = gates(x_ptr, matrices_ptr, biases_ptr, a_ptr, t, there, x_stride, h, c, HEADS, D, BK, BM, BC)
    root = tl.where((start == 0)[:, None], 1.0, tl.sqrt(1.0 - tl.exp(2.0 * log)))
    ok = there[:, None] & (c < D)[None, :]
    ring = ring_ptr + slot[:, None] * (2 * HEADS * D) + (h * D + c)[None, :]
    before = tl.load(ring + (start % 2)[:, None] * (HEADS * D), mask=ok & (start > 0)[:, None], other=0.0)
    state = tl.exp(log) * before + root * added
    tl.store(ring + ((start + 1) % 2)[:, None] * (HEADS * D), state, mask=ok)
    to = out_ptr + t[:, None] * (HEADS * D) + (h * D + c)[None, :]
    tl.store(to, state.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def lru_gates(x_ptr, matrices_ptr, biases_ptr, a_ptr, chunks_ptr, decays_ptr, added_ptr, x_stride, HEADS: tl.constexpr,
              D: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, L: tl.constexpr):  # fmt: skip
    """Compute decays and what is added to the states, (T, WIDTH) float32, for runs. Grid (chunks, HEADS, D / BC)."""
    first, start, count, _ = row_of(tl.program_id(0), chunks_ptr, chunks_ptr, chunks_ptr, False, True)
    h = tl.program_id(1)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    i = tl.arange(0, L)
    there = i < count
    t = first + i
    added, log = gates(x_ptr, matrices_ptr, biases_ptr, a_ptr, t, there, x_stride, h, c, HEADS, D, BK, L, BC)
    root = tl.where((start + i == 0)[:, None], 1.0, tl.sqrt(1.0 - tl.exp(2.0 * log)))
    at = t[:, None] * (HEADS * D) + (h * D + c)[None, :]
    ok = there[:, None] & (c < D)[None, :]
    tl.store(decays_ptr + at, tl.exp(log), mask=ok)
    tl.store(added_ptr + at, root * added, mask=ok)


@triton.jit
def lru_runs(decays_ptr, added_ptr, ring_ptr, out_ptr, runs_ptr, WIDTH: tl.constexpr, BC: tl.constexpr,
             L: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Apply the unit to runs of tokens, L at once, behind `lru_gates`. Grid (runs, WIDTH / BC)."""
    first, start, count, slot = row_of(tl.program_id(0), runs_ptr, runs_ptr, runs_ptr, False, True)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    c_ok = c < WIDTH
    i = tl.arange(0, L)
    ring = ring_ptr + slot * (2 * WIDTH) + c
    state = tl.load(ring + (start % 2) * WIDTH, mask=c_ok & (start > 0), other=0.0)
    for done in tl.range(0, count, L, num_stages=STAGES):
        there = done + i < count
        at = (first + done + i)[:, None] * WIDTH + c[None, :]
        ok = there[:, None] & c_ok[None, :]
        decay = tl.load(decays_ptr + at, mask=ok, other=1.0)
        decay, added = tl.associative_scan((decay, tl.load(added_ptr + at, mask=ok, other=0.0)), 0, chained)
        y = decay * state[None, :] + added
        state = tl.sum(tl.where((i == L - 1)[:, None], y, 0.0), 0)
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=ok)
    tl.store(ring + ((start + count) % 2) * WIDTH, state, mask=c_ok)
