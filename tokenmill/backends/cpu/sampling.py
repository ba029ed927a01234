"""The sampling kernel: sample a token from each row of logits or compute only log-probabilities. One thread a row."""

from __future__ import annotations

import numpy as np

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.ir import atomic_add, copy, inline, kernel, peek, peek32, poke
from tokenmill.backends.cpu.sampling_layout import (
    BIAS_IDS,
    BIAS_STRIDE,
    BIAS_UNTIL,
    BIAS_VALUES,
    CHOSEN,
    FREQUENCY,
    KEPT,
    LISTED,
    LOGPROBS,
    MASKS,
    MAX_LISTED,
    MIN_P,
    MODE,
    NUM_BIASES,
    NUM_PROMPT,
    PARAMETER_ROWS,
    PRESENCE,
    RAW_LOGPROBS,
    REPETITION,
    ROW_BYTES,
    SCORE,
    SCRATCH,
    SCRATCH_SIZE,
    SEED_HIGH,
    SEED_LOW,
    SKIPS_INPUTS,
    TARGETS,
    TEMPERATURE,
    TOKENS,
    TOKENS_STRIDE,
    TOP_IDS,
    TOP_K,
    TOP_LOGPROBS,
    TOP_P,
    TYPICAL_P,
    WANTED,
    WATERMARK_DELTA,
    WATERMARK_GAMMA,
    WORK,
)
from tokenmill.backends.cpu.sampling_rows import (
    add_biases,
    choose_any,
    choose_collected,
    collect,
    filter_row,
    find_first,
    find_maxima,
    kth_bound,
    list_likeliest,
    logarithm,
    mask_ids,
    mass,
    penalize,
)
from tokenmill.backends.cpu.sampling_vectors import (
    BLOCK_VECTORS,
    LOWEST,
    Real,
    noise_key,
    peek_double,
    peek_float,
    poke32,
    poke_float,
    total,
    word,
)
from tokenmill.backends.cpu.sampling_watermark import favour_green
from tokenmill.backends.sampling import LEAST_TEMPERATURE, MOST_TIES

_RESULT = 8 * layout.RESULT
_SAMPLED_POSITIONS = 8 * layout.SAMPLED_POSITIONS
_SAMPLED_SLOTS = 8 * layout.SAMPLED_SLOTS
_SAMPLES = 8 * layout.SAMPLES
_SAMPLING = 8 * layout.SAMPLING
_WIDTH = 8 * layout.WIDTH
_X = 8 * layout.X
_X_STRIDE = 8 * layout.X_STRIDE
_ONE = np.float32(1.0)
_MIN_TEMPERATURE = np.float32(LEAST_TEMPERATURE)
_MINUS_INFINITY = np.float32(-np.inf)


@inline
def _sample(tid: int, row: int, context: int, counter: int) -> int:
    rows, words = peek(context + _SAMPLES), peek(context + _SAMPLING)
    s = peek(words + SCRATCH) + tid * peek(words + SCRATCH_SIZE)
    logits, stride, vocab = peek(row + _X), peek(row + _X_STRIDE), peek(row + _WIDTH)
    while True:
        r = atomic_add(counter, 1)
        if r >= rows:
            return 0
        x = logits + r * stride
        for i in range(vocab, (vocab + 15) // 16 * 16):
            poke_float(x + 4 * i, word(_MINUS_INFINITY))
        if peek(words + MODE) == SCORE:
            _score_row(words, s, x, vocab, r)
        else:
            slot = peek(peek(context + _SAMPLED_SLOTS) + 8 * r)
            position = peek(peek(context + _SAMPLED_POSITIONS) + 8 * r)
            token = _sample_row(words, s, x, vocab, r, slot, position)
            poke(peek(context + _RESULT) + 8 * r, token)
            tokens = peek(words + TOKENS) + slot * peek(words + TOKENS_STRIDE)
            poke32(tokens + 4 * position, max(token, 0))


@inline
def _score_row(words: int, s: int, x: int, vocab: int, r: int) -> None:
    """Compute the log-probabilities of a row's target and of its likeliest ids (mode SCORE)."""
    wanted = peek(peek(words + WANTED) + 8 * r)
    if wanted < 0:
        _set_none(words, r)
        return
    best = find_maxima(s, x, (vocab + 15) // 16)
    normal = _list_row(words, s, x, vocab, r, wanted, 0, _ONE, best, LOWEST)
    target = peek(peek(words + TARGETS) + 8 * r)
    _set_chosen(words, r, peek_float(x + 4 * target), normal)


@inline
def _sample_row(words: int, s: int, x: int, vocab: int, r: int, slot: int, position: int) -> int:
    """Sample the next token of a row; -1 if its logits are not finite."""
    p = peek(words + PARAMETER_ROWS) + slot * ROW_BYTES
    max_listed = peek(words + MAX_LISTED)
    wanted = min(peek32(p + LOGPROBS), max_listed) if max_listed >= 0 else -1
    raw = wanted >= 0 and peek32(p + RAW_LOGPROBS) != 0
    y, normal = x, 0.0
    if raw:
        best = find_maxima(s, x, (vocab + 15) // 16)
        normal = _list_row(words, s, x, vocab, r, wanted, 0, _ONE, best, LOWEST)
        y = peek(s + WORK)
        copy((vocab + 15) // 16, x, y)
    masks = peek(words + MASKS)
    mask = peek(masks + 8 * r) if masks != 0 else 0
    if mask != 0:
        mask_ids(y, vocab, mask)
    _process(words, s, y, vocab, p, slot, position)
    best = find_maxima(s, y, (vocab + 15) // 16)
    if best <= LOWEST or wanted < 0:
        _set_none(words, r)
    if best <= LOWEST:
        return -1
    t, n = peek_float(p + TEMPERATURE), -1
    poke_float(peek(s + KEPT) + 8, word(LOWEST))
    if t > 0:
        t = max(t, _MIN_TEMPERATURE)
        token, n = _draw(s, y, vocab, t, best / t, p, position)
    else:
        t = _ONE
        token = find_first(s, y, (vocab + 15) // 16, best)
    if raw:
        _set_chosen(words, r, peek_float(x + 4 * token), normal)
    elif wanted >= 0:
        if n < 0:
            least = peek_float(peek(s + KEPT) + 8)
            normal = _list_row(words, s, y, vocab, r, wanted, MOST_TIES, t, best, least)
        else:
            normal = np.float64(best / t) + logarithm(mass(s, n))
            _list(words, s, n, r, wanted, MOST_TIES, normal)
        _set_chosen(words, r, peek_float(y + 4 * token) / t, normal)
    return token


@inline
def _process(words: int, s: int, y: int, vocab: int, p: int, slot: int, position: int) -> None:
    """Apply watermark, biases, bans and penalties in place."""
    gamma, tokens = peek_double(p + WATERMARK_GAMMA), peek(words + TOKENS) + slot * peek(words + TOKENS_STRIDE)
    if gamma > 0:
        favour_green(s, y, vocab, peek32(tokens + 4 * (position - 1)), gamma, peek_float(p + WATERMARK_DELTA))
    if peek32(p + NUM_BIASES) > 0:
        offset = slot * peek(words + BIAS_STRIDE)
        ids, values = peek(words + BIAS_IDS) + offset, peek(words + BIAS_VALUES) + offset
        until = peek(words + BIAS_UNTIL) + offset
        add_biases(y, vocab, peek32(p + NUM_BIASES), ids, values, until, position)
    if peek_float(p + REPETITION) != 1 or peek_float(p + FREQUENCY) != 0 or peek_float(p + PRESENCE) != 0:
        num_prompt = peek32(p + NUM_PROMPT)
        penalize(s, y, vocab, tokens, max(num_prompt - 1, 0) * peek(words + SKIPS_INPUTS), position, num_prompt,
                 p + REPETITION)  # fmt: skip


@inline
def _draw(s: int, y: int, vocab: int, t: Real, best: Real, p: int, position: int) -> tuple[int, int]:
    """Draw an id. Also returns the number of ids that the filters keep, which are then collected.

    The number is -1 if ids are not collected: then the filters keep all ids with at least the score in KEPT.
    """
    key = noise_key(peek32(p + SEED_LOW), peek32(p + SEED_HIGH), position)
    k, n = peek32(p + TOP_K), -1
    if 0 < k < vocab or peek_float(p + TOP_P) < 1 or peek_float(p + TYPICAL_P) < 1 or peek_float(p + MIN_P) > 0:
        n = filter_row(s, y, vocab, t, best, p)
    if n < 0:
        return choose_any(s, y, (vocab + 15) // 16, t, best, peek_float(peek(s + KEPT) + 8), key), n
    return choose_collected(s, n, key), n


# ---- log-probabilities ----


@inline
def _list_row(
    words: int, s: int, x: int, vocab: int, r: int, wanted: int, ties: int, t: Real, best: Real, least: Real
) -> float:
    """List the likeliest of all ids with a score of at least `least`.

    Returns the log of the normalizer, which turns a score into a log-probability when subtracted. If `least` is above
    LOWEST, the mass is the one in KEPT. `best`: the largest logit. The block maxima are in the scratch.
    """
    vectors, n = (vocab + 15) // 16, 0
    if least > LOWEST:
        whole = peek_double(peek(s + KEPT))
    else:
        whole = np.float64(total(vectors, x, word(t), word(best / t)))
    normal = np.float64(best / t) + logarithm(whole)
    if wanted > 0:
        bound = kth_bound(s, (vectors + BLOCK_VECTORS - 1) // BLOCK_VECTORS, wanted) / t
        n = collect(s, x, vectors, t, max(least, bound), vocab)
    _list(words, s, n, r, wanted, ties, normal)
    return normal


@inline
def _list(words: int, s: int, n: int, r: int, wanted: int, ties: int, normal: float) -> None:
    """List the `wanted` likeliest of n collected ids, and at most `ties` more that tie with the last of them."""
    at = 4 * r * peek(words + MAX_LISTED)
    ids, logprobs = peek(words + TOP_IDS) + at, peek(words + TOP_LOGPROBS) + at
    listed = list_likeliest(s, n, wanted + ties if wanted > 0 else 0, normal, ids, logprobs)
    while listed > wanted and peek_float(logprobs + 4 * (listed - 1)) < peek_float(logprobs + 4 * (wanted - 1)):
        listed -= 1
    poke32(peek(words + LISTED) + 4 * r, listed)


@inline
def _set_none(words: int, r: int) -> None:
    if peek(words + MAX_LISTED) >= 0:
        poke32(peek(words + LISTED) + 4 * r, -1)


@inline
def _set_chosen(words: int, r: int, score: Real, normal: float) -> None:
    poke_float(peek(words + CHOSEN) + 4 * r, word(np.float32(np.float64(score) - normal)))


KERNELS = {"sample": kernel("sample", _sample)}
"""Kernels by name; the same for every instruction set"""
