"""The rules of sampling, written a second time: one row, float64, Python integers. An oracle for tests."""

from __future__ import annotations

import math
import random

import numpy as np

from tokenmill.backends.base import Masks
from tokenmill.wire.messages import SamplingParams, StoppingParams

MASK = 2**32 - 1


def reference_noise(seed: int, position: int, token_id: int) -> float:
    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
        x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
        return x ^ (x >> 16)

    seed %= 2**64
    key = mix((seed & MASK) ^ mix((seed >> 32) ^ mix(position)))
    bits = mix((token_id * 0x9E3779B9 + key) & MASK) & 0x7FFFFFFF
    u = min((bits + 0.5) / 2**31, 1 - 2**-24)
    return -math.log(-math.log1p(-u))


def reference_green(previous_id: int, gamma: float, vocab_size: int) -> list[int]:
    """The watermark's green ids, by Python's own Mersenne twister."""
    state = [15485863 * previous_id & MASK]
    for i in range(1, 624):
        state.append(1812433253 * (state[-1] ^ state[-1] >> 30) + i & MASK)
    twister, ids = random.Random(), list(range(vocab_size))
    twister.setstate((3, (*state, 624), None))
    for i in range(vocab_size - 1):
        other = i + twister.getrandbits(32) % (vocab_size - i)
        ids[i], ids[other] = ids[other], ids[i]
    return ids[: int(vocab_size * gamma)]


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def random_masks(rng, rows: int, vocab: int) -> tuple[Masks, list[np.ndarray]]:
    """Masks for some of the rows, none of them empty; and for every row which ids it may choose."""
    allowed = [np.ones(vocab, bool) for _ in range(rows)]
    chosen = np.flatnonzero(rng.random(rows) < 0.7)
    for row in chosen:
        some = rng.choice([1, 2, vocab // 20 + 1, vocab // 2, vocab - 1])
        allowed[row] = np.isin(np.arange(vocab), rng.choice(vocab, some, replace=False))
    words = np.zeros((len(chosen), -(-vocab // 32)), np.uint32)
    for m, row in enumerate(chosen):
        for i in np.flatnonzero(allowed[row]).tolist():
            words[m, i // 32] |= np.uint32(1 << i % 32)
    if vocab % 32:
        words[:, -1] |= np.uint32(0xFFFFFFFF << vocab % 32 & 0xFFFFFFFF)  # behind the vocabulary nothing counts
    return Masks(chosen.astype(np.int32), words), allowed


def reference_scores(logits, prompt, output, params: SamplingParams, stopping: StoppingParams, allowed=None):
    """What is sampled from (before noise), in float64. `allowed`: a mask, as booleans."""
    x = np.array(logits, np.float64)
    if allowed is not None:
        x[~allowed] = -np.inf
    if params.watermark_gamma > 0:
        x[reference_green([*prompt, *output][-1], params.watermark_gamma, len(x))] += params.watermark_delta
    for token_id, value in params.logit_bias:
        x[token_id] += value
    for token_id in set(prompt) | set(output):
        r = params.repetition_penalty
        x[token_id] = x[token_id] * r if x[token_id] < 0 else x[token_id] / r
    for token_id in set(output):
        x[token_id] -= params.frequency_penalty * output.count(token_id) + params.presence_penalty
    if len(output) < stopping.min_new_tokens:
        for token_id in stopping.stop_ids:
            x[token_id] = -np.inf
    if params.temperature == 0:
        return x
    x = x / params.temperature
    if params.min_p > 0:
        p = softmax(x)
        x[p < params.min_p * p.max()] = -np.inf
    if 0 < params.top_k < len(x):
        x[x < sorted(x)[-params.top_k]] = -np.inf
    if params.top_p < 1:
        p = softmax(x)
        x[[p[p > p[i]].sum() >= params.top_p for i in range(len(p))]] = -np.inf
    if params.typical_p < 1:
        p = softmax(x)
        logp = np.log(np.where(p > 0, p, 1))
        distance = np.where(p > 0, np.abs(-logp - -(p * logp).sum()), np.inf)
        x[[p[distance < d].sum() >= params.typical_p for d in distance]] = -np.inf
    return x


def reference_choice(scores, params: SamplingParams, position: int) -> int:
    if not (scores > -np.inf).any():
        return -1
    if params.temperature == 0:
        return int(np.argmax(scores))
    return int(np.argmax([s + reference_noise(params.seed, position, i) for i, s in enumerate(scores)]))


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def chi_square(counts, probabilities) -> float:
    """The statistic over its degrees of freedom, of bins that expect at least 5."""
    expected = probabilities * counts.sum()
    big = expected >= 5
    bins = [*counts[big], counts[~big].sum()], [*expected[big], expected[~big].sum()]
    kept = [(c, e) for c, e in zip(*bins, strict=True) if e > 0]
    return sum((c - e) ** 2 / e for c, e in kept) / max(len(kept) - 1, 1)
