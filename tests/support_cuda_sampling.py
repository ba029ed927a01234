"""The CUDA backend's sampler over given logits, and its expected results."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import support_sampling
from support_cuda import DEVICE, torch
from support_sampling import make_step

from tokenmill.backends.base import Masks, StepInputs, StepLimits
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.sampler import Sampler
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.backends.cuda.slots import CudaSlots
from tokenmill.backends.torch import sampling
from tokenmill.backends.torch.slots import Slots
from tokenmill.wire.messages import Request, SamplingParams

SLOTS, MAX_TOTAL = 8, 64

random_request = partial(support_sampling.random_request, most_k=100, watermarked=0.1)  # others are slow to interpret


class Bench:
    """Slots and a sampler as in the backend, over given logits."""

    def __init__(
        self, logits: Any, *, slots: int = SLOTS, max_total: int = MAX_TOTAL, dtype: Any = torch.float32,
        batch_invariant: bool = False,
    ) -> None:  # fmt: skip
        self.device = device = Device(DEVICE)
        self.limits = StepLimits(64, slots, max_total, 16)
        self.logits = torch.tensor(np.asarray(logits)).to(dtype).to(device.torch)
        self.slots = CudaSlots(self.limits, device)
        self.sampler = Sampler(self.logits, self.slots, device, batch_invariant)
        self.vocab = self.logits.shape[1]

    def sizes(self, inputs: StepInputs, some: bool = False) -> Sizes:
        """Return the sizes of the step for launches. `some`: beside tokens of sequences that do not sample."""
        rows = np.stack([inputs.slots, inputs.starts + inputs.counts - 1], 1)[inputs.samples].astype(np.int32)
        if not some:
            return Sizes(len(rows), len(rows), torch.tensor(rows.ravel()).to(DEVICE))
        order = np.random.default_rng(0).permutation(2 * len(rows))[: len(rows)].astype(np.int32)
        pairs = np.full((2 * len(rows), 2), (self.slots.padding, 3), np.int32)
        pairs[order] = rows
        return Sizes(len(pairs), len(rows), torch.tensor(pairs.ravel()).to(DEVICE), torch.tensor(order).to(DEVICE))

    def run(
        self, inputs: StepInputs, *, some: bool = False, chosen: bool = False, masks: Masks | None = None
    ) -> tuple[list[int], list[Any]]:
        """Return the tokens and details of a step, as its result does."""
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
        """Assert that the buffers which must be zero between steps are zero, and that slots hold the tokens."""
        assert int(self.sampler._counts.abs().max()) == 0
        assert int(self.sampler._done.abs().max()) == 0
        ends = (inputs.starts + inputs.counts)[inputs.samples]
        held = self.slots.tokens.cpu().numpy()[inputs.slots[inputs.samples], ends]
        assert held.tolist() == [max(i, 0) for i in token_ids]


def run(logits: Any, requests: list[Request], outputs: Any = None, slots: Any = None, **how: Any) -> Any:
    bench = Bench(logits, slots=max(SLOTS, len(requests)), dtype=how.pop("dtype", torch.float32))
    return bench.run(make_step(requests, outputs, slots), **how)


def torch_run(logits: Any, requests: list[Request], outputs: Any = None) -> Any:
    """Return the torch backend's tokens and details."""
    inputs = make_step(requests, outputs)
    slots = Slots(StepLimits(64, max(SLOTS, len(requests)), MAX_TOTAL, 16))
    slots.apply(inputs)
    sampled = sampling.sample(torch.tensor(logits), slots, inputs)
    return sampled.token_ids.tolist(), sampled.logprobs.details() if sampled.logprobs else None


def replaced(request: Request, **params: Any) -> Request:
    fields = {f: getattr(request.sampling, f) for f in SamplingParams.__struct_fields__} | params
    return Request(request.id, request.prompt_ids, SamplingParams(**fields), request.stopping)
