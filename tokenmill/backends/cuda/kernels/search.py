"""Thresholds of a row of logits, without sorting it: the k-th largest, the least one that a share of the mass reaches.

A logit's key is an integer of the same order; of half precision the bits that are always the same are left out. A row
is cut into groups of GROUP neighbours, of which the largest logit is known (`summarize` in `filtered.py`). From these
maxima alone follows a key that the threshold is not below; only groups that reach it are listed and read. Of a model
that is sure of itself that is a few thousand logits of a hundred thousand; of one that is not it is all, and exact.

A threshold is the largest key such that the keys from it on are worth `need`: in number, or in mass. It is searched by
quarters, three keys a look.
"""

import triton
import triton.language as tl

COUNT: tl.constexpr = tl.constexpr(0)
"""What a key is worth: 1 for each logit."""
MASS: tl.constexpr = tl.constexpr(1)
"""Its probability, not normed."""
NEARNESS: tl.constexpr = tl.constexpr(2)
"""The same, but keys say how near a scaled logit is to a centre."""

_COARSE: tl.constexpr = tl.constexpr(1 << 16)
"""Keys of all 32 bits between which a bound need not decide."""


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """Return a float32's key; zeros of both signs have the same one. SHIFT: low bits that are left out."""
    i = (x + 0.0).to(tl.int32, bitcast=True)
    return (i ^ ((i >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def value_of(key, SHIFT: tl.constexpr):
    """The float32 of a key: `key_of` backwards."""
    i = (key << SHIFT) | ((key >> 31) & ((1 << SHIFT) - 1))
    return (i ^ ((i >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_from(x, SHIFT: tl.constexpr):
    """The smallest key of a logit that is at least x."""
    i = key_of(x, 0)
    return tl.where(i >= 0, i + ((1 << SHIFT) - 1), i) >> SHIFT


@triton.jit
def list_groups(groups_ptr, keys, least):
    """Write down, in order, which groups have a largest key of at least `least`; how many they are."""
    take = (keys >= least).to(tl.int32)
    tl.debug_barrier()  # all threads have read the list before
    tl.store(groups_ptr + tl.cumsum(take, 0) - 1, tl.arange(0, keys.shape[0]), mask=take > 0)
    tl.debug_barrier()
    return tl.sum(take, 0)


@triton.jit
def tile_of(row, groups_ptr, i, n, VOCAB: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr):
    """Logits of TILE of the n listed groups, from the i-th on, and their ids: (TILE, GROUP). What is no logit is minus
    infinity and has an id of VOCAB or more."""
    at = i + tl.arange(0, TILE)
    group = tl.load(groups_ptr + at, mask=at < n, other=VOCAB)
    o = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return tl.load(row + o, mask=o < VOCAB, other=float("-inf")).to(tl.float32), o


@triton.jit
def quarter(at, end, part):
    """The key `part` quarters of the way from `at` to `end`, both int64."""
    return at + (((end - at) * part + 3) >> 2)


@triton.jit
def sure(keys, tops, wholes, key, most, scale, WHAT: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr):
    """So much, at least, are logits from `key` on worth. `tops`, `wholes`: masses of a group's largest, and of all."""
    worth = tl.full(keys.shape, 1.0, tl.float32)
    if WHAT == MASS:
        worth = tl.maximum(tops, wholes - (GROUP - 1) * tl.exp((value_of(key, SHIFT) - most) * scale))
    return tl.sum(tl.where(keys >= key, worth, 0.0), 0)


@triton.jit
def bound(keys, tops, wholes, need, most, scale, low, WHAT: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr):
    """A key that the threshold is not below, as far as the groups' maxima tell; `low`: one that is known before."""
    at, end = low.to(tl.int64), key_of(most, SHIFT).to(tl.int64) + 1
    while end - at > (_COARSE >> SHIFT):
        reached = tl.full([], 0, tl.int64)
        for part in tl.static_range(1, 4):
            key = quarter(at, end, part).to(tl.int32)
            reached += (sure(keys, tops, wholes, key, most, scale, WHAT, SHIFT, GROUP) >= need).to(tl.int64)
        at, end = quarter(at, end, reached), quarter(at, end, reached + 1)
    return at.to(tl.int32)


@triton.jit
def least_kept(row, groups_ptr, n, need, most, scale, center, floor, low, high, WHAT: tl.constexpr,
               VOCAB: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """The threshold among the n listed groups; it lies between `low` and `high`.

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
    """The mass of logits whose key is at least `floor`, and the sum of scaled logits (the largest is 0) times mass."""
    total = tl.zeros([TILE, GROUP], tl.float32)
    mean = tl.zeros([TILE, GROUP], tl.float32)
    for i in range(0, n, TILE):
        x, _ = tile_of(row, groups_ptr, i, n, VOCAB, GROUP, TILE)
        scaled = (x - most) * scale
        worth = tl.where(key_of(x, SHIFT) >= floor, tl.exp(scaled), 0.0)
        total += worth
        mean += tl.where(worth > 0.0, worth * scaled, 0.0)  # 0 · -inf is 0
    return tl.sum(total), tl.sum(mean)
