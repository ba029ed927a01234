"""Thresholds without sorting: the k-th largest of a list, and the least that a mass reaches. Compiled functions.

`s` is a thread's scratch (`sampling_layout.py`). Keys and weights are addresses of float32.
"""

from __future__ import annotations

import numpy as np

from tokenmill.backends.cpu.ir import inline, peek, poke
from tokenmill.backends.cpu.sampling_layout import BUCKETS, HISTOGRAM, MEMBER_WEIGHTS, MEMBERS
from tokenmill.backends.cpu.sampling_vectors import Real, peek_double, peek_float, poke_float, word

_MAX_LINEAR = 24  # of so many a threshold is found by looking at each


@inline
def weight_of(weights: int, i: int) -> float:
    """The i-th weight; 1 if there are none."""
    return 1.0 if weights == 0 else np.float64(peek_float(weights + 4 * i))


@inline
def find_cut(s: int, keys: int, weights: int, n: int, target: float) -> Real:
    """The smallest key that is kept, where a key is kept if all that are larger weigh less than `target` together.

    `weights` 0: each weighs 1, and with a target of k that is the k-th largest key. The largest is always kept. Keys
    are put into buckets, and the members of the one in which the sum gets there into buckets again. n >= 1, no NaN.
    """
    members, member_weights, weight_before = peek(s + MEMBERS), peek(s + MEMBER_WEIGHTS), 0.0
    while n > _MAX_LINEAR:
        low = high = peek_float(keys)
        for i in range(1, n):
            key = peek_float(keys + 4 * i)
            low, high = min(low, key), max(high, key)
        if low == high:
            return high
        top = np.float64(high)
        scale = (BUCKETS - 1) / (top - np.float64(low))
        bucket, weight_before = _bucket_of_cut(peek(s + HISTOGRAM), keys, weights, n, top, scale, weight_before, target)
        num_members = 0
        for i in range(n):
            key = peek_float(keys + 4 * i)
            if _bucket_of(top, scale, key) == bucket:
                poke_float(members + 4 * num_members, word(key))
                if weights != 0:
                    poke_float(member_weights + 4 * num_members, word(peek_float(weights + 4 * i)))
                num_members += 1
        keys, weights, n = members, 0 if weights == 0 else member_weights, num_members
    return _cut_of_few(keys, weights, n, target - weight_before)


@inline
def _bucket_of(top: float, scale: float, key: Real) -> int:
    """Rounded, so that the lowest key is in the last bucket whatever the division made of `scale`: if the target is
    beyond the sum of all, by rounding, that is where the cut is."""
    return int((top - np.float64(key)) * scale + 0.5)


@inline
def _bucket_of_cut(
    hist: int, keys: int, weights: int, n: int, top: float, scale: float, weight_before: float, target: float
) -> tuple[int, float]:
    """The bucket in which the sum reaches the target, and the sum before it."""
    for i in range(BUCKETS):
        poke(hist + 8 * i, 0)
    for i in range(n):
        at = hist + 8 * _bucket_of(top, scale, peek_float(keys + 4 * i))
        poke(at, word(peek_double(at) + weight_of(weights, i)))
    bucket = 0
    while bucket < BUCKETS - 1 and weight_before + peek_double(hist + 8 * bucket) < target:
        weight_before += peek_double(hist + 8 * bucket)
        bucket += 1
    return bucket, weight_before


@inline
def _cut_of_few(keys: int, weights: int, n: int, target: float) -> Real:
    """As `find_cut`, key by key from the largest."""
    last, weight_before = np.float32(np.inf), 0.0
    while True:
        best, mass = np.float32(-np.inf), 0.0
        for i in range(n):
            key = peek_float(keys + 4 * i)
            if best < key < last:
                best, mass = key, 0.0
            if key == best:
                mass += weight_of(weights, i)
        if best == -np.inf:  # the target is beyond the sum of all, by rounding or for real
            return last
        last = best
        weight_before += mass
        if weight_before >= target:
            return last
