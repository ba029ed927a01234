"""Kernels of the gated delta rule (`program.recurrence.DeltaRule`)."""

import triton
import triton.language as tl

from tokenmill.backends.cuda.kernels.states import row_of, sigmoid, softplus


@triton.jit
def unit(x):
    """Divide a vector by its length."""
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@triton.jit
def correct_rows(q_ptr, k_ptr, v_ptr, a_ptr, b_ptr, a_log_ptr, bias_ptr, ring_ptr, out_ptr, pairs_ptr, rows_ptr,
                 runs_ptr, q_stride, k_stride, v_stride, a_stride, b_stride, rate, scale, HEADS: tl.constexpr,
                 SHARED: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
                 EACH: tl.constexpr, SOME: tl.constexpr, RUNS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Apply the rule to rows token by token. Grid (rows, HEADS, P / BP).

    SHARED heads of v share a head of q and k. EACH: a decay for each of the N rows of the state. `ring` (slots, 2,
    HEADS, N, P) float32.
    """
    first, start, count, slot = row_of(tl.program_id(0), pairs_ptr, rows_ptr, runs_ptr, SOME, RUNS)
    h = tl.program_id(1)
    p = tl.program_id(2) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    p_ok, n_ok = p < P, n < N
    ok = n_ok[:, None] & p_ok[None, :]
    key = h // SHARED * N + n
    speed = -tl.exp(tl.load(a_log_ptr + h).to(tl.float32))
    bias = tl.load(bias_ptr + h * N + n, mask=n_ok, other=0.0).to(tl.float32) if EACH else tl.load(bias_ptr + h)
    at = (h * N + n)[:, None] * P + p[None, :]
    state = tl.load(ring_ptr + (slot * 2 + start % 2) * (HEADS * N * P) + at, mask=ok & (start > 0), other=0.0)
    for i in tl.range(0, count, num_stages=STAGES):
        t = first + i
        q = unit(tl.load(q_ptr + t * q_stride + key, mask=n_ok, other=0.0).to(tl.float32)) * scale
        k = unit(tl.load(k_ptr + t * k_stride + key, mask=n_ok, other=0.0).to(tl.float32))
        v = tl.load(v_ptr + t * v_stride + h * P + p, mask=p_ok, other=0.0).to(tl.float32)
        share = rate * sigmoid(tl.load(b_ptr + t * b_stride + h).to(tl.float32))
        if EACH:
            a = tl.load(a_ptr + t * a_stride + h * N + n, mask=n_ok, other=0.0).to(tl.float32)
            state = state * tl.exp(softplus(a + bias) * speed)[:, None]
        else:
            a = tl.load(a_ptr + t * a_stride + h).to(tl.float32)
            state = state * tl.exp(softplus(a + bias) * speed)
        error = (v - tl.sum(k[:, None] * state, 0)) * share
        state += k[:, None] * error[None, :]
        y = tl.sum(q[:, None] * state, 0)
        tl.store(out_ptr + (t * HEADS + h) * P + p, y.to(out_ptr.dtype.element_ty), mask=p_ok)
    tl.store(ring_ptr + (slot * 2 + (start + count) % 2) * (HEADS * N * P) + at, state, mask=ok)


@triton.jit
def merged_inverse(inverse, lower, L: tl.constexpr, PRECISION: tl.constexpr):
    """Return the inverse of 1 + `lower`, an (L, L) tile of zeros on and above the diagonal. L: 16, 32 or 64.

    `inverse`: D, the inverses of the blocks of 16 on the diagonal. With M = D · the other blocks, whose fourth power is
    zero, the result is (1 - M)(1 + M²) D.
    """
    if L > 16:
        i = tl.arange(0, L) // 16
        others = tl.where(i[:, None] == i[None, :], 0.0, lower)
        m = tl.dot(inverse, others, input_precision=PRECISION)
        if L > 32:
            inverse = tl.dot(tl.dot(m, m, input_precision=PRECISION), inverse, inverse, input_precision=PRECISION)
        inverse -= tl.dot(m, inverse, input_precision=PRECISION)
    return inverse


@triton.jit
def decayed(q, k, total, L: tl.constexpr, KIND: tl.constexpr):
    """Return k · kᵀ and q · kᵀ (L, L), below the diagonal, with a decay for each column: `total`, logarithms (L, N).

    The decays between two tokens are products of two factors, with a token in the middle of each 16 as reference: both
    stay in range for decays to e⁻¹⁰ per token. Clamping changes only products smaller than that. KIND: of the factors,
    not float16, whose range is too small.
    """
    i = tl.arange(0, L)
    keys = tl.zeros([L, L], tl.float32)
    queries = tl.zeros([L, L], tl.float32)
    for first in tl.static_range(0, L, 16):
        reference = tl.sum(tl.where((i == first + 8)[:, None], total, 0.0), 0)[None, :]
        own = ((i >= first) & (i < first + 16))[:, None]
        late = tl.where(own, tl.exp(tl.minimum(total - reference, 80.0)), 0.0)
        early = tl.where((i < first + 16)[:, None], tl.exp(tl.minimum(reference - total, 80.0)), 0.0)
        other = tl.trans((k * early).to(KIND))
        keys = tl.dot((k * late).to(KIND), other, keys, input_precision="tf32x3")
        queries = tl.dot((q * late).to(KIND), other, queries, input_precision="tf32x3")
    return keys, queries


@triton.jit
def invert_blocks(k_ptr, a_ptr, b_ptr, a_log_ptr, bias_ptr, chunks_ptr, inverses_ptr, k_stride, a_stride, b_stride,
                  rate, HEADS: tl.constexpr, SHARED: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr,
                  BN: tl.constexpr, UNIT: tl.constexpr, EACH: tl.constexpr):  # fmt: skip
    """Invert the blocks of 16 on the diagonal of the systems of chunks (see `ready_chunks`), by substitution.

    Grid (chunks · BLOCKS, HEADS), a warp each: nothing waits for other warps. `inverses` (T, HEADS, 16) float32.
    """
    first, _, count, _ = row_of(tl.program_id(0) // BLOCKS, chunks_ptr, chunks_ptr, chunks_ptr, False, True)
    h = tl.program_id(1)
    n, j = tl.arange(0, BN), tl.arange(0, 16)
    i = tl.program_id(0) % BLOCKS * 16 + j
    there, n_ok = i < count, n < N
    if tl.program_id(0) % BLOCKS * 16 >= count:
        return
    ok = there[:, None] & n_ok[None, :]
    t = first + i
    kind = k_ptr.dtype.element_ty
    speed = -tl.exp(tl.load(a_log_ptr + h).to(tl.float32))
    share = rate * sigmoid(tl.load(b_ptr + t * (b_stride * UNIT) + h, mask=there, other=0.0).to(tl.float32))
    k = tl.load(k_ptr + t[:, None] * (k_stride * UNIT) + (h // SHARED * N + n)[None, :], mask=ok, other=0.0)
    k = k.to(tl.float32)
    k *= tl.rsqrt(tl.sum(k * k, 1) + 1e-6)[:, None]
    if EACH:
        a = tl.load(a_ptr + t[:, None] * (a_stride * UNIT) + (h * N + n)[None, :], mask=ok, other=0.0).to(tl.float32)
        a += tl.load(bias_ptr + h * N + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        total = tl.cumsum(tl.where(ok, softplus(a) * speed, 0.0), 0)
        system, _ = decayed(k, k, total, 16, tl.float32 if kind == tl.float32 else tl.bfloat16)
    else:
        a = tl.load(a_ptr + t * (a_stride * UNIT) + h, mask=there, other=0.0).to(tl.float32)
        a = softplus(a + tl.load(bias_ptr + h).to(tl.float32)) * speed
        total = tl.cumsum(tl.where(there, a, 0.0), 0)
        between = tl.exp(tl.where(j[:, None] >= j[None, :], total[:, None] - total[None, :], float("-inf")))
        system = tl.dot(k.to(kind), tl.trans(k.to(kind)), input_precision="tf32x3") * between
    system = tl.where((j[:, None] > j[None, :]) & there[:, None], share[:, None] * system, 0.0)
    inverse = tl.where(j[:, None] == j[None, :], 1.0, 0.0)
    for row in range(1, 16):
        here = (j == row)[:, None]
        factors = tl.sum(tl.where(here, system, 0.0), 0)
        inverse = tl.where(here, inverse - tl.sum(factors[:, None] * inverse, 0)[None, :], inverse)
    tl.store(inverses_ptr + (t * HEADS + h)[:, None] * 16 + j[None, :], inverse, mask=there[:, None])


@triton.jit
def unit_rows(at, ok, scale):
    """Return rows of unit length times `scale` (L, BN) float32, and the factors (L,) that made them so."""
    x = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 1) + 1e-6) * scale
    return x * factor[:, None], factor


@triton.jit
def decayed_alike(q, k, total, i):
    """Return k · kᵀ and q · kᵀ (L, L), where all columns decay alike. `total` (L,): sums of the decays' logarithms."""
    between = tl.exp(tl.where(i[:, None] >= i[None, :], total[:, None] - total[None, :], float("-inf")))
    other = tl.trans(k)
    scores = tl.dot(q, other, input_precision="tf32x3") * between
    return tl.dot(k, other, input_precision="tf32x3") * between, scores


@triton.jit
def ready_chunks(q_ptr, k_ptr, v_ptr, a_ptr, b_ptr, a_log_ptr, bias_ptr, chunks_ptr, inverses_ptr, w_ptr, u_ptr,
                 scores_ptr, last_ptr, queries_ptr, keys_ptr, q_stride, k_stride, v_stride, a_stride, b_stride, rate,
                 scale, TOKENS: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr, N: tl.constexpr,
                 P: tl.constexpr, L: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, UNIT: tl.constexpr,
                 EACH: tl.constexpr):  # fmt: skip
    """Compute the parts of chunks that need no state, behind `invert_blocks`. Grid (chunks, HEADS).

    A chunk has at most L tokens. With S the state before it, and (1 + R) the system that its errors solve: errors =
    u - w · S, out = queries · S + scores · errors, new S = last · S + keysᵀ · errors. `w` (T, HEADS, N), `u` (T, HEADS,
    P), `scores` (T, HEADS, L), `last` (chunks, HEADS, N or 1). `queries` and `keys`: with EACH (T, HEADS, N), else
    (HEADS, TOKENS) float32: the factors of q and k. UNIT divides the strides.
    """
    chunk = tl.program_id(0)
    first, _, count, _ = row_of(chunk, chunks_ptr, chunks_ptr, chunks_ptr, False, True)
    h = tl.program_id(1)
    n, p, i = tl.arange(0, BN), tl.arange(0, BP), tl.arange(0, L)
    there, n_ok, p_ok = i < count, n < N, p < P
    ok = there[:, None] & n_ok[None, :]
    t = first + i
    key, row = (h // SHARED * N + n)[None, :], (t * HEADS + h)[:, None]
    kind = k_ptr.dtype.element_ty
    speed = -tl.exp(tl.load(a_log_ptr + h).to(tl.float32))
    share = sigmoid(tl.load(b_ptr + t * (b_stride * UNIT) + h, mask=there, other=0.0).to(tl.float32))
    share = tl.where(there, rate * share, 0.0)[:, None]
    k, of_k = unit_rows(k_ptr + t[:, None] * (k_stride * UNIT) + key, ok, 1.0)
    q, of_q = unit_rows(q_ptr + t[:, None] * (q_stride * UNIT) + key, ok, scale)
    if EACH:
        a = tl.load(a_ptr + t[:, None] * (a_stride * UNIT) + (h * N + n)[None, :], mask=ok, other=0.0).to(tl.float32)
        a += tl.load(bias_ptr + h * N + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        total = tl.cumsum(tl.where(ok, softplus(a) * speed, 0.0), 0)  # (L, BN)
        last = tl.sum(tl.where((i == L - 1)[:, None], total, 0.0), 0)
        tl.store(last_ptr + (chunk * HEADS + h) * N + n, tl.exp(last), mask=n_ok)
        system, scores = decayed(q, k, total, L, tl.float32 if kind == tl.float32 else tl.bfloat16)
        scores = tl.where(i[:, None] == i[None, :], tl.sum(q * k, 1)[:, None], scores)
        grown = tl.exp(total)
        tl.store(queries_ptr + row * N + n[None, :], (q * grown).to(kind), mask=ok)
        tl.store(keys_ptr + row * N + n[None, :], (k * tl.exp(last[None, :] - total)).to(kind), mask=ok)
    else:
        a = tl.load(a_ptr + t * (a_stride * UNIT) + h, mask=there, other=0.0).to(tl.float32)
        a = softplus(a + tl.load(bias_ptr + h).to(tl.float32)) * speed
        total = tl.cumsum(tl.where(there, a, 0.0), 0)  # (L,)
        last = tl.sum(tl.where(there, a, 0.0), 0)
        tl.store(last_ptr + chunk * HEADS + h, tl.exp(last))
        tl.store(queries_ptr + h * TOKENS + t, of_q * tl.exp(total), mask=there)
        tl.store(keys_ptr + h * TOKENS + t, of_k * tl.exp(last - total), mask=there)
        system, scores = decayed_alike(q.to(kind), k.to(kind), total, i)
        grown = tl.exp(total)[:, None]
    scores = tl.where(i[:, None] >= i[None, :], scores, 0.0)
    tl.store(scores_ptr + row * L + i[None, :], scores.to(kind), mask=there[:, None])
    inputs = (k * grown * share).to(kind)
    system = tl.where(i[:, None] > i[None, :], share * system, 0.0)
    own = (i // 16)[:, None] == (i // 16)[None, :]
    inverse = tl.load(inverses_ptr + row * 16 + (i % 16)[None, :], mask=own & there[:, None], other=0.0)
    inverse = merged_inverse(inverse, system, L, "tf32x3" if kind == tl.float32 else "tf32").to(kind)
    w = tl.dot(inverse, inputs, input_precision="tf32x3")
    tl.store(w_ptr + row * N + n[None, :], w.to(kind), mask=ok)
    here = there[:, None] & p_ok[None, :]
    v = tl.load(v_ptr + t[:, None] * (v_stride * UNIT) + (h * P + p)[None, :], mask=here, other=0.0).to(tl.float32)
    u = tl.dot(inverse, (v * share).to(kind), input_precision="tf32x3")
    tl.store(u_ptr + row * P + p[None, :], u.to(kind), mask=here)


@triton.jit
def correct_chunks(q_ptr, k_ptr, w_ptr, u_ptr, scores_ptr, last_ptr, of_q_ptr, of_k_ptr, ring_ptr, out_ptr, runs_ptr,
                   q_stride, k_stride, TOKENS: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr, N: tl.constexpr,
                   P: tl.constexpr, L: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, UNIT: tl.constexpr,
                   EACH: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Apply the rule to runs of tokens, L tokens at once, behind `ready_chunks`. Grid (runs, HEADS, P / BP).

    With EACH, q and k are the queries and keys of `ready_chunks`, else `of_q` and `of_k` are their factors.
    """
    r = tl.program_id(0)
    first, start, count, slot = row_of(r, runs_ptr, runs_ptr, runs_ptr, False, True)
    h = tl.program_id(1)
    p = tl.program_id(2) * BP + tl.arange(0, BP)
    n, i = tl.arange(0, BN), tl.arange(0, L)
    p_ok, n_ok = p < P, n < N
    ok = n_ok[:, None] & p_ok[None, :]
    chunk = r * 0  # the first one of this run
    for some in range(0, r, 128):
        earlier = some + tl.arange(0, 128)
        chunk += tl.sum((tl.load(runs_ptr + 4 * earlier + 2, mask=earlier < r, other=0) + L - 1) // L, 0)
    at = (h * N + n)[:, None] * P + p[None, :]
    state = tl.load(ring_ptr + (slot * 2 + start % 2) * (HEADS * N * P) + at, mask=ok & (start > 0), other=0.0)
    kind = w_ptr.dtype.element_ty
    key = (h // SHARED * N + n)[None, :]
    for done in tl.range(0, count, L, num_stages=STAGES):
        there = done + i < count
        t = first + done + i
        row = (t * HEADS + h)[:, None]
        inside, here = there[:, None] & n_ok[None, :], there[:, None] & p_ok[None, :]
        w = tl.load(w_ptr + row * N + n[None, :], mask=inside, other=0.0)
        u = tl.load(u_ptr + row * P + p[None, :], mask=here, other=0.0)
        q = tl.load(q_ptr + t[:, None] * (q_stride * UNIT) + key, mask=inside, other=0.0)
        k = tl.load(k_ptr + t[:, None] * (k_stride * UNIT) + key, mask=inside, other=0.0)
        scores = tl.load(scores_ptr + row * L + i[None, :], mask=there[:, None], other=0.0)
        held = state.to(kind)
        errors = u.to(tl.float32) - tl.dot(w, held, input_precision="tf32x3")
        y = tl.dot(q, held, input_precision="tf32x3")
        if EACH:
            last = tl.load(last_ptr + ((chunk + done // L) * HEADS + h) * N + n, mask=n_ok, other=0.0)[:, None]
            left = errors.to(kind)
        else:
            last = tl.load(last_ptr + (chunk + done // L) * HEADS + h)
            y *= tl.load(of_q_ptr + h * TOKENS + t, mask=there, other=0.0)[:, None]
            left = (errors * tl.load(of_k_ptr + h * TOKENS + t, mask=there, other=0.0)[:, None]).to(kind)
        state = tl.dot(tl.trans(k), left, state * last, input_precision="tf32x3")
        y = tl.dot(scores, errors.to(kind), y, input_precision="tf32x3")
        tl.store(out_ptr + row * P + p[None, :], y.to(out_ptr.dtype.element_ty), mask=here)
    tl.store(ring_ptr + (slot * 2 + (start + count) % 2) * (HEADS * N * P) + at, state, mask=ok)
