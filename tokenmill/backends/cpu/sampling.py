"""The kernel that takes the rows of logits of a step, each by one thread: to tokens, or to log-probabilities only."""

from __future__ import annotations

import numpy as np

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu import sampling_layout as w
from tokenmill.backends.cpu.ir import atomic_add, copy, inline, kernel, peek, peek32, poke
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
    mass,
    penalize,
)
from tokenmill.backends.cpu.sampling_vectors import (
    BLOCK_VECTORS,
    LOWEST,
    Real,
    noise_key,
    peek_byte,
    peek_float,
    poke32,
    poke_float,
    total,
    word,
)

_ONE = np.float32(1.0)
_COLDEST = np.float32(1e-6)
_NOTHING = np.float32(-np.inf)


@inline
def _sample(tid: int, row: int, context: int, counter: int) -> int:
    rows, words = peek(context + 8 * layout.SAMPLES), peek(context + 8 * layout.SAMPLING)
    s = peek(words + 8 * w.SCRATCH) + tid * peek(words + 8 * w.SCRATCH_SIZE)
    logits, stride, vocab = peek(row + 8 * layout.X), peek(row + 8 * layout.X_STRIDE), peek(row + 8 * layout.WIDTH)
    while True:
        r = atomic_add(counter, 1)
        if r >= rows:
            return 0
        x = logits + r * stride
        for i in range(vocab, (vocab + 15) // 16 * 16):
            poke_float(x + 4 * i, word(_NOTHING))
        if peek(words + 8 * w.MODE) == w.SCORE:
            _score_row(words, s, x, vocab, r)
        else:
            slot = peek(peek(context + 8 * layout.SAMPLED_SLOTS) + 8 * r)
            position = peek(peek(context + 8 * layout.SAMPLED_POSITIONS) + 8 * r)
            token = _sample_row(words, s, x, vocab, r, slot, position)
            poke(peek(context + 8 * layout.RESULT) + 8 * r, token)
            tokens = peek(words + 8 * w.TOKENS) + slot * peek(words + 8 * w.TOKENS_STRIDE)
            poke32(tokens + 4 * position, max(token, 0))


@inline
def _score_row(words: int, s: int, x: int, vocab: int, r: int) -> None:
    """SCORE: the log-probabilities of the row's target and of the likeliest."""
    wanted = peek(peek(words + 8 * w.WANTED) + 8 * r)
    if wanted < 0:
        _set_nothing(words, r)
        return
    best = find_maxima(s, x, (vocab + 15) // 16)
    normal = _list_row(words, s, x, vocab, r, wanted, _ONE, best)
    target = peek(peek(words + 8 * w.TARGETS) + 8 * r)
    _set_chosen(words, r, peek_float(x + 4 * target), normal)


@inline
def _sample_row(words: int, s: int, x: int, vocab: int, r: int, slot: int, position: int) -> int:
    """The row's next token, -1 if its logits are not finite."""
    p = peek(words + 8 * w.PARAMETER_ROWS) + slot * w.ROW_BYTES
    most = peek(words + 8 * w.MOST)
    wanted = min(peek32(p + w.LOGPROBS), most) if most >= 0 else -1
    raw = wanted >= 0 and peek_byte(p + w.RAW_LOGPROBS) != 0
    y, normal = x, 0.0
    if raw:
        best = find_maxima(s, x, (vocab + 15) // 16)
        normal = _list_row(words, s, x, vocab, r, wanted, _ONE, best)
        y = peek(s + w.WORK)
        copy((vocab + 15) // 16, x, y)
    _process(words, s, y, vocab, p, slot, position)
    best = find_maxima(s, y, (vocab + 15) // 16)
    if best <= LOWEST or wanted < 0:
        _set_nothing(words, r)
    if best <= LOWEST:
        return -1
    t, n = peek_float(p + w.TEMPERATURE), -1
    if t > 0:
        t = max(t, _COLDEST)
        token, n = _draw(s, y, vocab, t, best / t, p, position)
    else:
        t = _ONE
        token = find_first(s, y, (vocab + 15) // 16, best)
    if raw:
        _set_chosen(words, r, peek_float(x + 4 * token), normal)
    elif wanted >= 0:
        if n < 0:
            normal = _list_row(words, s, y, vocab, r, wanted, t, best)
        else:
            normal = _list_collected(words, s, n, r, wanted, best / t)
        _set_chosen(words, r, peek_float(y + 4 * token) / t, normal)
    return token


@inline
def _process(words: int, s: int, y: int, vocab: int, p: int, slot: int, position: int) -> None:
    """Biases, penalties and bans, in place."""
    if peek32(p + w.NUM_BIASES) > 0:
        offset = slot * peek(words + 8 * w.BIAS_STRIDE)
        ids, values = peek(words + 8 * w.BIAS_IDS) + offset, peek(words + 8 * w.BIAS_VALUES) + offset
        until = peek(words + 8 * w.BIAS_UNTIL) + offset
        add_biases(y, vocab, peek32(p + w.NUM_BIASES), ids, values, until, position)
    if peek_float(p + w.REPETITION) != 1 or peek_float(p + w.FREQUENCY) != 0 or peek_float(p + w.PRESENCE) != 0:
        tokens = peek(words + 8 * w.TOKENS) + slot * peek(words + 8 * w.TOKENS_STRIDE)
        penalize(s, y, vocab, tokens, position, peek32(p + w.NUM_PROMPT), p + w.REPETITION)


@inline
def _draw(s: int, y: int, vocab: int, t: Real, best: Real, p: int, position: int) -> tuple[int, int]:
    """An id, and how many the filters left (they are collected); -1: there is no filter."""
    key = noise_key(peek32(p + w.SEED_LOW), peek32(p + w.SEED_HIGH), position)
    k = peek32(p + w.TOP_K)
    filtered = 0 < k < vocab or peek_float(p + w.TOP_P) < 1 or peek_float(p + w.TYPICAL_P) < 1
    if not filtered and not peek_float(p + w.MIN_P) > 0:
        return choose_any(s, y, (vocab + 15) // 16, t, best, key), -1
    n = filter_row(s, y, vocab, t, best, p)
    return choose_collected(s, n, key), n


# ---- log-probabilities ----


@inline
def _list_row(words: int, s: int, x: int, vocab: int, r: int, wanted: int, t: Real, best: Real) -> float:
    """Lists the likeliest of all ids; returns what to take from a score to get its log-probability.

    `best`: the largest logit, whose block maxima are in the scratch.
    """
    vectors = (vocab + 15) // 16
    top = np.float64(best / t)
    normal = top + logarithm(np.float64(total(vectors, x, word(t), word(best / t))))
    n = 0
    if wanted > 0:
        n = collect(s, x, vectors, t, kth_bound(s, (vectors + BLOCK_VECTORS - 1) // BLOCK_VECTORS, wanted) / t)
    _list(words, s, n, r, wanted, normal)
    return normal


@inline
def _list_collected(words: int, s: int, n: int, r: int, wanted: int, best: Real) -> float:
    """The same of the n collected, which are all that is left."""
    normal = np.float64(best) + logarithm(mass(s, n))
    _list(words, s, n, r, wanted, normal)
    return normal


@inline
def _list(words: int, s: int, n: int, r: int, wanted: int, normal: float) -> None:
    at = 4 * r * peek(words + 8 * w.MOST)
    ids, logprobs = peek(words + 8 * w.TOP_IDS) + at, peek(words + 8 * w.TOP_LOGPROBS) + at
    poke32(peek(words + 8 * w.LISTED) + 4 * r, list_likeliest(s, n, wanted, normal, ids, logprobs))


@inline
def _set_nothing(words: int, r: int) -> None:
    if peek(words + 8 * w.MOST) >= 0:
        poke32(peek(words + 8 * w.LISTED) + 4 * r, -1)


@inline
def _set_chosen(words: int, r: int, score: Real, normal: float) -> None:
    poke_float(peek(words + 8 * w.CHOSEN) + 4 * r, word(np.float32(np.float64(score) - normal)))


KERNELS = {"sample": kernel("sample", _sample)}
"""By name; the same for every instruction set."""
