"""Second implementation of the sampling rules, an oracle: one row, float64, Python integers.

Also the inputs for the tests of every backend: random requests with all parameters, and steps that sample them.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from tokenmill.backends.base import Admitted, Masks, StepInputs
from tokenmill.wire.messages import Request, SamplingParams, StoppingParams

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
    """Return the watermark's green ids, by Python's own Mersenne twister."""
    state = [15485863 * previous_id & MASK]
    for i in range(1, 624):
        state.append(1812433253 * (state[-1] ^ state[-1] >> 30) + i & MASK)
    twister, ids = random.Random(), list(range(vocab_size))
    twister.setstate((3, (*state, 624), None))
    for i in range(vocab_size - 1):
        other = i + twister.getrandbits(32) % (vocab_size - i)
        ids[i], ids[other] = ids[other], ids[i]
    return ids[: int(vocab_size * gamma)]


def a_request(prompt=(1, 2, 3), stopping=None, **params) -> Request:
    return Request(1, tuple(int(i) for i in prompt), SamplingParams(**params), stopping or StoppingParams(10))


def random_request(rng, vocab: int, *, most_k: int = 10**6, watermarked: float = 0.25) -> Request:
    """Return a request with random parameters, and a watermark with that probability: its oracle is slow."""

    def maybe(value, off, p=0.35):
        return value if rng.random() < p else off

    prompt = tuple(int(i) for i in rng.integers(0, vocab, rng.integers(1, 20)))
    params = SamplingParams(
        temperature=float(rng.choice([0.0, 0.5, 1.0, 1.7])),
        top_k=maybe(int(rng.integers(1, min(vocab, most_k) + 20)), 0),
        top_p=maybe(float(rng.uniform(0.05, 0.99)), 1.0),
        typical_p=maybe(float(rng.uniform(0.05, 0.99)), 1.0),
        min_p=maybe(float(rng.uniform(0.01, 0.9)), 0.0),
        repetition_penalty=maybe(float(rng.uniform(0.5, 2.0)), 1.0),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        seed=int(rng.integers(0, 2**63)),
        logit_bias=tuple((int(i), float(rng.normal())) for i in rng.integers(0, vocab, maybe(4, 0))),
        logprobs=maybe(int(rng.integers(0, 5)), -1),
        raw_logprobs=bool(rng.random() < 0.5),
        watermark_gamma=maybe(float(rng.choice([0.25, 0.5, 0.9, 1.0])), 0.0, watermarked),
        watermark_delta=float(rng.choice([-1.5, 2.0, 4.0])),
    )
    least = int(rng.integers(0, 6)) if rng.random() < 0.3 else 0
    stop_ids = tuple(int(i) for i in rng.choice(vocab, 3, replace=False))
    return Request(1, prompt, params, StoppingParams(50, least, stop_ids))


def make_step(requests, outputs=None, slots=None, tail="full") -> StepInputs:
    """Return a step that samples the next token of each request."""
    outputs = outputs or [[] for _ in requests]
    number = np.array(slots if slots is not None else range(len(requests)), np.int32)
    ids = [np.array([*r.prompt_ids, *o], np.int32) for r, o in zip(requests, outputs, strict=True)]
    return StepInputs(
        number,
        np.array([len(i) for i in ids], np.int32) - 1,
        np.ones(len(ids), np.int32),
        np.arange(len(ids), dtype=np.int32),
        tuple(Admitted(int(s), r, i) for s, r, i in zip(number, requests, ids, strict=True)),
        tail=tail,
        logprobs=max(r.sampling.logprobs for r in requests),
        prompt_logprobs=max(r.sampling.prompt_logprobs for r in requests),
    )


def assert_the_rules(logits, requests, outputs, found, allowed=None) -> None:
    """Assert that tokens and details of a step follow the rules. `details`: None if no row requested any."""
    token_ids, details = found
    details = details or [None] * len(requests)
    for i, (request, token_id, detail) in enumerate(zip(requests, token_ids, details, strict=True)):
        params, prompt = request.sampling, list(request.prompt_ids)
        mask = None if allowed is None else allowed[i]
        scores = reference_scores(logits[i], prompt, outputs[i], params, request.stopping, mask)
        assert token_id == reference_choice(scores, params, len(prompt) + len(outputs[i])), (params, request.stopping)
        if params.logprobs < 0 or token_id < 0:
            assert detail is None
            continue
        expected = log_softmax(logits[i] if params.raw_logprobs else scores)
        best = [int(j) for j in np.argsort(-expected, kind="stable")[: params.logprobs] if expected[j] > -np.inf]
        assert detail.logprob == pytest.approx(expected[token_id], abs=1e-4)
        assert list(detail.top_ids) == best
        assert detail.top_logprobs == pytest.approx(expected[best], abs=1e-4)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def random_masks(rng, rows: int, vocab: int) -> tuple[Masks, list[np.ndarray]]:
    """Return non-empty masks for some of the rows, and the allowed ids of every row."""
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
        words[:, -1] |= np.uint32(0xFFFFFFFF << vocab % 32 & 0xFFFFFFFF)  # bits beyond the vocabulary must be ignored
    return Masks(chosen.astype(np.int32), words), allowed


def reference_scores(logits, prompt, output, params: SamplingParams, stopping: StoppingParams, allowed=None):
    """Return the scores to sample from, before noise, in float64. `allowed`: a mask, as booleans."""
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
    """Return the statistic divided by its degrees of freedom. Bins that expect fewer than 5 are merged."""
    expected = probabilities * counts.sum()
    big = expected >= 5
    bins = [*counts[big], counts[~big].sum()], [*expected[big], expected[~big].sum()]
    kept = [(c, e) for c, e in zip(*bins, strict=True) if e > 0]
    return sum((c - e) ** 2 / e for c, e in kept) / max(len(kept) - 1, 1)
