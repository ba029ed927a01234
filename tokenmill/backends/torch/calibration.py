"""Run a model over texts without a server: to quantize it, matrix by matrix, and to compute a perplexity.

All texts are one step. Each weight is read when an operation needs it and dropped afterwards, so memory holds one
matrix, its hessian, and the values of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenmill.backends.base import Admitted, StepInputs
from tokenmill.backends.kind import Job
from tokenmill.backends.torch import kinds
from tokenmill.backends.torch.backend import TorchBackend
from tokenmill.backends.torch.gptq import Recipe, Rounded, rounded
from tokenmill.backends.torch.interpreter import Env
from tokenmill.backends.torch.pack import to_tensor
from tokenmill.backends.torch.step_state import StepState
from tokenmill.program import ops
from tokenmill.program.ops import Op, Weight
from tokenmill.program.value import Program
from tokenmill.quant.base import load
from tokenmill.wire.messages import Request, SamplingParams, StoppingParams

_ROWS = 256  # positions whose logits are computed at a time
_TOKENS = 4096  # whose products are added to a hessian at a time


class _Read(dict[Weight, Tensor]):
    """Weights that are read at each access, unless they were set."""

    def __init__(self, read: Callable[[Weight], Tensor]) -> None:
        super().__init__()
        self._read = read

    def __missing__(self, weight: Weight) -> Tensor:
        return self._read(weight)


class Calibration(TorchBackend):
    """The torch backend for texts of token ids. Called from one thread, and never `run`.

    `rounds`: returns True for the weight of a product that is to be rounded. The texts must fit the job's limits.
    """

    def __init__(self, job: Job, rounds: Callable[[Weight], bool] = lambda weight: False) -> None:
        self._rounds, self._recipe = rounds, Recipe()
        self._take: Callable[[Weight, Rounded], None] | None = None
        super().__init__(job)
        self.allocate(len(self.windows) * job.limits.max_batch_size * self._blocks())

    def rewritten(self, program: Program) -> Program:
        """See `TorchBackend`. The last layer is computed for all tokens."""
        return program

    def read_weights(self, job: Job) -> dict[Weight, Tensor]:
        """See `TorchBackend`."""
        return _Read(lambda weight: to_tensor(load(weight, job.source, job.read), self.dtype).to(self.device))

    def more_kernels(self) -> Mapping[type[Op], Callable[..., Any]]:
        """See `TorchBackend`."""
        return {ops.Linear: self._linear}

    @torch.inference_mode()
    def round(self, texts: Sequence[Sequence[int]], recipe: Recipe, take: Callable[[Weight, Rounded], None]) -> None:
        """Round the matrices of products in the order of the program, and pass each to `take`.

        A product is computed with the rounded matrix, so the errors of earlier matrices are part of the activations.
        """
        self._recipe, self._take = recipe, take
        self._body_of(texts)
        self._take = None

    @torch.inference_mode()
    def perplexity(self, texts: Sequence[Sequence[int]]) -> float:
        """Return the perplexity of texts: that of each token but the first ones."""
        state, env = self._body_of(texts)
        ends = np.cumsum([len(text) for text in texts])
        targets = torch.tensor([token for text in texts for token in (*text[1:], -1)], device=self.device)
        places = torch.tensor([i for i in range(int(ends[-1])) if i + 1 not in set(ends.tolist())], device=self.device)
        tail = {w for op in self.program.ops if isinstance(op, ops.Linear) and op.out.spec.rows == "samples"
                for ws in op.weights().values() for w in ws}  # fmt: skip
        state.weights.update({weight: self._weights[weight] for weight in tail})
        total = 0.0
        for some in torch.split(places, _ROWS):
            logits = self._interpreter.tail(replace(state, samples=some), env).float()
            total -= float(logits.log_softmax(-1).gather(1, targets[some][:, None]).double().sum())
        state.weights.clear()
        return float(np.exp(total / len(places)))

    def _blocks(self) -> int:
        return -(-self.limits.max_total_tokens // self.limits.block_size)

    def _body_of(self, texts: Sequence[Sequence[int]]) -> tuple[StepState, Env]:
        """Compute all tokens of all texts, up to the rows that sample."""
        each = self._blocks()
        blocks = [
            (table, slot, i, (table * len(texts) + slot) * each + i)
            for table in range(len(self.windows)) for slot in range(len(texts)) for i in range(each)
        ]  # fmt: skip
        admitted = [
            Admitted(slot, Request(slot, tuple(text), SamplingParams(), StoppingParams(1)), np.array(text, np.int32))
            for slot, text in enumerate(texts)
        ]
        slots, none = np.arange(len(texts), dtype=np.int32), np.zeros(0, np.int32)
        counts = np.array([len(text) for text in texts], np.int32)
        inputs = StepInputs(slots, np.zeros_like(slots), counts, none, tuple(admitted), np.array(blocks, np.int32))
        state, ids = self._state(self.begin(inputs))
        return state, self._interpreter.body(state, ids)

    def _linear(self, op: ops.Linear, step: StepState, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._take is None or not self._rounds(op.weight):
            return kinds.linear(op, step, x, residual)
        hessian = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        for some in torch.split(x, _TOKENS):
            hessian.addmm_(some.float().T, some.float())
        made = rounded(step.weights[op.weight], hessian, self._recipe)
        self._take(op.weight, made)
        step.weights[op.weight] = made.numbers
        y = kinds.linear(op, step, x, residual)
        del step.weights[op.weight]
        return y
