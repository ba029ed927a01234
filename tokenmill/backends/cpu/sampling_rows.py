"""Sampling from one row of scores: biases, penalties, filters and noise, as defined in `backends/sampling.py`.

The vocabulary is never sorted. The maximum of each block of 64 logits is computed first. The k-th largest maximum is a
lower bound of the k likeliest logits, and the mass within some distances of the best score bounds the ids that top-p
can keep. Only ids that reach such a bound are collected, usually some hundred, and the filters work on that list.

All functions are compiled. Arguments are int64, which include addresses, and float32. `s`: a thread's scratch, whose
first words are the addresses of its parts (`sampling_layout.py`).
"""

from __future__ import annotations

import numpy as np

from tokenmill.backends.cpu.ir import inline, peek, peek32, poke
from tokenmill.backends.cpu.sampling_cut import find_cut
from tokenmill.backends.cpu.sampling_layout import (
    COUNTS,
    DEPTHS,
    FIRST_DEPTHS,
    IDS,
    KEPT,
    KEYS,
    MASSES,
    MAXIMA,
    MIN_P,
    SCORES,
    TOP_K,
    TOP_P,
    TOUCHED,
    TYPICAL_P,
    WEIGHTS,
)
from tokenmill.backends.cpu.sampling_vectors import (
    BLOCK_VECTORS,
    LOWEST,
    STEPS,
    Real,
    between,
    block_maximum,
    contenders,
    double_of,
    exponential,
    lowest_bit,
    masses,
    peek_float,
    poke32,
    poke_float,
    reaching,
    uniform,
    weigh,
    word,
)

_WEIGHT_SLACK = 0.999  # tolerance for rounding errors of a weight
_MASS_MARGIN = 1.0001  # tolerance for rounding errors of a mass
_MAX_COLLECTED = 2000  # maximum collected ids; of more ids, only those near the threshold are collected
_MAX_DEPTH = np.float32(88.0)  # beyond this depth below the best score, e^x is 0
_NOISE_REACH = np.float32(-26.0)  # noise is in [-2.82, 22.2], so no id this far below the best score is chosen


@inline
def _atanh(x: float) -> float:
    """Compute atanh(x) for |x| < 0.172, to 14 digits."""
    y = x * x
    tail = 1 / 7 + y * (1 / 9 + y * (1 / 11 + y * (1 / 13 + y * (1 / 15 + y / 17))))
    return x * (1.0 + y * (1 / 3 + y * (1 / 5 + y * tail)))


@inline
def logarithm(x: float) -> float:
    """Compute the natural logarithm of a float64 without a library call. NaN gives NaN."""
    if not 0.0 < x < np.inf:
        return x - x if x != 0.0 else -np.inf
    bits = word(x)
    exponent = (bits >> 52) - 1023
    fraction = double_of((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000)
    if fraction > 1.4142135623730951:
        fraction *= 0.5
        exponent += 1
    return 2.0 * _atanh((fraction - 1.0) / (fraction + 1.0)) + exponent * 0.6931471805599453


@inline
def penalize(s: int, x: int, vocab: int, tokens: int, first: int, end: int, num_prompt: int, p: int) -> None:
    """Apply the three penalties in place to all ids among the tokens from `first` to `end` - 1, once for each id.

    `p`: address of repetition, frequency and presence penalty.
    """
    repetition, frequency, presence = peek_float(p), peek_float(p + 4), peek_float(p + 8)
    counts, touched, n = peek(s + COUNTS), peek(s + TOUCHED), 0
    for i in range(first, end):
        token = peek32(tokens + 4 * i)
        if 0 <= token < vocab:
            count = peek32(counts + 4 * token)
            if count == 0:
                poke32(touched + 4 * n, token)
                n += 1
                count = 1
            poke32(counts + 4 * token, count + 1 if i >= num_prompt else count)
    for i in range(n):
        token = peek32(touched + 4 * i)
        output = peek32(counts + 4 * token) - 1
        poke32(counts + 4 * token, 0)
        score = peek_float(x + 4 * token)
        score = score * repetition if score < 0 else score / repetition
        if output > 0:
            score = np.float32(score - frequency * np.float32(output)) - presence
        poke_float(x + 4 * token, word(score))


@inline
def mask_ids(x: int, vocab: int, mask: int) -> None:
    """Set scores to minus infinity in place where the bit of `mask` is 0. Scores that are not finite stay."""
    for first in range(0, vocab, 32):
        bits = peek32(mask + first // 8)
        if bits == -1:
            continue
        for i in range(first, min(first + 32, vocab)):
            score = peek_float(x + 4 * i)
            if (bits >> (i - first)) & 1 == 0 and -np.inf < score < np.inf:
                poke_float(x + 4 * i, word(np.float32(-np.inf)))


@inline
def add_biases(x: int, vocab: int, n: int, ids: int, values: int, until: int, position: int) -> None:
    """Add the biases that are still active at `position`, in place."""
    for i in range(n):
        token = peek32(ids + 4 * i)
        if position < peek32(until + 4 * i) and 0 <= token < vocab:
            poke_float(x + 4 * token, word(peek_float(x + 4 * token) + peek_float(values + 4 * i)))


@inline
def find_maxima(s: int, x: int, vectors: int) -> Real:
    """Store the maximum of each block and return the maximum of the row.

    Returns LOWEST if a score is NaN or plus infinity, or all are minus infinity.
    """
    maxima, broken, best = peek(s + MAXIMA), 0, LOWEST
    for first in range(0, vectors, BLOCK_VECTORS):
        out = maxima + first // BLOCK_VECTORS * 4
        broken |= block_maximum(min(BLOCK_VECTORS, vectors - first), x + first * 64, out)
        best = max(best, peek_float(out))
    return best if broken == 0 else LOWEST


@inline
def find_first(s: int, x: int, vectors: int, best: Real) -> int:
    """Return the lowest id whose logit is `best`, the maximum."""
    block, maxima = 0, peek(s + MAXIMA)
    while peek_float(maxima + 4 * block) < best:
        block += 1
    token = block * BLOCK_VECTORS * 16
    while peek_float(x + 4 * token) < best:
        token += 1
    return token


@inline
def kth_bound(s: int, blocks: int, k: int) -> Real:
    """Return a lower bound of the k largest logits: the k-th largest block maximum."""
    return LOWEST if k >= blocks else find_cut(s, peek(s + MAXIMA), 0, blocks, float(k))


@inline
def collect(s: int, x: int, vectors: int, t: Real, least: Real, most: int) -> int:
    """Collect the scores of at least `least` into SCORES and their ids into IDS, ordered by id.

    Returns their number; -1 if it exceeds `most`.
    """
    maxima, n = peek(s + MAXIMA), 0
    for first in range(0, vectors, BLOCK_VECTORS):
        if peek_float(maxima + first // BLOCK_VECTORS * 4) / t < least:
            continue
        for v in range(first, min(first + BLOCK_VECTORS, vectors)):
            n = _collect_some(s, x, n, v, t, reaching(x + 64 * v, word(t), word(least)))
        if n > most:
            return -1
    return n


@inline
def _collect_some(s: int, x: int, n: int, v: int, t: Real, mask: int) -> int:
    """Append the ids of vector v that `mask` selects to the n collected ones. Returns the new number."""
    scores, ids = peek(s + SCORES), peek(s + IDS)
    while mask != 0:
        token = v * 16 + lowest_bit(mask)
        mask &= mask - 1
        poke_float(scores + 4 * n, word(peek_float(x + 4 * token) / t))
        poke32(ids + 4 * n, token)
        n += 1
    return n


@inline
def _keep(s: int, keys: int, n: int, least: Real) -> int:
    """Keep the collected ids whose key is at least `least`, in order. Returns their number."""
    scores, ids, weights, kept = peek(s + SCORES), peek(s + IDS), peek(s + WEIGHTS), 0
    for i in range(n):
        if peek_float(keys + 4 * i) >= least:
            poke_float(scores + 4 * kept, word(peek_float(scores + 4 * i)))
            poke_float(weights + 4 * kept, word(peek_float(weights + 4 * i)))
            poke32(ids + 4 * kept, peek32(ids + 4 * i))
            kept += 1
    return kept


@inline
def mass(s: int, n: int) -> float:
    """Sum the weights of the n collected ids."""
    weights, found = peek(s + WEIGHTS), 0.0
    for i in range(n):
        found += np.float64(peek_float(weights + 4 * i))
    return found


@inline
def _step_of(s: int, target: float) -> int:
    """Return the index of the first depth that holds a mass of `target`, according to MASSES; STEPS if none does."""
    found = peek(s + MASSES) + 8
    for i in range(STEPS):
        if np.float64(peek_float(found + 4 * i)) >= target:
            return i
    return STEPS


@inline
def _measure(s: int, x: int, vectors: int, t: Real, best: Real, least: Real, top_p: float, typical_p: float) -> Real:
    """Measure MASSES at INITIAL_DEPTHS. Returns a lower bound of the scores that top-p (else typical-p) can keep."""
    depths, found = peek(s + FIRST_DEPTHS), peek(s + MASSES)
    masses(vectors, x, word(t), word(best), word(least), depths, found)
    whole = np.float64(peek_float(found))
    step = _step_of(s, (top_p if top_p < 1 else typical_p) * whole * _MASS_MARGIN)
    if step == STEPS:
        return least
    reach = np.float64(peek_float(depths + 4 * step))
    if top_p >= 1:  # as far on the other side of the mean, with a tolerance for rounding
        mean = np.float64(peek_float(found + 4)) / whole
        reach = (max(mean, abs(reach - mean)) + mean) * 1.00001
    return max(least, best - np.float32(reach))


@inline
def filter_row(s: int, x: int, vocab: int, t: Real, best: Real, p: int) -> int:
    """Apply the filters of parameters `p`. Returns the number of kept ids, which are collected with their weights.

    Returns -1 if they are too many to collect: then all ids with at least the score in KEPT are kept. `best`: the
    largest score.
    """
    k, min_p, vectors = peek32(p + TOP_K), peek_float(p + MIN_P), (vocab + 15) // 16
    top_p, typical_p = np.float64(peek_float(p + TOP_P)), np.float64(peek_float(p + TYPICAL_P))
    least = start = best + np.float32(logarithm(np.float64(min_p))) if min_p > 0 else LOWEST
    counted, most = 0 < k < vocab, _MAX_COLLECTED if typical_p >= 1 else vocab
    if counted:
        start, most = max(least, kth_bound(s, (vectors + BLOCK_VECTORS - 1) // BLOCK_VECTORS, k) / t), vocab
    elif top_p < 1 or typical_p < 1:
        start = _measure(s, x, vectors, t, best, least, top_p, typical_p)
    n = collect(s, x, vectors, t, start, most)
    if n < 0:
        _narrow(s, x, vectors, t, best, least, top_p)
        return -1
    scores, weights, found = peek(s + SCORES), peek(s + WEIGHTS), peek(s + MASSES)
    weigh((n + 15) // 16, scores, word(best), weights)
    if counted and n > k:
        n = _keep(s, scores, n, find_cut(s, scores, 0, n, float(k)))
    if top_p < 1:
        whole = mass(s, n) if counted else np.float64(peek_float(found))
        n = _keep(s, scores, n, find_cut(s, scores, weights, n, top_p * whole))
    if typical_p < 1:
        if counted or top_p < 1:
            poke_float(found, word(np.float32(mass(s, n))))
            poke_float(found + 4, word(np.float32(_mean_below(s, n, best))))
        n = _keep_typical(s, n, best, typical_p)
    return n


@inline
def _narrow(s: int, x: int, vectors: int, t: Real, best: Real, least: Real, top_p: float) -> None:
    """Store the least score that top-p and `least` keep, and the kept mass, in KEPT.

    With top-p, MASSES give two depths between which the threshold lies. Measuring twice more between them leaves few
    ids to collect and examine one by one.
    """
    kept, depths, found = peek(s + KEPT), peek(s + FIRST_DEPTHS), peek(s + MASSES)
    if top_p >= 1:
        masses(vectors, x, word(t), word(best), word(least), depths, found)
    whole, low, high, above = np.float64(peek_float(found)), np.float32(-1.0), _MAX_DEPTH, 0.0
    poke(kept, word(whole))
    poke_float(kept + 8, word(least))
    if top_p >= 1:
        return
    for look in range(3):
        if look > 0:
            depths = peek(s + DEPTHS)
            for i in range(STEPS):
                poke_float(depths + 4 * i, word(low + (high - low) * np.float32(i + 1) / np.float32(STEPS + 1)))
            masses(vectors, x, word(t), word(best), word(least), depths, found)
        step = _step_of(s, top_p * whole)
        if step > 0:
            low, above = peek_float(depths + 4 * step - 4), np.float64(peek_float(found + 4 + 4 * step))
        if step < STEPS:
            high = peek_float(depths + 4 * step)
    n = 0
    for v in range(vectors):
        n = _collect_some(s, x, n, v, t, between(x + 64 * v, word(t), word(best), word(low), word(high)))
    if n > 0:
        scores, weights = peek(s + SCORES), peek(s + WEIGHTS)
        weigh((n + 15) // 16, scores, word(best), weights)
        cut = find_cut(s, scores, weights, n, top_p * whole - above)
        poke_float(kept + 8, word(max(least, cut)))
        poke(kept, word(above + mass(s, _keep(s, scores, n, cut))))


@inline
def _mean_below(s: int, n: int, best: Real) -> float:
    """Return the weighted sum of the distances of the n collected scores from the best one.

    Divided by the mass, it is the entropy minus the surprisal of the best id.
    """
    scores, weights, found = peek(s + SCORES), peek(s + WEIGHTS), 0.0
    for i in range(n):
        found += np.float64(peek_float(weights + 4 * i)) * np.float64(best - peek_float(scores + 4 * i))
    return found


@inline
def _keep_typical(s: int, n: int, best: Real, p: float) -> int:
    """Keep the collected ids whose log-probability is nearest to minus the entropy. MASSES: sums over all ids."""
    scores, weights, keys = peek(s + SCORES), peek(s + WEIGHTS), peek(s + KEYS)
    whole = np.float64(peek_float(peek(s + MASSES)))
    mean = np.float64(peek_float(peek(s + MASSES) + 4)) / whole
    for i in range(n):
        distance = abs(np.float64(best) - np.float64(peek_float(scores + 4 * i)) - mean)
        poke_float(keys + 4 * i, word(np.float32(-distance)))
    return _keep(s, keys, n, find_cut(s, keys, weights, n, p * whole))


@inline
def exponential_noise(key: int, token: int) -> float:
    """Return e^(−noise) = −log1p(−u), which is exponentially distributed."""
    u = np.float64(uniform(key, token))
    return 2.0 * _atanh(u / (2.0 - u)) if u < 0.25 else -logarithm(1.0 - u)


@inline
def choose_collected(s: int, n: int, key: int) -> int:
    """Return the collected id with the largest sum of score and noise."""
    scores, ids, weights = peek(s + SCORES), peek(s + IDS), peek(s + WEIGHTS)
    chosen, most, bound = 0, -np.inf, 0.0
    for i in range(n):
        token, weight = peek32(ids + 4 * i), np.float64(peek_float(weights + 4 * i))
        if weight >= bound * np.float64(uniform(key, token)):
            e = exponential_noise(key, token)
            value = np.float64(peek_float(scores + 4 * i)) - logarithm(e)
            if value > most:
                chosen, most, bound = token, value, weight / e * _WEIGHT_SLACK
    return chosen


@inline
def choose_any(s: int, x: int, vectors: int, t: Real, best: Real, least: Real, key: int) -> int:
    """Return the id with the largest sum of score and noise among all scores of at least `least`."""
    maxima, chosen, most, bound = peek(s + MAXIMA), 0, -np.inf, np.float32(0.0)
    for first in range(0, vectors, BLOCK_VECTORS):
        highest = peek_float(maxima + first // BLOCK_VECTORS * 4) / t
        if highest < least or highest - best < _NOISE_REACH:
            continue
        for v in range(first, min(first + BLOCK_VECTORS, vectors)):
            mask = contenders(x + 64 * v, v * 16, word(t), word(best), word(least), key, word(bound))
            while mask != 0:
                token = v * 16 + lowest_bit(mask)
                mask &= mask - 1
                score, e = peek_float(x + 4 * token) / t, exponential_noise(key, token)
                value = np.float64(score) - logarithm(e)
                if value > most:
                    chosen, most = token, value
                    bound = np.float32(np.float64(exponential(word(score - best))) / e * _WEIGHT_SLACK)
    return chosen


@inline
def list_likeliest(s: int, n: int, most: int, shift: float, ids_out: int, logprobs_out: int) -> int:
    """List the `most` likeliest of n collected ids, best first, ties by id: their ids, and score - shift."""
    scores, ids, listed = peek(s + SCORES), peek(s + IDS), 0
    for i in range(n):
        value = np.float32(np.float64(peek_float(scores + 4 * i)) - shift)
        if listed == most and (most == 0 or value <= peek_float(logprobs_out + 4 * (most - 1))):
            continue
        at = listed if listed < most else most - 1
        while at > 0 and peek_float(logprobs_out + 4 * (at - 1)) < value:
            poke_float(logprobs_out + 4 * at, word(peek_float(logprobs_out + 4 * (at - 1))))
            poke32(ids_out + 4 * at, peek32(ids_out + 4 * (at - 1)))
            at -= 1
        poke_float(logprobs_out + 4 * at, word(value))
        poke32(ids_out + 4 * at, peek32(ids + 4 * i))
        listed = min(listed + 1, most)
    return listed
