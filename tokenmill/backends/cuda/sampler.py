"""From logits to tokens on the device, and a step's tokens to pinned memory.

Steps whose rows want the likeliest token, or one drawn at a temperature, top-k, top-p and min-p among them, cost one
launch. Penalties, biases, typical-p, watermarks and log-probabilities go through torch, whose host waits in between.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokenmill.backends.base import StepInputs
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.kernels.choose import choose
from tokenmill.backends.cuda.kernels.filtered import choose_filtered
from tokenmill.backends.cuda.lower import Sizes
from tokenmill.backends.cuda.shapes import CLASSES, choose_shape, power
from tokenmill.backends.cuda.slots import CudaSlots
from tokenmill.backends.torch.sampling import Logprobs, sample

_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}
"""Bits of a logit, as float32, that are not always zero."""


class Sampler:
    """Chooses the next token of the rows of `logits` (R, V)."""

    def __init__(self, logits: Tensor, slots: CudaSlots, device: Device) -> None:
        self._logits, self._slots, self._device = logits, slots, device
        rows, self._vocab_size = logits.shape
        most = max(min(rows, c) * choose_shape(min(rows, c), self._vocab_size).chunks for c in CLASSES)
        self._best = torch.empty(most, device=device.torch)
        self._best_ids = torch.empty(most, dtype=torch.int32, device=device.torch)
        self._counts = torch.zeros(rows, dtype=torch.int32, device=device.torch)
        self._chosen = torch.zeros(rows, dtype=torch.int32, device=device.torch)

    def sample(self, inputs: StepInputs, sizes: Sizes) -> tuple[Tensor, Logprobs | None]:
        """The tokens of a step's sampling rows, to their slots and to pinned memory; and what is asked for of them.

        Both are there when a mark set afterwards is passed.
        """
        rows = len(inputs.samples)
        if inputs.tail != "full" and inputs.logprobs < 0:
            self._choose(sizes, rows, noise=inputs.tail == "plain")
            return self._device.fetch(self._chosen[:rows]), None
        if inputs.logprobs < 0 and self._only_filtered(inputs):
            self._choose_filtered(sizes, rows)
            return self._device.fetch(self._chosen[:rows]), None
        sampled = sample(self._logits[:rows], self._slots, inputs)
        self._slots.record(inputs, sampled.token_ids)
        logprobs = sampled.logprobs
        if logprobs is not None:
            chosen, ids, top = (self._device.fetch(x) for x in (logprobs.chosen, logprobs.top_ids, logprobs.top))
            logprobs = replace(logprobs, chosen=chosen, top_ids=ids, top=top)
        return self._device.fetch(sampled.token_ids), logprobs

    def warm_up(self, sizes: Sizes) -> None:
        """Compile what decode steps of this size need."""
        for noise in (False, True):
            self._choose(sizes, sizes.sampling, noise)
        self._choose_filtered(sizes, sizes.sampling)

    def warm_up_some(self, step: Tensor) -> None:
        """Compile what other steps need; `step` holds pairs of nobody's slot."""
        for most in {min(most, len(self._chosen)) for most in CLASSES}:
            step[: 2 * most : 2], step[1 : 2 * most : 2] = self._slots.spare, 0
            rows = torch.zeros(most, dtype=torch.int32, device=self._device.torch)
            self.warm_up(Sizes(most, most, step[: 2 * most], rows))

    def _only_filtered(self, inputs: StepInputs) -> bool:
        """Whether no row needs more than temperature, top-k, top-p and min-p."""
        p = self._slots.parameters.rows[inputs.slots[inputs.samples]]
        penalized = (p["repetition"] != 1) | (p["frequency"] != 0) | (p["presence"] != 0)
        return not (penalized | (p["num_biases"] > 0) | (p["typical_p"] < 1) | (p["watermark_gamma"] > 0)).any()

    def _choose_filtered(self, sizes: Sizes, rows: int) -> None:
        slots, block = self._slots, min(power(self._vocab_size), 8192)
        choose_filtered[(rows,)](
            self._logits, sizes.pairs, sizes.pairs if sizes.samples is None else sizes.samples, slots.sampling,
            slots.tokens, self._chosen, slots.tokens.stride(0), slots.sampling.stride(0), VOCAB=self._vocab_size,
            BLOCK=block, BITS=_BITS[self._logits.dtype], SOME=sizes.samples is not None,
            num_warps=max(1, min(32, block // 256)),
        )  # fmt: skip

    def _choose(self, sizes: Sizes, rows: int, noise: bool) -> None:
        shape, slots = choose_shape(rows, self._vocab_size), self._slots
        choose[(rows, shape.chunks)](
            self._logits, sizes.pairs, sizes.pairs if sizes.samples is None else sizes.samples, slots.sampling,
            slots.tokens, self._chosen, self._best, self._best_ids, self._counts, slots.tokens.stride(0),
            slots.sampling.stride(0), VOCAB=self._vocab_size, CHUNKS=shape.chunks, BLOCK=shape.block,
            ROUNDS=shape.rounds, NOISE=noise, SOME=sizes.samples is not None, num_warps=shape.warps,
        )  # fmt: skip
