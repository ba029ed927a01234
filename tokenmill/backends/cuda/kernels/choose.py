"""The next token of greedy rows and of rows with a temperature alone. The rules: `backends/sampling.py`."""

import triton
import triton.language as tl

from tokenmill.backends.cuda.kernels.parameters import LEAST_TEMPERATURE, SEED_HIGH, SEED_LOW, TEMPERATURE


@triton.jit
def mix(x):
    """Apply lowbias32 to unsigned 32-bit integers."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_key(low, high, position):
    """Return the key of (seed, position), which are passed as int32 of the same bits."""
    low, high = low.to(tl.uint32, bitcast=True), high.to(tl.uint32, bitcast=True)
    return mix(low ^ mix(high ^ mix(position.to(tl.uint32, bitcast=True))))


@triton.jit
def noise_of(key, ids):
    """Return the Gumbel noise of token ids (int32) under a key."""
    bits = mix(ids.to(tl.uint32, bitcast=True) * 0x9E3779B9 + key) & 0x7FFFFFFF
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.99999994)
    series = u * (1.0 + u * (0.5 + u * (0.3333333333 + u * 0.25)))  # -log1p(-u) where 1 - u would lose digits
    return -tl.log(tl.where(u < 0.01, series, -tl.log(1.0 - u)))


@triton.jit
def best_of(values, ids):
    """Return the largest value, and the smallest id that has it."""
    most = tl.max(values, 0)
    return most, tl.min(tl.where(values == most, ids, 2147483647), 0)


@triton.jit
def best_of_chunk(row, x, first, end, scale, key, NOISE: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """Return `best_of` the logits [first, end), times `scale` plus noise; infinity if one is NaN.

    `x`: the first BLOCK of them. Each block is loaded while the one before is processed.
    """
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    ids = tl.zeros([BLOCK], tl.int32)
    o = first + tl.arange(0, BLOCK)
    for _ in range(ROUNDS):
        ahead = tl.load(row + o + BLOCK, mask=o + BLOCK < end, other=float("-inf"))
        y = x.to(tl.float32)
        y = tl.where(y == y, y, float("inf"))
        if NOISE:
            y = y * scale + noise_of(key, o)
        better = y > best
        best = tl.where(better, y, best)
        ids = tl.where(better, o, ids)
        x = ahead
        o += BLOCK
    return best_of(best, ids)


@triton.jit
def choose(logits_ptr, pairs_ptr, rows_ptr, parameters_ptr, tokens_ptr, out_ptr, best_ptr, id_ptr, count_ptr,
           tokens_stride, parameters_stride, VOCAB: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
           ROUNDS: tl.constexpr, SOME: tl.constexpr):  # fmt: skip
    """Set out[r] to the id of the largest logit; if the row has a temperature, of logit over temperature plus noise; to
    -1 if a logit is not finite. Append it to the slot's tokens, too.

    SOME: row r is token rows[r] of the step. Grid (R, CHUNKS); CHUNKS · ROUNDS · BLOCK >= VOCAB. The last program of a
    row combines the chunks and leaves the row's count at zero. Launch without contraction of products and sums, which
    the compiler would apply differently at each size.
    """
    r, c = tl.program_id(0), tl.program_id(1)
    row = logits_ptr + r.to(tl.int64) * VOCAB
    first = c * (ROUNDS * BLOCK)
    end = tl.minimum(first + ROUNDS * BLOCK, VOCAB)
    o = first + tl.arange(0, BLOCK)
    x = tl.load(row + o, mask=o < end, other=float("-inf"))  # Under way while the row's parameters are read.
    t = r
    if SOME:
        t = tl.load(rows_ptr + r)
    slot = tl.load(pairs_ptr + 2 * t).to(tl.int64)
    position = tl.load(pairs_ptr + 2 * t + 1) + 1
    at = parameters_ptr + slot * parameters_stride
    temperature = tl.load(at + TEMPERATURE).to(tl.float32, bitcast=True)
    if temperature > 0.0:
        key = noise_key(tl.load(at + SEED_LOW), tl.load(at + SEED_HIGH), position)
        scale = 1.0 / tl.maximum(temperature, LEAST_TEMPERATURE)
        most, found = best_of_chunk(row, x, first, end, scale, key, True, BLOCK, ROUNDS)
    else:
        most, found = best_of_chunk(row, x, first, end, 1.0, tl.full([], 0, tl.uint32), False, BLOCK, ROUNDS)
    tl.store(best_ptr + r * CHUNKS + c, most)
    tl.store(id_ptr + r * CHUNKS + c, found)
    tl.debug_barrier()
    if tl.atomic_add(count_ptr + r, 1, sem="acq_rel") == CHUNKS - 1:
        tl.store(count_ptr + r, 0)
        n = tl.arange(0, CHUNKS)
        most, found = best_of(
            tl.load(best_ptr + r * CHUNKS + n, cache_modifier=".cg"),
            tl.load(id_ptr + r * CHUNKS + n, cache_modifier=".cg"),
        )
        found = tl.where((most < float("inf")) & (most > float("-inf")), found, -1)
        tl.store(out_ptr + r, found)
        tl.store(tokens_ptr + slot * tokens_stride + position, tl.maximum(found, 0))
