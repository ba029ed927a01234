"""The next token of rows with top-k, top-p or min-p: without sorting, by searching the smallest logit that is kept.

All three keep what is above some logit, so one threshold says it all. It is found from the highest bit of a logit's
ordered bits down, two bits a pass, by counting (top-k) and by adding up probabilities (top-p); ties at it are kept.
"""

import triton
import triton.language as tl

from tokenmill.backends.cuda.kernels.choose import noise_key, noise_of


@triton.jit
def ordered(x):
    """float32 to int32 of the same order."""
    i = x.to(tl.int32, bitcast=True)
    return i ^ ((i >> 31) & 0x7FFFFFFF)


@triton.jit
def largest(row, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit; NaN if there is one."""
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)
    for start in range(0, VOCAB, BLOCK):
        o = start + tl.arange(0, BLOCK)
        x = tl.load(row + o, mask=o < VOCAB, other=float("-inf")).to(tl.float32)
        broken = broken | (x != x).to(tl.int32)
        most = tl.maximum(most, tl.where(x == x, x, float("-inf")))
    return tl.where(tl.max(broken, 0) > 0, float("nan"), tl.max(most, 0))


@triton.jit
def mass(row, key, most, scale, at_least, COUNT: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """How many logits have at least `key`, or their unnormed probabilities; of those with `at_least`."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCAB, BLOCK):
        o = start + tl.arange(0, BLOCK)
        x = tl.load(row + o, mask=o < VOCAB, other=float("-inf")).to(tl.float32)
        worth = tl.full([BLOCK], 1.0, tl.float32)
        if not COUNT:
            worth = tl.exp((x - most) * scale)
        bits = ordered(x)
        total += tl.where((bits >= key) & (bits >= at_least) & (o < VOCAB), worth, 0.0)
    return tl.sum(total, 0)


@triton.jit
def least_kept(row, need, most, scale, at_least, COUNT: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
               BITS: tl.constexpr):  # fmt: skip
    """The largest key such that the logits that have it or more are `need` (of mass, or in number)."""
    key = tl.full([], -2147483648, tl.int32)
    for bit in tl.static_range(30, 30 - BITS, -2):
        step = 1 << bit
        one = key + step
        two = key ^ (-2147483648) if bit == 30 else key + 2 * step
        three = two + step
        first = tl.zeros([BLOCK], tl.float32)
        second = tl.zeros([BLOCK], tl.float32)
        third = tl.zeros([BLOCK], tl.float32)
        for start in range(0, VOCAB, BLOCK):
            o = start + tl.arange(0, BLOCK)
            x = tl.load(row + o, mask=o < VOCAB, other=float("-inf")).to(tl.float32)
            worth = tl.full([BLOCK], 1.0, tl.float32)
            if not COUNT:
                worth = tl.exp((x - most) * scale)
            bits = ordered(x)
            worth = tl.where((bits >= at_least) & (o < VOCAB), worth, 0.0)
            first += tl.where(bits >= one, worth, 0.0)
            second += tl.where(bits >= two, worth, 0.0)
            third += tl.where(bits >= three, worth, 0.0)
        lower = tl.where(tl.sum(first, 0) >= need, one, key)
        key = tl.where(tl.sum(third, 0) >= need, three, tl.where(tl.sum(second, 0) >= need, two, lower))
    return key


@triton.jit
def drawn(row, most, scale, key, noise, random, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The id of the largest logit plus noise among those that have `key` or more."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    ids = tl.full([BLOCK], 2147483647, tl.int32)
    for start in range(0, VOCAB, BLOCK):
        o = start + tl.arange(0, BLOCK)
        x = tl.load(row + o, mask=o < VOCAB, other=float("-inf")).to(tl.float32)
        y = (x - most) * scale + noise_of(noise, o) * random
        y = tl.where((ordered(x) >= key) & (o < VOCAB), y, float("-inf"))
        better = y > best
        best = tl.where(better, y, best)
        ids = tl.where(better, o, ids)
    return tl.min(tl.where(best == tl.max(best, 0), ids, 2147483647), 0)


@triton.jit
def choose_filtered(logits_ptr, pairs_ptr, rows_ptr, parameters_ptr, tokens_ptr, out_ptr, tokens_stride,
                    parameters_stride, VOCAB: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
                    SOME: tl.constexpr):  # fmt: skip
    """As `choose`, with the filters of the row. Grid (R,). BITS: of a logit that may differ, from the highest."""
    r = tl.program_id(0)
    t = r
    if SOME:
        t = tl.load(rows_ptr + r)
    slot = tl.load(pairs_ptr + 2 * t).to(tl.int64)
    position = tl.load(pairs_ptr + 2 * t + 1) + 1
    at = parameters_ptr + slot * parameters_stride
    temperature = tl.load(at).to(tl.float32, bitcast=True)
    noise = noise_key(tl.load(at + 1), tl.load(at + 2), position)
    k = tl.load(at + 3)
    p = tl.load(at + 4).to(tl.float32, bitcast=True)
    min_p = tl.load(at + 5).to(tl.float32, bitcast=True)
    random = (temperature > 0.0).to(tl.float32)
    scale = tl.where(temperature > 0.0, 1.0 / tl.maximum(temperature, 1e-6), 1.0)
    row = logits_ptr + r.to(tl.int64) * VOCAB
    most = largest(row, VOCAB, BLOCK)
    key = tl.full([], -2147483648, tl.int32)
    if temperature > 0.0:
        if min_p > 0.0:
            key = ordered(most + tl.log(min_p) / scale)
        if (k > 0) & (k < VOCAB):
            kept = least_kept(row, k.to(tl.float32), most, scale, -2147483648, True, VOCAB, BLOCK, BITS)
            key = tl.maximum(key, kept)
        if p < 1.0:
            need = p * mass(row, key, most, scale, key, False, VOCAB, BLOCK)
            key = tl.maximum(key, least_kept(row, need, most, scale, key, False, VOCAB, BLOCK, BITS))
    found = drawn(row, most, scale, key, noise, random, VOCAB, BLOCK)
    found = tl.where((most < float("inf")) & (most > float("-inf")), found, -1)
    tl.store(out_ptr + r, found)
    tl.store(tokens_ptr + slot * tokens_stride + position, tl.maximum(found, 0))
