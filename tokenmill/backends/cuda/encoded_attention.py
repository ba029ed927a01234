"""Attention of an encoder and a decoder as launches: one for all single tokens of a step, one for all runs.

A run of the encoder is runs only: its tokens are those of whole inputs, one behind the other. Batch-invariant attention
computes single tokens as tiles, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tokenmill.backends.cuda.attention import LOG2E, AttentionOptions, most_single_rows
from tokenmill.backends.cuda.kernels.encoded import CROSS, OWN, WITHIN, attend_single, attend_spans, write_rows
from tokenmill.backends.cuda.kernels.prefill import tile_each
from tokenmill.backends.cuda.launch import Run, Site, ahead
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.shapes import CLASSES, TileShape, power, span_shape, tile_shape
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.backends.cuda.slots import CudaSlots
from tokenmill.program.encoded import (
    CrossAttention,
    DecoderAttention,
    EncoderAttention,
    InputIds,
    StoreInput,
    buckets_of,
)
from tokenmill.program.ops import Op, Weight

Attends = EncoderAttention | DecoderAttention | CrossAttention
_WRITTEN = 1024  # numbers of a token's keys that a program writes


class _Cached(NamedTuple):
    """Cache of a layer: keys, values, block table, factors before they are cached, and of what is read."""

    keys: Tensor
    values: Tensor
    tables: Tensor
    fits: tuple[float, float]
    scales: tuple[float, float]


class EncodedLowering:
    """Lowers the operations in `program/encoded.py`. All layers share scratch; biases by distance are made once."""

    def __init__(
        self, memory: Memory, weights: dict[Weight, Tensor], slots: CudaSlots, options: AttentionOptions
    ) -> None:
        self._memory, self._slots = memory, slots
        self._scales, self._invariant = options.scales, options.batch_invariant
        device, found = memory.device.torch, [op for op in memory.program.ops if isinstance(op, Attends)]
        most = most_single_rows(memory)
        heads = max((op.q.width // op.head_dim for op in found), default=0)
        parts = max(min(rows, most) * span_shape(min(rows, most)).splits for rows in CLASSES) * heads
        self._part = torch.empty(parts * max((op.head_dim for op in found), default=0), device=device)
        self._sums = torch.empty(parts, device=device)
        self._counts = torch.zeros(most * heads, dtype=torch.int32, device=device)
        rows = memory.rows["tokens"] if found and self._invariant else 0
        self._tiles = torch.zeros(rows, 4, dtype=torch.int32, device=device)
        self._biases: dict[tuple[Weight, int, bool], Tensor] = {}
        for op in found:
            if not isinstance(op, CrossAttention) and (key := _bias_key(op)) not in self._biases:
                self._biases[key] = _by_distance(weights[op.bias], *key[1:])
        self.tile_tokens = {self._shape(op).rows for op in found}

    @property
    def nbytes(self) -> int:
        """Bytes of scratch and biases."""
        return sum(held.nbytes for held in (self._part, self._sums, self._counts, self._tiles, *self._biases.values()))

    def by_kind(self) -> Mapping[type[Op], Callable[[Any], Run]]:
        """Return the lowering of each kind of operation."""
        return {
            InputIds: lambda op: lambda n: None,  # A lookup reads ids by slot and position.
            EncoderAttention: self._within,
            StoreInput: lambda op: self._writes(op.k, op.v, op.layer),
            DecoderAttention: self._own,
            CrossAttention: self._cross,
        }

    def _within(self, op: EncoderAttention) -> Run:
        keys, values = self._memory.value(op.k), self._memory.value(op.v)
        attend, rows = self._attends(op, keys, values, None), self._shape(op).rows
        return lambda n: attend(n.tiles[rows])

    def _own(self, op: DecoderAttention) -> Run:
        write, runs, alone = self._writes(op.k, op.v, op.layer), self._runs(op), self._alone(op)

        def run(n: Sizes) -> None:
            if n.tiles or self._invariant:
                write(n)
            runs(n)
            alone(n)

        return run

    def _cross(self, op: CrossAttention) -> Run:
        runs, alone = self._runs(op), self._alone(op)

        def run(n: Sizes) -> None:
            runs(n)
            alone(n)

        return run

    def _cached(self, layer: int) -> _Cached:
        (keys, values), (key, value) = self._memory.cache(layer), self._scales.get(layer, (1.0, 1.0))
        tables = self._slots.table(self._memory.cache_plan.table(layer))
        return _Cached(keys, values, tables, (1.0 / key, 1.0 / value), (key, value))

    def _shape(self, op: Attends) -> TileShape:
        return tile_shape(op.head_dim, 1, self._memory.dtype.itemsize, self._invariant)

    def _common(self, op: Attends) -> dict[str, Any]:
        """Return the constants that the kernels of a layer share."""
        kinds = {EncoderAttention: WITHIN, DecoderAttention: OWN, CrossAttention: CROSS}
        return {
            "SPAN": kinds[type(op)].value,
            "HEADS": op.q.width // op.head_dim,
            "D": op.head_dim,
            "P": max(power(op.head_dim), 16),
            "BLOCK_SIZE": self._memory.limits.block_size,
        }

    def _bias(self, op: Attends) -> tuple[Tensor, int]:
        """Return the biases by distance and the longest one; any tensor where there are none."""
        return (self._sums, 0) if isinstance(op, CrossAttention) else (self._biases[_bias_key(op)], op.longest)

    def _writes(self, k: Any, v: Any, layer: int) -> Run:
        """Write keys and values of all tokens to the cache."""
        keys, values, cached = self._memory.value(k), self._memory.value(v), self._cached(layer)
        block, launch = min(power(k.width), _WRITTEN), Site(write_rows)
        columns = triton.cdiv(k.width, block)

        def run(n: Sizes) -> None:
            launch(
                (n.tokens, columns),
                keys, values, cached.keys, cached.values, n.pairs, cached.tables, keys.stride(0), values.stride(0),
                cached.tables.stride(0), *cached.fits, WIDTH=k.width, BLOCK=block,
                BLOCK_SIZE=self._memory.limits.block_size, num_warps=4,
            )  # fmt: skip

        return run

    def _attends(self, op: Attends, keys: Tensor, values: Tensor, cached: _Cached | None) -> Callable[[Tensor], None]:
        """Attend from tiles. `cached`: None for keys of the run's own rows."""
        q, out, sampling = self._memory.value(op.q), self._memory.value(op.out), self._slots.sampling
        tables = self._slots.tables if cached is None else cached.tables
        key_scale, value_scale = (1.0, 1.0) if cached is None else cached.scales
        (bias, longest), common, shape = self._bias(op), self._common(op), self._shape(op)
        launch = Site(attend_spans)

        def run(tiles: Tensor) -> None:
            launch(
                (len(tiles), common["HEADS"]),
                q, keys, values, out, tiles, tables, sampling, bias, q.stride(0), keys.stride(0), values.stride(0),
                tables.stride(0), sampling.stride(0), op.scale * key_scale * LOG2E, value_scale, **common,
                BM=shape.rows, BN=shape.keys, LONGEST=longest, STAGES=shape.stages, num_warps=shape.warps,
            )  # fmt: skip

        return run

    def _runs(self, op: DecoderAttention | CrossAttention) -> Run:
        """Attend from runs of several tokens, whose keys are written; batch-invariant also from single ones."""
        cached, each, rows = self._cached(op.layer), Site(tile_each), self._shape(op).rows
        attend = self._attends(op, cached.keys, cached.values, cached)

        def run(n: Sizes) -> None:
            if n.tiles:
                attend(n.tiles[rows])
            singles = n.tokens if n.singles is None else len(n.singles)
            if self._invariant and singles:
                some = n.pairs if n.singles is None else n.singles
                each((singles,), n.pairs, some, self._tiles, SOME=n.singles is not None, num_warps=1)
                attend(self._tiles[:singles])

        return run

    def _alone(self, op: DecoderAttention | CrossAttention) -> Run:
        """Attend from single tokens, and cache their keys and values; nothing if attention is batch-invariant."""
        if self._invariant:
            return lambda n: None
        own = isinstance(op, DecoderAttention)
        q, out, sampling = self._memory.value(op.q), self._memory.value(op.out), self._slots.sampling
        k, v = (self._memory.value(op.k), self._memory.value(op.v)) if isinstance(op, DecoderAttention) else (q, q)
        (bias, longest), common, cached = self._bias(op), self._common(op), self._cached(op.layer)
        key_scale, value_scale = cached.scales
        launch = Site(attend_single)

        def run(n: Sizes) -> None:
            rows = n.tokens if n.singles is None else len(n.singles)
            if not rows:
                return
            shape = span_shape(rows, op.head_dim, own)
            launch(
                (common["HEADS"], rows * shape.splits),
                q, k, v, cached.keys, cached.values, out, n.pairs, n.pairs if n.singles is None else n.singles,
                cached.tables, sampling, bias, self._part, self._sums, self._counts, q.stride(0), k.stride(0),
                v.stride(0), cached.tables.stride(0), sampling.stride(0), op.scale * key_scale * LOG2E, *cached.fits,
                value_scale, **common, BN=shape.keys, SPLITS=shape.splits, LEAST=shape.least, LONGEST=longest,
                SOME=n.singles is not None, PDL=n.early, STAGES=shape.stages, num_warps=shape.warps, **ahead(n.early),
            )  # fmt: skip

        return run


def _bias_key(op: EncoderAttention | DecoderAttention) -> tuple[Weight, int, bool]:
    return op.bias, op.longest, isinstance(op, EncoderAttention)


def _by_distance(table: Tensor, longest: int, both_sides: bool) -> Tensor:
    """Return the biases (heads, 2 · longest + 1) of the distances from -longest to longest, in units of log2(e)."""
    distances = torch.arange(-longest, longest + 1).numpy()
    buckets = torch.from_numpy(buckets_of(distances, len(table), longest, both_sides=both_sides))
    return (table[buckets.to(table.device)].t() * LOG2E).float().contiguous()
