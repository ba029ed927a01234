"""Variants of attention and of row operations on the CUDA backend, each against torch: see `test_cuda.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support_cuda import CudaDriver, cuda_job, torch
from support_programs import HEAD, HEADS, INNER, KV_HEADS, WIDTH, Arrays, Draw, logits_of, steps

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda.backend import CudaBackend
from tokenmill.program import ops, special
from tokenmill.program.rope import RopeTable
from tokenmill.program.value import Program, Value

torch.set_num_threads(1)


class Drawn(CudaDriver):
    """The backend of a program without a checkpoint on disk."""

    def __init__(self, program: Program, source: Arrays, **options: Any) -> None:
        CudaBackend.__init__(self, cuda_job(program, source, StepLimits(64, 4, 256, 16), cuda_graphs=(), **options))
        self.allocate(64)
        self.free = np.random.default_rng(3).permutation(64).tolist()
        self.known, self.tables = {}, {}


def assert_equals_torch(draw: Draw, **options: Any) -> None:
    program = draw.program()
    want = logits_of(program, draw.source())
    backend = Drawn(program, draw.source(), **options)
    for rows, logits in zip(steps(), want, strict=True):
        np.testing.assert_allclose(backend.feed(rows), logits, rtol=1e-3, atol=2e-4)


class OneLayer(Draw):
    """A program of one layer whose attention and activation are those of a test."""

    def _model(self, inputs: Any) -> Value:
        x = inputs.ids.record(ops.Embed, WIDTH, ids=inputs.ids, table=self.weight(64, WIDTH))
        y = x + self.attend(x)
        y = self.act(y.record(ops.Norm, x=y, weight=None, eps=1e-5, center=True))
        return self.linear(y.record(ops.TakeRows, rows="samples", x=y), 64)[0]

    def attend(self, x: Value) -> Value:
        raise NotImplementedError

    def act(self, x: Value) -> Value:
        return x


class Rows(OneLayer):
    """Norms of heads of every kind, rotations that attention does not include, and the activations of one model."""

    def __init__(self, rotary_dim: int, interleaved: bool, each: bool, act: str) -> None:
        super().__init__(1)
        self.table = RopeTable.of(rotary_dim, 1e4, 256, None, interleaved=interleaved)
        self.each, self.activation = each, act

    def attend(self, x: Value) -> Value:
        q, k, v = self.linear(x, HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD)
        q, k = (y.record(ops.Rope, x=y, rope=self.table, head_dim=HEAD) for y in (q, k))
        q, k = self.norm(q, HEAD, center=True, bias=True, each=self.each), self.norm(k, HEAD, plain=True, center=True)
        q = q.record(special.ScaleByPosition, x=q, beta=0.4, length=3)
        return q.record(ops.Attention, HEADS * HEAD, q=q, k=k, v=v, layer=0, head_dim=HEAD, scale=0.3)

    def act(self, x: Value) -> Value:
        gate, up = self.linear(x, INNER, INNER)
        y = up.record(special.XIelu, x=up, alpha_p=self.weight(1), alpha_n=self.weight(1))
        y = gate.record(ops.GatedAct, gate=gate, up=y, act=self.activation)
        return y.record(ops.Act, x=y, act=self.activation)


@pytest.mark.parametrize(
    "rotary_dim, interleaved, each, act",
    [
        (8, True, True, "linear"), pytest.param(16, False, False, "quick_gelu", marks=pytest.mark.slow),
        pytest.param(8, False, False, "sigmoid", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_operations_on_rows_and_heads(rotary_dim: int, interleaved: bool, each: bool, act: str) -> None:
    assert_equals_torch(Rows(rotary_dim, interleaved, each, act))
