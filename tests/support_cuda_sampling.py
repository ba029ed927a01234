"""The CUDA backend's sampler over logits that a test gives, and what is expected of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support_cuda import DEVICE, torch
from support_sampling import log_softmax, reference_choice, reference_scores

from tokenmill.backends.base import Admitted, Masks, StepInputs, StepLimits
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.lower import Sizes
from tokenmill.backends.cuda.sampler import Sampler
from tokenmill.backends.cuda.slots import CudaSlots
from tokenmill.backends.torch import sampling
from tokenmill.backends.torch.slots import Slots
from tokenmill.wire.messages import Request, SamplingParams, StoppingParams

SLOTS, MAX_TOTAL = 8, 64


class Bench:
    """Slots and a sampler as the backend has them, over logits that a test gives."""

    def __init__(
        self, logits: Any, *, slots: int = SLOTS, max_total: int = MAX_TOTAL, dtype: Any = torch.float32,
        alike: bool = False,
    ) -> None:  # fmt: skip
        self.device = device = Device(DEVICE)
        self.limits = StepLimits(64, slots, max_total, 16)
        self.logits = torch.tensor(np.asarray(logits)).to(dtype).to(device.torch)
        self.slots = CudaSlots(self.limits, self.logits.shape[1], device)
        self.sampler = Sampler(self.logits, self.slots, device, alike)
        self.vocab = self.logits.shape[1]

    def sizes(self, inputs: StepInputs, some: bool = False) -> Sizes:
        """The step as launches see it; `some`: beside tokens of other sequences that do not sample."""
        rows = np.stack([inputs.slots, inputs.starts + inputs.counts - 1], 1)[inputs.samples].astype(np.int32)
        if not some:
            return Sizes(len(rows), len(rows), torch.tensor(rows.ravel()).to(DEVICE))
        order = np.random.default_rng(0).permutation(2 * len(rows))[: len(rows)].astype(np.int32)
        pairs = np.full((2 * len(rows), 2), (self.slots.spare, 3), np.int32)
        pairs[order] = rows
        return Sizes(len(pairs), len(rows), torch.tensor(pairs.ravel()).to(DEVICE), torch.tensor(order).to(DEVICE))

    def run(
        self, inputs: StepInputs, *, some: bool = False, chosen: bool = False, masks: Masks | None = None
    ) -> tuple[list[int], list[Any]]:
        """Tokens and details of a step, as its result tells them."""
        self.slots.apply(inputs)
        sizes = self.sizes(inputs, some)
        if chosen:
            self.sampler.launch(sizes)
        ids, logprobs = self.sampler.sample(inputs, sizes, chosen, masks)
        self.device.finish()
        token_ids = ids.tolist()
        self.assert_clean(inputs, token_ids)
        if logprobs is None:
            return token_ids, [None] * len(token_ids)
        wanted = np.where(np.array(token_ids) < 0, -1, logprobs.wanted)
        return token_ids, replace(logprobs, wanted=wanted).details()

    def assert_clean(self, inputs: StepInputs, token_ids: list[int]) -> None:
        """What has to be zero between steps is, and tokens stand in their slots."""
        assert int(self.sampler._counts.abs().max()) == 0
        assert int(self.sampler._done.abs().max()) == 0
        ends = (inputs.starts + inputs.counts)[inputs.samples]
        held = self.slots.tokens.cpu().numpy()[inputs.slots[inputs.samples], ends]
        assert held.tolist() == [max(i, 0) for i in token_ids]


def a_request(prompt: Any = (1, 2, 3), stopping: StoppingParams | None = None, **params: Any) -> Request:
    return Request(1, tuple(int(i) for i in prompt), SamplingParams(**params), stopping or StoppingParams(10))


def make_step(requests: list[Request], outputs: Any = None, slots: Any = None) -> StepInputs:
    """A step that samples each request's next token."""
    outputs = outputs or [[] for _ in requests]
    number = np.array(slots if slots is not None else range(len(requests)), np.int32)
    ids = [np.array([*r.prompt_ids, *o], np.int32) for r, o in zip(requests, outputs, strict=True)]
    return StepInputs(
        number,
        np.array([len(i) for i in ids], np.int32) - 1,
        np.ones(len(ids), np.int32),
        np.arange(len(ids), dtype=np.int32),
        tuple(Admitted(int(s), r, i) for s, r, i in zip(number, requests, ids, strict=True)),
        tail="full",
        logprobs=max(r.sampling.logprobs for r in requests),
    )


def run(logits: Any, requests: list[Request], outputs: Any = None, slots: Any = None, **how: Any) -> Any:
    bench = Bench(logits, slots=max(SLOTS, len(requests)), dtype=how.pop("dtype", torch.float32))
    return bench.run(make_step(requests, outputs, slots), **how)


def torch_run(logits: Any, requests: list[Request], outputs: Any = None) -> Any:
    """The torch backend's tokens and details."""
    inputs = make_step(requests, outputs)
    slots = Slots(StepLimits(64, max(SLOTS, len(requests)), MAX_TOTAL, 16), logits.shape[1])
    slots.apply(inputs)
    sampled = sampling.sample(torch.tensor(logits), slots, inputs)
    return sampled.token_ids.tolist(), sampled.logprobs.details() if sampled.logprobs else None


def random_request(rng: np.random.Generator, vocab: int) -> Request:
    def maybe(value: Any, off: Any, p: float = 0.35) -> Any:
        return value if rng.random() < p else off

    params = SamplingParams(
        temperature=float(rng.choice([0.0, 0.5, 1.0, 1.7])),
        top_k=maybe(int(rng.integers(1, min(vocab, 100) + 20)), 0),
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
        watermark_gamma=maybe(float(rng.choice([0.25, 0.5, 0.9, 1.0])), 0.0, 0.1),
        watermark_delta=float(rng.choice([-1.5, 2.0, 4.0])),
    )
    stop_ids = tuple(int(i) for i in rng.choice(vocab, 3, replace=False))
    least = int(rng.integers(0, 6)) if rng.random() < 0.3 else 0
    prompt = tuple(int(i) for i in rng.integers(0, vocab, rng.integers(1, 20)))
    return Request(1, prompt, params, StoppingParams(50, least, stop_ids))


def assert_the_references(
    logits: Any, requests: list[Request], outputs: Any, found: Any, allowed: Any = None
) -> None:
    """Tokens and details of `run` are those of the rules."""
    for i, (request, token_id, detail) in enumerate(zip(requests, *found, strict=True)):
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


def replaced(request: Request, **params: Any) -> Request:
    fields = {f: getattr(request.sampling, f) for f in SamplingParams.__struct_fields__} | params
    return Request(request.id, request.prompt_ids, SamplingParams(**fields), request.stopping)
