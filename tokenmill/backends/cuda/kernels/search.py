"""Thresholds of a row of logits without sorting: the k-th largest logit, or the least one of a share of the mass.

A logit's key is an integer with the same order, without the low bits that are constant in half precision. A row is cut
into groups of GROUP neighbours, whose maxima are computed first (`summarize` in `filtered.py`). The maxima alone give a
lower bound of the threshold, and only groups that reach it are listed and read: for a peaked distribution a few
thousand logits of a hundred thousand, for a flat one all of them. The result is exact in either case.

A threshold is the largest key such that the worth of the keys from it on, their number or mass, is at least `need`. The
search divides an interval by four, with three keys a pass.
"""

import triton
import triton.language as tl

COUNT: tl.constexpr = tl.constexpr(0)
"""Worth of a key: 1 for each logit."""
MASS: tl.constexpr = tl.constexpr(1)
"""Worth of a key: its probability, not normalized."""
NEARNESS: tl.constexpr = tl.constexpr(2)
"""Worth as MASS, but keys order scaled logits by nearness to a centre."""

_COARSE: tl.constexpr = tl.constexpr(1 << 16)
"""Width of the interval of 32-bit keys at which a bound stops."""


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """Return a float32's key, which is the same for both zeros. SHIFT: number of low bits to leave out."""
    i = (x + 0.0).to(tl.int32, bitcast=True)
    return (i ^ ((i >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def value_of(key, SHIFT: tl.constexpr):
    """Return the float32 of a key, the inverse of `key_of`."""
    i = (key << SHIFT) | ((key >> 31) & ((1 << SHIFT) - 1))
    return (i ^ ((i >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_from(x, SHIFT: tl.constexpr):
    """Return the smallest key of a logit that is at least x."""
    i = key_of(x, 0)
    return tl.where(i >= 0, i + ((1 << SHIFT) - 1), i) >> SHIFT


@triton.jit
def list_groups(groups_ptr, keys, least):
    """List, in order, the groups whose largest key is at least `least`, and return their number."""
    take = (keys >= least).to(tl.int32)
    tl.debug_barrier()  # All threads have read the list before.
    tl.store(groups_ptr + tl.cumsum(take, 0) - 1, tl.arange(0, keys.shape[0]), mask=take > 0)
    tl.debug_barrier()
    return tl.sum(take, 0)


@triton.jit
def tile_of(row, groups_ptr, i, n, VOCAB: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr):
    """Return logits and ids (TILE, GROUP) of TILE of the n listed groups, from the i-th on. Padding is minus infinity
    and has ids of VOCAB or more."""
    at = i + tl.arange(0, TILE)
    group = tl.load(groups_ptr + at, mask=at < n, other=VOCAB)
    o = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return tl.load(row + o, mask=o < VOCAB, other=float("-inf")).to(tl.float32), o


@triton.jit
def quarter(at, end, part):
    """Return the key `part` quarters of the way from `at` to `end`, both int64."""
    return at + (((end - at) * part + 3) >> 2)


@triton.jit
def least_worth(keys, tops, wholes, key, most, scale, WHAT: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr):
    """Return a lower bound of the worth of logits from `key` on. `tops`, `wholes`: the mass of a group's largest logit,
    and of all its logits."""
    worth = tl.full(keys.shape, 1.0, tl.float32)
    if WHAT == MASS:
        worth = tl.maximum(tops, wholes - (GROUP - 1) * tl.exp((value_of(key, SHIFT) - most) * scale))
    return tl.sum(tl.where(keys >= key, worth, 0.0), 0)


@triton.jit
def bound(keys, tops, wholes, need, most, scale, low, WHAT: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr):
    """Return the largest lower bound of the threshold that the groups' maxima give. `low`: an earlier lower bound."""
    at, end = low.to(tl.int64), key_of(most, SHIFT).to(tl.int64) + 1
    while end - at > (_COARSE >> SHIFT):
        reached = tl.full([], 0, tl.int64)
        for part in tl.static_range(1, 4):
            key = quarter(at, end, part).to(tl.int32)
            reached += (least_worth(keys, tops, wholes, key, most, scale, WHAT, SHIFT, GROUP) >= need).to(tl.int64)
        at, end = quarter(at, end, reached), quarter(at, end, reached + 1)
    return at.to(tl.int32)


@triton.jit
def threshold(row, groups_ptr, n, need, most, scale, center, floor, low, high, WHAT: tl.constexpr, VOCAB: tl.constexpr,
              SHIFT: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Return the threshold among the n listed groups, which is between `low` and `high`.

    With NEARNESS to `center`, keys have all their bits, and only logits whose own key is at least `floor` count.
    """
    at, end = low.to(tl.int64), high.to(tl.int64) + 1
    while end - at > 1:
        first, second, third = quarter(at, end, 1), quarter(at, end, 2), quarter(at, end, 3)
        one = tl.zeros([TILE, GROUP], tl.float32)
        two = tl.zeros([TILE, GROUP], tl.float32)
        three = tl.zeros([TILE, GROUP], tl.float32)
        for i in range(0, n, TILE):
            x, _ = tile_of(row, groups_ptr, i, n, VOCAB, GROUP, TILE)
            worth = tl.full([TILE, GROUP], 1.0, tl.float32)
            keys = key_of(x, SHIFT)
            if WHAT != COUNT:
                scaled = (x - most) * scale
                worth = tl.exp(scaled)
                if WHAT == NEARNESS:
                    worth = tl.where(keys >= floor, worth, 0.0)
                    keys = key_of(-tl.abs(scaled - center), 0)
            one += tl.where(keys >= first.to(tl.int32), worth, 0.0)
            two += tl.where(keys >= second.to(tl.int32), worth, 0.0)
            three += tl.where(keys >= third.to(tl.int32), worth, 0.0)
        reached = (tl.sum(one) >= need).to(tl.int64) + (tl.sum(two) >= need) + (tl.sum(three) >= need)
        at, end = quarter(at, end, reached), quarter(at, end, reached + 1)
    return at.to(tl.int32)


@triton.jit
def moments(row, groups_ptr, n, most, scale, floor, VOCAB: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr,
            TILE: tl.constexpr):  # fmt: skip
    """Return the mass of logits with keys of at least `floor`, and the sum of scaled logits (largest: 0) times mass."""
    total = tl.zeros([TILE, GROUP], tl.float32)
    mean = tl.zeros([TILE, GROUP], tl.float32)
    for i in range(0, n, TILE):
        x, _ = tile_of(row, groups_ptr, i, n, VOCAB, GROUP, TILE)
        scaled = (x - most) * scale
        worth = tl.where(key_of(x, SHIFT) >= floor, tl.exp(scaled), 0.0)
        total += worth
        mean += tl.where(worth > 0.0, worth * scaled, 0.0)  # 0 · -inf is 0
    return tl.sum(total), tl.sum(mean)
