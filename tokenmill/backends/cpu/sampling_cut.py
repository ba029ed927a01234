"""Thresholds without sorting: the k-th largest key, and the key at which a cumulative weight reaches a target.

All functions are compiled. `s`: a thread's scratch (`sampling_layout.py`). Keys and weights are addresses of float32.
"""

from __future__ import annotations

import numpy as np

from tokenmill.backends.cpu.ir import inline, peek, poke
from tokenmill.backends.cpu.sampling_layout import BUCKETS, HISTOGRAM, MEMBER_WEIGHTS, MEMBERS
from tokenmill.backends.cpu.sampling_vectors import Real, peek_double, peek_float, poke_float, word

_MAX_LINEAR = 24  # up to this many keys, a linear search finds the threshold


@inline
def weight_of(weights: int, i: int) -> float:
    """Return the i-th weight; 1 if `weights` is 0."""
    return 1.0 if weights == 0 else np.float64(peek_float(weights + 4 * i))


@inline
def find_cut(s: int, keys: int, weights: int, n: int, target: float) -> Real:
    """Return the smallest kept key. A key is kept if all larger keys together weigh less than `target`.

    With `weights` 0 each key weighs 1, so a target of k gives the k-th largest key. The largest key is always kept.
    Keys are divided into buckets, then the members of the bucket that reaches the target again. n >= 1, no NaN.
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
    """Return the bucket of a key.

    It is rounded, so that the lowest key is in the last bucket in spite of rounding errors of `scale`. The cut is there
    if the target exceeds the sum of all weights by rounding.
    """
    return int((top - np.float64(key)) * scale + 0.5)


@inline
def _bucket_of_cut(
    hist: int, keys: int, weights: int, n: int, top: float, scale: float, weight_before: float, target: float
) -> tuple[int, float]:
    """Return the bucket in which the cumulative weight reaches the target, and the weight before this bucket."""
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
    """Return the cut like `find_cut`, with a linear search from the largest key."""
    last, weight_before = np.float32(np.inf), 0.0
    while True:
        best, mass = np.float32(-np.inf), 0.0
        for i in range(n):
            key = peek_float(keys + 4 * i)
            if best < key < last:
                best, mass = key, 0.0
            if key == best:
                mass += weight_of(weights, i)
        if best == -np.inf:  # the target exceeds the sum of all weights
            return last
        last = best
        weight_before += mass
        if weight_before >= target:
            return last
