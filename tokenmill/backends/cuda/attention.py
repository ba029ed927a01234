"""Attention as launches: one for all single tokens of a step, two for all runs of several tokens.

Batch-invariant attention computes all of them as tiles of one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tokenmill.backends.cuda.flashinfer import FlashInfer
from tokenmill.backends.cuda.kernels.decode import decode, list_rows, list_splits
from tokenmill.backends.cuda.kernels.heads import write_heads
from tokenmill.backends.cuda.kernels.prefill import attend_tiles, tile_each
from tokenmill.backends.cuda.launch import Run, Site, ahead
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.row_ops import rotation
from tokenmill.backends.cuda.shapes import (
    BUSY,
    CLASSES,
    LEAST_KEYS,
    Contexts,
    DecodeShape,
    decode_shape,
    power,
    tile_shape,
    tile_splits,
)
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.backends.cuda.slots import CudaSlots
from tokenmill.program import ops
from tokenmill.program.ops import Weight
from tokenmill.program.value import Program

LOG2E = 1.4426950408889634
_RANKED = 16  # rows that a program finds the places of in a list
_CODES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


Scales = dict[int, tuple[float, float]]
"""Layer -> factors that a key and a value of the cache are multiplied by."""


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """User options of attention, resolved.

    `batch_invariant`: the numbers of a token do not depend on the other tokens of its step, nor on their number.
    `scales`: of the layers whose cache has any. `flash`: computes runs in place of this backend's own kernel; its
    `plan` must have been called for the step. `rank`: of the device, whose heads are a part of the model's.
    """

    batch_invariant: bool = False
    scales: Scales = field(default_factory=dict)
    flash: FlashInfer | None = None
    rank: int = 0


class ScratchSizes(NamedTuple):
    """Numbers of scratch that the kernels of an operation need. Single tokens: the most over the classes of rows."""

    parts: int  # of single tokens: partial results
    sums: int  # of single tokens: sums of partial results
    counts: int  # of single tokens: counters
    splits: int  # of single tokens, all rows together
    tile_rows: int  # of a tile
    tile_parts: int  # of a tile: partial results


class AttentionLowering:
    """Lowers the attention of a program. All layers share scratch."""

    def __init__(
        self, memory: Memory, weights: dict[Weight, Tensor], slots: CudaSlots, options: AttentionOptions
    ) -> None:
        self._memory, self._weights, self._slots = memory, weights, slots
        self._cache_scales, self._invariant, self._flash = options.scales, options.batch_invariant, options.flash
        self._rank, self._most = options.rank, most_single_rows(memory)
        found = [op for op in memory.program.ops if isinstance(op, ops.Attention)]
        most, device = _most_of([self._scratch_of(op) for op in found]), memory.device.torch
        self._part = torch.empty(most.parts, device=device)
        self._sums = torch.empty(most.sums, device=device)
        self._counts = torch.zeros(most.counts, dtype=torch.int32, device=device)
        self._tile_part = torch.empty(BUSY * most.tile_parts, device=device)
        self._tile_sums = torch.empty(BUSY * most.tile_rows, device=device)
        self._tile_counts = torch.zeros(BUSY, dtype=torch.int32, device=device)
        self._lists: dict[tuple[int, ...], Tensor] = {}
        self._listed = 1 + most.splits
        rows = memory.rows["tokens"] if options.batch_invariant else 0
        self._tiles = torch.zeros(rows, 4, dtype=torch.int32, device=device)
        self.tile_tokens = {self._tile_tokens(op) for op in found}

    @property
    def nbytes(self) -> int:
        """Bytes of scratch."""
        scratch = (self._part, self._sums, self._counts, self._tiles, *self._lists.values())
        scratch += (self._tile_part, self._tile_sums, self._tile_counts)
        return sum(tensor.nbytes for tensor in scratch)

    def lower(self, op: ops.Attention) -> Run:
        """Return the launches of one layer."""
        if self._invariant:
            return self._tiled(op)
        alone, write, runs = self._alone(op), self._writes(op), self._runs(op)
        flash = None if self._flash is None else self._flash.lower(op)

        def run(n: Sizes) -> None:
            if n.tiles:
                write(n)
                if flash is not None:
                    flash()
                else:
                    runs(n.tiles[self._tile_tokens(op)], n.context)
            if n.singles is None or len(n.singles):
                alone(n)

        return run

    def _tiled(self, op: ops.Attention) -> Run:
        write, runs, each = self._writes(op), self._runs(op), Site(tile_each)

        def run(n: Sizes) -> None:
            write(n)
            if n.tiles:
                runs(n.tiles[self._tile_tokens(op)], n.context)
            rows = n.tokens if n.singles is None else len(n.singles)
            if rows:
                some = n.pairs if n.singles is None else n.singles
                each((rows,), n.pairs, some, self._tiles, SOME=n.singles is not None, num_warps=1)
                runs(self._tiles[:rows], 0)

        return run

    def _scratch_of(self, op: ops.Attention) -> ScratchSizes:
        kv_heads, shared = op.k.width // op.head_dim, op.q.width // op.k.width
        most = self._most
        splits = max(min(rows, most) * self._shape(op, min(rows, most), Contexts.LONG).splits for rows in CLASSES)
        groups = splits * kv_heads * shared
        rows = tile_shape(op.head_dim, shared, self._item, self._invariant).rows
        columns = 2 * self._common(op)["HALF"]
        return ScratchSizes(groups * op.head_dim, groups, most * kv_heads, splits, rows, rows * columns)

    def _shape(self, op: ops.Attention, rows: int, contexts: Contexts) -> DecodeShape:
        kv_heads, window = op.k.width // op.head_dim, op.window or op.chunk
        shared = op.q.width // op.k.width
        return decode_shape(
            rows, op.head_dim, shared, contexts, self._item, window=window, kv_heads=kv_heads,
            coded=self._memory.coded,
        )  # fmt: skip

    @property
    def _item(self) -> int:
        return self._memory.dtype.itemsize

    def _tile_tokens(self, op: ops.Attention) -> int:
        shared = op.q.width // op.k.width
        return tile_shape(op.head_dim, shared, self._item, self._invariant).rows // shared

    def _common(self, op: ops.Attention) -> dict[str, Any]:
        """Return the constants that the kernels of a layer share."""
        half = power(op.head_dim // 2)
        return {
            "KV_HEADS": op.k.width // op.head_dim,
            "D": op.head_dim,
            "HALF": max(half, 16),
            "BLOCK_SIZE": self._memory.limits.block_size,
        }

    def _elements(self, op: ops.Attention, in_pairs: bool = True) -> tuple[list[Tensor], dict[str, Any]]:
        """Return keys and values of the cache as kernels read them, 8-bit codes `in_pairs` or one by one, and how."""
        cache, codes = self._memory.cache(op.layer), _CODES.get(self._memory.cache_dtype, "") if in_pairs else ""
        elements = [part.view(torch.int16) if codes else part for part in cache]
        return elements, {"CODES": codes, "ASM": self._memory.device.real}

    def _scales(self, op: ops.Attention) -> tuple[float, float, float]:
        """Return the factors of products of queries and cached keys, of a capped product, and of cached values."""
        key, value = self._cache_scales.get(op.layer, (1.0, 1.0))
        if op.softcap:
            return op.scale * key / op.softcap, op.softcap * LOG2E, value
        return op.scale * key * LOG2E, 1.0, value

    def _fits(self, op: ops.Attention) -> tuple[float, float]:
        """Return the factors of keys and values before they are cached."""
        key, value = self._cache_scales.get(op.layer, (1.0, 1.0))
        return 1.0 / key, 1.0 / value

    def _table(self, op: ops.Attention) -> Tensor:
        """Return the block table of a layer, of all slots."""
        return self._slots.table(self._memory.cache_plan.table(op.layer))

    def _cos_sin(self, op: ops.Attention) -> tuple[Tensor, Tensor]:
        return self._memory.cos_sin(op.rope, op.head_dim) if op.rope is not None else (self._sums, self._sums)

    def _norms(self, op: ops.Attention) -> tuple[Tensor, Tensor]:
        if op.q_norm is None or op.k_norm is None:
            return self._sums, self._sums
        return self._weights[op.q_norm], self._weights[op.k_norm]

    def _biases(self, op: ops.Attention) -> tuple[Tensor, Tensor]:
        """Return the sinks and the slopes of ALiBi of the layer's heads; any tensor where it has none."""
        heads = op.q.width // op.head_dim
        own = [slope * LOG2E for slope in op.alibi[self._rank * heads :][:heads]]
        slopes = torch.tensor(own, device=self._memory.device.torch) if own else self._sums
        return self._sums if op.sinks is None else self._weights[op.sinks], slopes

    def _lister(self, op: ops.Attention) -> tuple[Tensor, Callable[[Sizes, int, DecodeShape], None] | None]:
        """Return the list of a layer's rows or splits, and its launch; None if an earlier layer launches it."""
        key = window_of(op), op.head_dim, op.q.width, op.k.width
        if key in self._lists:
            return self._lists[key], None
        items = self._lists[key] = torch.zeros(self._listed, dtype=torch.int32, device=self._memory.device.torch)
        most, of_splits, of_rows = power(max(self._most, 16)), Site(list_splits), Site(list_rows)

        def make(n: Sizes, rows: int, shape: DecodeShape) -> None:
            which = n.pairs if n.singles is None else n.singles
            if shape.splits == 1:
                of_rows(
                    (triton.cdiv(rows, _RANKED),),
                    items, n.pairs, which, rows, SOME=n.singles is not None, BM=_RANKED, BLOCK=most, num_warps=4,
                )  # fmt: skip
                return
            of_splits(
                (1,),
                items, n.pairs, which, rows, BN=shape.keys, SPLITS=shape.splits, LEAST=shape.least,
                WINDOW=window_of(op), SOME=n.singles is not None, BLOCK=most, num_warps=4,
            )  # fmt: skip

        return items, make

    def _alone(self, op: ops.Attention) -> Run:
        q, k, v, out = (self._memory.value(x) for x in (op.q, op.k, op.v, op.out))
        keys, values = self._memory.cache(op.layer)
        tables, common, shared = self._table(op), self._common(op), op.q.width // op.k.width
        (cos, sin), (q_norm, k_norm), (scale, cap, v_scale) = self._cos_sin(op), self._norms(op), self._scales(op)
        (k_fit, v_fit), (items, make_list), biases = self._fits(op), self._lister(op), self._biases(op)
        kv_heads, launch, (elements, codes) = op.k.width // op.head_dim, Site(decode), self._elements(op)
        common |= codes

        def run(n: Sizes) -> None:
            rows = n.tokens if n.singles is None else len(n.singles)
            shape = self._shape(op, rows, n.contexts)
            listed = rows > CLASSES[0 if shape.splits > 1 else 1]
            if listed and make_list is not None:
                make_list(n, rows, shape)
            launch(
                (kv_heads, rows * shape.splits),
                q, k, v, keys, values, *elements, out, n.pairs, n.pairs if n.singles is None else n.singles,
                tables, cos, sin, q_norm, k_norm, *biases, self._part, self._sums, self._counts, items, q.stride(0),
                k.stride(0), v.stride(0), tables.stride(0), op.eps, scale, cap, k_fit, v_fit, v_scale, **common,
                G=shared, GP=max(8, power(shared)), BN=shape.keys, SPLITS=shape.splits, LEAST=shape.least,
                WINDOW=window_of(op), CAPPED=op.softcap > 0, SINKS=op.sinks is not None, ALIBI=bool(op.alibi),
                NORM=op.q_norm is not None, ROPE=rotation(op.rope), SOME=n.singles is not None, LISTED=listed,
                PDL=n.early, STAGES=shape.stages, num_warps=shape.warps, **ahead(n.early),
            )  # fmt: skip

        return run

    def _writes(self, op: ops.Attention) -> Run:
        """Write keys and values of all tokens to the cache, and their rotated queries to `Memory.queries`."""
        q, k, v, rotated = (*(self._memory.value(x) for x in (op.q, op.k, op.v)), self._memory.queries.view(-1))
        keys, values = self._memory.cache(op.layer)
        tables, common = self._table(op), self._common(op)
        (cos, sin), (q_norm, k_norm), (k_fit, v_fit) = self._cos_sin(op), self._norms(op), self._fits(op)
        kv_heads, heads, launch = op.k.width // op.head_dim, op.q.width // op.head_dim, Site(write_heads)

        def run(n: Sizes) -> None:
            launch(
                (n.tokens,),
                q, k, v, keys, values, rotated, n.pairs, tables, cos, sin, q_norm, k_norm, q.stride(0), k.stride(0),
                v.stride(0), tables.stride(0), op.eps, k_fit, v_fit, **common, HEADS=heads, HEADS2=power(heads),
                KV_HEADS2=power(kv_heads), NORM=op.q_norm is not None, ROPE=rotation(op.rope), num_warps=4,
            )  # fmt: skip

        return run

    def _runs(self, op: ops.Attention) -> Callable[[Tensor, int], None]:
        """Attend from tiles, whose queries and keys are written; the longest tile attends to so many keys."""
        out, rotated = self._memory.value(op.out), self._memory.queries.view(-1)
        # Up to 64 columns, converting codes one at a time is faster than products of half the depth.
        (keys, values), codes = self._elements(op, in_pairs=op.head_dim > 64)
        tables, common, shared = self._table(op), self._common(op) | codes, op.q.width // op.k.width
        kv_heads, (scale, cap, v_scale), biases = op.k.width // op.head_dim, self._scales(op), self._biases(op)
        shape, launch = tile_shape(op.head_dim, shared, self._item, self._invariant), Site(attend_tiles)

        def run(tiles: Tensor, keys_of_longest: int) -> None:
            splits = 1 if self._invariant else tile_splits(len(tiles), kv_heads, keys_of_longest)
            launch(
                (len(tiles), kv_heads, splits),
                rotated, keys, values, out, tiles, tables, *biases, self._tile_part, self._tile_sums, self._tile_counts,
                tables.stride(0), splits, scale, cap, v_scale, **common, G=shared, BM=shape.rows, BN=shape.keys,
                LEAST=LEAST_KEYS, WINDOW=window_of(op), CAPPED=op.softcap > 0, SINKS=op.sinks is not None,
                ALIBI=bool(op.alibi), INVARIANT=self._invariant, SPLIT=splits > 1, STAGES=shape.stages,
                num_warps=shape.warps,
            )  # fmt: skip

        return run


def fewest_kv_heads(program: Program) -> int:
    """Return the fewest programs that attend from a single token without splits, over all layers."""
    heads = [op.k.width // op.head_dim for op in program.ops if isinstance(op, ops.Attention)]
    return min(heads + [1 for op in program.ops if isinstance(op, ops.LatentAttention)], default=1)


def window_of(op: ops.Attention) -> int:
    """Return WINDOW of the kernels: the size of the window, or that of chunks negated; 0: all tokens."""
    return op.window or -op.chunk


def most_single_rows(memory: Memory) -> int:
    """Return the most single tokens of a step."""
    return min(max(memory.rows["tokens"], memory.rows["samples"]), max(memory.limits.max_batch_size, 1))


def _most_of(scratches: list[ScratchSizes]) -> ScratchSizes:
    """Return the most of each number; zeros for a program without attention."""
    return ScratchSizes(*map(max, zip(*scratches, strict=True))) if scratches else ScratchSizes(0, 0, 0, 0, 0, 0)
