"""Kernels of the recurrence of Mamba and Mamba 2 (`program.recurrence.StateSpace`)."""

import triton
import triton.language as tl

from tokenmill.backends.cuda.kernels.states import chained, row_of, softplus


@triton.jit
def step_of(dt, bias, low, high, LIMITED: tl.constexpr):
    """Return softplus(dt + bias), clamped with LIMITED."""
    step = softplus(dt.to(tl.float32) + bias)
    if LIMITED:
        step = tl.minimum(tl.maximum(step, low), high)
    return step


@triton.jit
def scan_columns(x_ptr, dt_ptr, b_ptr, c_ptr, a_log_ptr, d_ptr, bias_ptr, ring_ptr, out_ptr, pairs_ptr, rows_ptr,
                 runs_ptr, x_stride, dt_stride, b_stride, c_stride, low, high, WIDTH: tl.constexpr, N: tl.constexpr,
                 BC: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, LIMITED: tl.constexpr, SOME: tl.constexpr,
                 RUNS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Scan rows token by token, with heads of one column, which share b and c. Grid (rows, WIDTH / BC).

    `a_log` (WIDTH, N), `ring` (slots, 2, WIDTH, N) float32.
    """
    first, start, count, slot = row_of(tl.program_id(0), pairs_ptr, rows_ptr, runs_ptr, SOME, RUNS)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    n = tl.arange(0, BN)
    col_ok, n_ok = c < WIDTH, n < N
    ok = col_ok[:, None] & n_ok[None, :]
    at = c[:, None] * N + n[None, :]
    decay = -tl.exp(tl.load(a_log_ptr + at, mask=ok, other=0.0).to(tl.float32))
    d = tl.load(d_ptr + c, mask=col_ok, other=0.0).to(tl.float32)
    bias = tl.zeros([BC], tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + c, mask=col_ok, other=0.0).to(tl.float32)
    state = tl.load(ring_ptr + (slot * 2 + start % 2) * (WIDTH * N) + at, mask=ok & (start > 0), other=0.0)
    for i in tl.range(0, count, num_stages=STAGES):
        t = first + i
        x = tl.load(x_ptr + t * x_stride + c, mask=col_ok, other=0.0).to(tl.float32)
        step = step_of(tl.load(dt_ptr + t * dt_stride + c, mask=col_ok, other=0.0), bias, low, high, LIMITED)
        b = tl.load(b_ptr + t * b_stride + n, mask=n_ok, other=0.0).to(tl.float32)
        read = tl.load(c_ptr + t * c_stride + n, mask=n_ok, other=0.0).to(tl.float32)
        state = state * tl.exp(step[:, None] * decay) + (x * step)[:, None] * b[None, :]
        y = tl.sum(state * read[None, :], 1) + d * x
        tl.store(out_ptr + t * WIDTH + c, y.to(out_ptr.dtype.element_ty), mask=col_ok)
    tl.store(ring_ptr + (slot * 2 + (start + count) % 2) * (WIDTH * N) + at, state, mask=ok)


@triton.jit
def scan_column_chunks(x_ptr, dt_ptr, b_ptr, c_ptr, a_log_ptr, d_ptr, bias_ptr, ring_ptr, out_ptr, runs_ptr, x_stride,
                       dt_stride, b_stride, c_stride, low, high, WIDTH: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
                       BC: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr, BIAS: tl.constexpr,
                       LIMITED: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Scan runs of tokens as `scan_columns`, L tokens at once. Grid (runs, WIDTH / BC). UNIT divides the strides.

    Tiles are (L, BN, BC): a thread then has all tokens, and many columns of the state, of a channel.
    """
    first, start, count, slot = row_of(tl.program_id(0), runs_ptr, runs_ptr, runs_ptr, False, True)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    n = tl.arange(0, BN)
    i = tl.arange(0, L)
    col_ok, n_ok = c < WIDTH, n < N
    ok = n_ok[:, None] & col_ok[None, :]
    at = c[None, :] * N + n[:, None]
    decay = -tl.exp(tl.load(a_log_ptr + at, mask=ok, other=0.0).to(tl.float32))
    d = tl.load(d_ptr + c, mask=col_ok, other=0.0).to(tl.float32)
    bias = tl.zeros([BC], tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + c, mask=col_ok, other=0.0).to(tl.float32)
    state = tl.load(ring_ptr + (slot * 2 + start % 2) * (WIDTH * N) + at, mask=ok & (start > 0), other=0.0)
    for done in tl.range(0, count, L, num_stages=STAGES):
        there = done + i < count
        t = (first + done + i)[:, None]
        here, inside = there[:, None] & col_ok[None, :], there[:, None] & n_ok[None, :]
        x = tl.load(x_ptr + t * (x_stride * UNIT) + c[None, :], mask=here, other=0.0).to(tl.float32)
        dt = tl.load(dt_ptr + t * (dt_stride * UNIT) + c[None, :], mask=here, other=0.0)
        step = tl.where(here, step_of(dt, bias[None, :], low, high, LIMITED), 0.0)
        b = tl.load(b_ptr + t * (b_stride * UNIT) + n[None, :], mask=inside, other=0.0).to(tl.float32)
        read = tl.load(c_ptr + t * (c_stride * UNIT) + n[None, :], mask=inside, other=0.0).to(tl.float32)
        kept, added = tl.exp(step[:, None, :] * decay[None, :, :]), (x * step)[:, None, :] * b[:, :, None]
        kept, added = tl.associative_scan((kept, added), 0, chained)
        states = kept * state[None, :, :] + added
        y = tl.sum(states * read[:, :, None], 1) + d[None, :] * x
        state = tl.sum(tl.where((i == L - 1)[:, None, None], states, 0.0), 0)
        tl.store(out_ptr + t * WIDTH + c[None, :], y.to(out_ptr.dtype.element_ty), mask=here)
    tl.store(ring_ptr + (slot * 2 + (start + count) % 2) * (WIDTH * N) + at, state, mask=ok)


@triton.jit
def scan_heads(x_ptr, dt_ptr, b_ptr, c_ptr, a_log_ptr, d_ptr, bias_ptr, ring_ptr, out_ptr, pairs_ptr, rows_ptr,
               runs_ptr, x_stride, dt_stride, b_stride, c_stride, low, high, HEADS: tl.constexpr, GROUPS: tl.constexpr,
               P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr,
               LIMITED: tl.constexpr, SOME: tl.constexpr, RUNS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Scan rows token by token, with heads of P columns and one decay each. Grid (rows, HEADS, P / BP).

    `ring` (slots, 2, HEADS, P, N) float32.
    """
    first, start, count, slot = row_of(tl.program_id(0), pairs_ptr, rows_ptr, runs_ptr, SOME, RUNS)
    h = tl.program_id(1)
    p = tl.program_id(2) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    p_ok, n_ok = p < P, n < N
    ok = p_ok[:, None] & n_ok[None, :]
    group = h // (HEADS // GROUPS) * N
    speed = -tl.exp(tl.load(a_log_ptr + h).to(tl.float32))
    d = tl.load(d_ptr + h).to(tl.float32)
    bias = 0.0
    if BIAS:
        bias = tl.load(bias_ptr + h).to(tl.float32)
    at = (h * P + p)[:, None] * N + n[None, :]
    state = tl.load(ring_ptr + (slot * 2 + start % 2) * (HEADS * P * N) + at, mask=ok & (start > 0), other=0.0)
    for i in tl.range(0, count, num_stages=STAGES):
        t = first + i
        x = tl.load(x_ptr + t * x_stride + h * P + p, mask=p_ok, other=0.0).to(tl.float32)
        step = step_of(tl.load(dt_ptr + t * dt_stride + h), bias, low, high, LIMITED)
        b = tl.load(b_ptr + t * b_stride + group + n, mask=n_ok, other=0.0).to(tl.float32)
        read = tl.load(c_ptr + t * c_stride + group + n, mask=n_ok, other=0.0).to(tl.float32)
        state = state * tl.exp(step * speed) + (x * step)[:, None] * b[None, :]
        y = tl.sum(state * read[None, :], 1) + d * x
        tl.store(out_ptr + (t * HEADS + h) * P + p, y.to(out_ptr.dtype.element_ty), mask=p_ok)
    tl.store(ring_ptr + (slot * 2 + (start + count) % 2) * (HEADS * P * N) + at, state, mask=ok)


@triton.jit
def ready_scan(dt_ptr, b_ptr, c_ptr, a_log_ptr, bias_ptr, chunks_ptr, steps_ptr, totals_ptr, scores_ptr, dt_stride,
               b_stride, c_stride, low, high, TOKENS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
               N: tl.constexpr, L: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
               BIAS: tl.constexpr, LIMITED: tl.constexpr):  # fmt: skip
    """Compute the parts of chunks of at most L tokens that need no state. Grid (chunks, HEADS / BH + GROUPS).

    `steps` and `totals` (HEADS, TOKENS) float32: the steps, and the logarithms of the decay from the chunk's first
    token on. `scores` (TOKENS, GROUPS, L): c · b of the tokens of a chunk. UNIT divides the strides.
    """
    first, _, count, _ = row_of(tl.program_id(0), chunks_ptr, chunks_ptr, chunks_ptr, False, True)
    i = tl.arange(0, L)
    there = i < count
    t = first + i
    part = tl.program_id(1)
    if part < GROUPS:
        n = tl.arange(0, BN)
        inside = there[:, None] & (n < N)[None, :]
        b = tl.load(b_ptr + t[:, None] * (b_stride * UNIT) + (part * N + n)[None, :], mask=inside, other=0.0)
        c = tl.load(c_ptr + t[:, None] * (c_stride * UNIT) + (part * N + n)[None, :], mask=inside, other=0.0)
        scores = tl.dot(c, tl.trans(b), input_precision="tf32x3")
        to = scores_ptr + (t * GROUPS + part)[:, None] * L + i[None, :]
        tl.store(to, scores.to(scores_ptr.dtype.element_ty), mask=there[:, None])
    else:
        h = (part - GROUPS) * BH + tl.arange(0, BH)
        h_ok = h < HEADS
        here = there[:, None] & h_ok[None, :]
        dt = tl.load(dt_ptr + t[:, None] * (dt_stride * UNIT) + h[None, :], mask=here, other=0.0)
        bias = tl.zeros([BH], tl.float32)
        if BIAS:
            bias = tl.load(bias_ptr + h, mask=h_ok, other=0.0).to(tl.float32)
        speed = -tl.exp(tl.load(a_log_ptr + h, mask=h_ok, other=0.0).to(tl.float32))
        step = tl.where(here, step_of(dt, bias[None, :], low, high, LIMITED), 0.0)
        at = h[None, :] * TOKENS + t[:, None]
        tl.store(steps_ptr + at, step, mask=here)
        tl.store(totals_ptr + at, tl.cumsum(step * speed[None, :], 0), mask=here)


@triton.jit
def scan_chunks(x_ptr, b_ptr, c_ptr, d_ptr, steps_ptr, totals_ptr, scores_ptr, ring_ptr, out_ptr, runs_ptr, x_stride,
                b_stride, c_stride, TOKENS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr,
                N: tl.constexpr, L: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
                STAGES: tl.constexpr):  # fmt: skip
    """Scan runs of tokens as `scan_heads`, L tokens at once, behind `ready_scan`. Grid (runs, HEADS, P / BP).

    A chunk is attention with a decaying mask, by products of tiles.
    """
    first, start, count, slot = row_of(tl.program_id(0), runs_ptr, runs_ptr, runs_ptr, False, True)
    h = tl.program_id(1)
    p = tl.program_id(2) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    i = tl.arange(0, L)
    p_ok, n_ok = p < P, n < N
    ok = n_ok[:, None] & p_ok[None, :]
    group = h // (HEADS // GROUPS)
    d = tl.load(d_ptr + h).to(tl.float32)
    at = (h * P + p)[None, :] * N + n[:, None]
    state = tl.load(ring_ptr + (slot * 2 + start % 2) * (HEADS * P * N) + at, mask=ok & (start > 0), other=0.0)
    kind = x_ptr.dtype.element_ty
    steps_ptr += h * TOKENS
    totals_ptr += h * TOKENS
    for done in tl.range(0, count, L, num_stages=STAGES):
        there = done + i < count
        t = first + done + i
        step = tl.load(steps_ptr + t, mask=there, other=0.0)
        last = tl.load(totals_ptr + first + tl.minimum(done + L, count) - 1)
        total = tl.where(there, tl.load(totals_ptr + t, mask=there, other=0.0), last)
        here, inside = there[:, None] & p_ok[None, :], there[:, None] & n_ok[None, :]
        x = tl.load(x_ptr + t[:, None] * (x_stride * UNIT) + (h * P + p)[None, :], mask=here, other=0.0)
        b = tl.load(b_ptr + t[:, None] * (b_stride * UNIT) + (group * N + n)[None, :], mask=inside, other=0.0)
        c = tl.load(c_ptr + t[:, None] * (c_stride * UNIT) + (group * N + n)[None, :], mask=inside, other=0.0)
        scores = tl.load(scores_ptr + (t * GROUPS + group)[:, None] * L + i[None, :], mask=there[:, None], other=0.0)
        between = tl.exp(tl.where(i[:, None] >= i[None, :], total[:, None] - total[None, :], float("-inf")))
        scores = scores.to(tl.float32) * between * step[None, :] + tl.where(i[:, None] == i[None, :], d, 0.0)
        y = tl.dot(c, state.to(kind), input_precision="tf32x3") * tl.exp(total)[:, None]
        y = tl.dot(scores.to(kind), x, y, input_precision="tf32x3")
        left = (x.to(tl.float32) * (step * tl.exp(last - total))[:, None]).to(kind)
        state = tl.dot(tl.trans(b), left, state * tl.exp(last), input_precision="tf32x3")
        to = out_ptr + (t * HEADS + h)[:, None] * P + p[None, :]
        tl.store(to, y.to(out_ptr.dtype.element_ty), mask=here)
    tl.store(ring_ptr + (slot * 2 + (start + count) % 2) * (HEADS * P * N) + at, state, mask=ok)
