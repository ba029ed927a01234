"""Layers of attention with random numbers on a device, and a step behind them, to measure and to compare with torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from bench.gpu.floor import BYTES_S, FLOPS_S
from tokenmill.backends.base import StepInputs, StepLimits
from tokenmill.backends.cuda.attention import AttentionLowering, AttentionOptions, fewest_kv_heads
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.latent import LatentLowering
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.products.base import FEW
from tokenmill.backends.cuda.sizes import Sizes, StepArrays
from tokenmill.backends.cuda.slots import CudaSlots
from tokenmill.backends.torch import kinds
from tokenmill.backends.torch.attention import Scratch, plan
from tokenmill.parallel.group import Group
from tokenmill.program import ops
from tokenmill.program.ops import Part, Weight
from tokenmill.program.rope import RopeTable
from tokenmill.program.value import Inputs, Program, Value, record

REAL = torch.cuda.is_available()  # else cases are tried with few tokens, under Triton's interpreter
DTYPE = torch.bfloat16 if REAL else torch.float32
_MOST = 24 << 30  # bytes of all layers; eight of all but the smallest are more than the L2 cache holds
_BLOCK = 16


class Heads(NamedTuple):
    """Heads of attention; `fields`: of its operation."""

    heads: int
    kv_heads: int
    head_dim: int
    fields: dict[str, Any] = {}  # noqa: RUF012

    def op(self, inputs: Inputs, layer: int) -> Value:
        """Record the operation."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        x = _embedded(inputs, q + 2 * kv)
        q_, k, v = x.split(q, kv, kv)
        table = RopeTable.of(self.head_dim, 1e6, 1 << 17, None)
        sinks = {"sinks": Weight((Part("sinks", self.heads),))} if self.fields.get("sinks") else {}
        return x.record(
            ops.Attention, q, q=q_, k=k, v=v, layer=layer, head_dim=self.head_dim, scale=self.head_dim**-0.5,
            rope=table, **self.fields | sinks,
        )  # fmt: skip

    def floor(self, rows: int, context: int) -> float:
        """Return the seconds that single tokens need."""
        keys = min(context, self.fields.get("window") or context)
        return rows * keys * 2 * self.kv_heads * self.head_dim * 2 / BYTES_S

    def floor_of_prompt(self, length: int) -> float:
        """Return the seconds that a prompt needs."""
        return self.heads * self.head_dim * 4 * length * length / 2 / FLOPS_S

    @property
    def row_bytes(self) -> int:
        """Bytes of a token in the cache."""
        return 2 * self.kv_heads * self.head_dim * 2


class Rows(NamedTuple):
    """Compressed rows."""

    heads: int
    plain: int = 128
    turned: int = 64
    value: int = 128
    rank: int = 512

    def op(self, inputs: Inputs, layer: int) -> Value:
        """Record the operation."""
        q = self.heads * (self.plain + self.turned)
        x = _embedded(inputs, q + self.rank + self.turned)
        q_, row, key = x.split(q, self.rank, self.turned)
        expand = Weight((Part("expand", self.heads * (self.plain + self.value)),), self.rank)
        return x.record(
            ops.LatentAttention, self.heads * self.value, q=q_, latent=row, key=key, layer=layer, expand=expand,
            head_dim=self.plain + self.turned, value_dim=self.value, scale=(self.plain + self.turned) ** -0.5,
            rope=RopeTable.of(self.turned, 1e4, 1 << 17, None), interleaved=True,
        )  # fmt: skip

    def floor(self, rows: int, context: int) -> float:
        """Return the seconds that single tokens need: the cached rows and the expansion."""
        return (rows * context * self.row_bytes + self._expansion * 2) / BYTES_S

    def floor_of_prompt(self, length: int) -> float:
        """Return the seconds that a prompt needs: expansion, scores and sums of values."""
        pairs = length * length / 2
        scores = 2 * self.heads * (self.plain + self.turned + self.value) * pairs
        return (2 * length * self._expansion + scores) / FLOPS_S

    @property
    def _expansion(self) -> int:
        return self.heads * (self.plain + self.value) * self.rank

    @property
    def row_bytes(self) -> int:
        """Bytes of a token in the cache."""
        return (self.rank + self.turned) * 2


def _embedded(inputs: Inputs, width: int) -> Value:
    table = Weight((Part("t", 8),), width)
    return inputs.ids.record(ops.Embed, width, ids=inputs.ids, table=table)


class Layers:
    """Some layers of one kind on the device, and a step: `rows` single tokens, or one run, behind a context.

    `context`: of all rows, or of each. `cache_dtype`: None for the computation's.
    """

    def __init__(
        self, shape: Heads | Rows, rows: int, context: int | NDArray[np.int32], tokens: int, device: Device,
        cache_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.shape, self.rows, self.tokens = shape, rows, tokens
        contexts = np.broadcast_to(np.asarray(context, np.int32), (rows,))
        item = (cache_dtype or DTYPE).itemsize
        own = int(contexts.sum()) * shape.row_bytes * item // 2
        count = min(8, max(1, _MOST // own)) if tokens == 1 and REAL else 1

        def model(inputs: Inputs) -> Value:
            made = [shape.op(inputs, i) for i in range(count)]
            return made[-1].record(ops.TakeRows, rows="samples", x=made[-1])

        self.program: Program = record(model)
        kinds_ = ops.Attention | ops.LatentAttention
        self.ops: list[Any] = [op for op in self.program.ops if isinstance(op, kinds_)]
        counts = -(-contexts // _BLOCK)
        blocks, longest = int(counts.sum()), int(contexts.max())
        self.limits = StepLimits(max(rows * tokens, 64), rows, longest + _BLOCK, _BLOCK)
        self.memory = Memory(self.program, self.limits, DTYPE, device, cache_dtype, windows=False)
        self.slots = CudaSlots(self.limits, device)
        self.memory.allocate(blocks + 1)
        draw = torch.Generator(device.torch).manual_seed(0)
        self.memory._arena.view(DTYPE).normal_(0, 1, generator=draw)
        for cache in self.memory._cache.values():
            cache.copy_(torch.empty_like(cache, dtype=DTYPE).normal_(0, 1, generator=draw))
        order = np.random.default_rng(0).permutation(blocks).astype(np.int32)
        for slot, own in enumerate(np.split(order, np.cumsum(counts)[:-1])):
            self.slots.set_blocks(slot, own)
        weights = {w for op in self.ops for ws in op.weights().values() for w in ws}
        self.weights = {
            w: torch.empty((w.rows, w.columns) if w.columns else (w.rows,), dtype=DTYPE, device=device.torch)
            .normal_(0, w.columns**-0.5 if w.columns else 1.0, generator=draw)
            for w in weights
        }  # fmt: skip
        self.inputs = StepInputs(
            np.arange(rows, dtype=np.int32), (contexts - tokens).astype(np.int32),
            np.full(rows, tokens, np.int32), np.arange(rows, dtype=np.int32),
        )  # fmt: skip

    def lowered(self) -> tuple[list[Callable[[Sizes], None]], Sizes, Any]:
        """Return the launches of each layer with the sizes that are patched in, the step, and the lowering."""
        rows = isinstance(self.shape, Rows)
        lowering: Any = (LatentLowering if rows else AttentionLowering)(
            self.memory, self.weights, self.slots, AttentionOptions()
        )
        kinds_ = (set(), lowering.expands) if rows else (lowering.tile_tokens, None)
        arrays = StepArrays(self.limits, self.memory.device, self.slots.padding, *kinds_, fewest_kv_heads(self.program))
        if self.tokens > 1:
            sizes = arrays.mixed(self.inputs)
        else:
            sizes = arrays.decode(self.inputs.slots, self.inputs.starts, self.rows)
            sizes = replace(sizes, early=self.memory.device.launches_ahead and self.rows <= FEW)
        return [lowering.lower(op) for op in self.ops], sizes, lowering

    def check(self) -> float:
        """Return the relative error of the first layer's result, of which torch computes some rows in float32."""
        (run, *_), sizes, _ = self.lowered()
        op, out = self.ops[0], self.memory.value(self.ops[0].out)
        out.fill_(float("nan"))
        run(sizes)
        some = np.unique(np.linspace(0, self.rows - 1, 4).astype(np.int32)) if self.tokens == 1 else np.arange(1)
        inputs = StepInputs(some.astype(np.int32), self.inputs.starts[some], self.inputs.counts[some], some)
        at = torch.from_numpy(some).to(out.device) if self.tokens == 1 else torch.arange(self.tokens, device=out.device)
        positions = torch.from_numpy(self.inputs.starts[some].astype(np.int64)).to(out.device)
        positions = positions if self.tokens == 1 else positions + torch.arange(self.tokens, device=out.device)
        tables = self.slots.table(0)[torch.from_numpy(some.astype(np.int64)).to(out.device)]
        of = torch.arange(len(some), device=out.device).repeat_interleave(self.tokens)
        made = plan(inputs, tables, _BLOCK, positions, of, getattr(op, "window", 0))
        cache = {op.layer: self.memory._cache[op.layer].float()}
        weights = {w: tensor.float() for w, tensor in self.weights.items()}
        step = kinds.StepState(
            weights, cache, Group(), positions, {op.layer: made}, at, Scratch(), None,  # type: ignore[arg-type]
        )  # fmt: skip
        kernel: Any = kinds.kernels()[type(op)]
        with patch.object(kinds, "attend", self._with_stored(kinds.attend)):
            wanted = kernel(op, step, *(self.memory.value(v)[at].float() for v in op.reads().values()))
        return float((out[at].float() - wanted).norm() / wanted.norm())

    def _with_stored(self, attend: Callable[..., Any]) -> Callable[..., Any]:
        """Return torch's attention to new keys and values as the cache stores them."""
        kind = self.memory.cache_dtype
        if kind.itemsize > 1:
            return attend
        most = torch.finfo(kind).max

        def stored(x: torch.Tensor) -> torch.Tensor:
            return x.clamp(-most, most).to(kind).float()

        return lambda op, q, k, v, *rest: attend(op, q, stored(k), stored(v), *rest)
