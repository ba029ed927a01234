"""Attention as launches: one for tokens that stand alone, two for runs of tokens, whatever mix of them a step has.

Or, where a token shall get the same numbers in whatever step it is computed (`alike`), all as tiles of one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.backends.cuda.flashinfer import FlashInfer
from tokenmill.backends.cuda.kernels.decode import decode, list_splits
from tokenmill.backends.cuda.kernels.heads import write_heads
from tokenmill.backends.cuda.kernels.prefill import attend_tiles, tile_each
from tokenmill.backends.cuda.launch import Site
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.products import ahead
from tokenmill.backends.cuda.shapes import (
    BUSY,
    CLASSES,
    LEAST_KEYS,
    DecodeShape,
    decode_shape,
    power,
    tile_shape,
    tile_splits,
)
from tokenmill.backends.cuda.slots import CudaSlots
from tokenmill.program import ops
from tokenmill.program.ops import Weight

if TYPE_CHECKING:
    from tokenmill.backends.cuda.lower import Sizes

_LOG2E = 1.4426950408889634


Scales = dict[int, tuple[float, float]]
"""By layer: what a key and a value of the cache are multiplied by."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How a program is run, where there is a choice.

    `alike`: what is computed of a token does not depend on the other tokens of its step, nor on how many there are.
    `scales`: of the layers whose cache has any. `flash`: attends to runs in place of this backend's own kernel; it must
    have planned the step.
    """

    alike: bool = False
    scales: Scales = field(default_factory=dict)
    flash: FlashInfer | None = None


class AttentionLowering:
    """Lowers every Attention of a program; they share scratch."""

    def __init__(self, memory: Memory, weights: dict[Weight, Tensor], slots: CudaSlots, manner: Manner) -> None:
        self._memory, self._weights, self._slots = memory, weights, slots
        self._cache_scales, self._alike, self._flash = manner.scales, manner.alike, manner.flash
        found = [op for op in memory.program.ops if isinstance(op, ops.Attention)]
        sizes = [self._scratch_of(op) for op in found]
        device = memory.device.torch
        self._part = torch.empty(max((s[0] for s in sizes), default=0), device=device)
        self._sums = torch.empty(max((s[1] for s in sizes), default=0), device=device)
        self._counts = torch.zeros(max((s[2] for s in sizes), default=0), dtype=torch.int32, device=device)
        rows = max((s[4] for s in sizes), default=0)
        self._tile_part = torch.empty(BUSY * max((s[4] * s[5] for s in sizes), default=0), device=device)
        self._tile_sums = torch.empty(BUSY * rows, device=device)
        self._tile_counts = torch.zeros(BUSY, dtype=torch.int32, device=device)
        self._lists: dict[tuple[int, ...], Tensor] = {}
        self._listed = 1 + max((s[3] for s in sizes), default=0)
        rows = memory.rows["tokens"] if manner.alike else 0
        self._tiles = torch.zeros(rows, 4, dtype=torch.int32, device=device)
        self.tile_tokens = {self._tile_tokens(op) for op in found}

    @property
    def nbytes(self) -> int:
        """Bytes of scratch."""
        scratch = (self._part, self._sums, self._counts, self._tiles, *self._lists.values())
        scratch += (self._tile_part, self._tile_sums, self._tile_counts)
        return sum(tensor.nbytes for tensor in scratch)

    def lower(self, op: ops.Attention) -> Callable[[Sizes], None]:
        """The launches of one layer."""
        if self._alike:
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

    def _tiled(self, op: ops.Attention) -> Callable[[Sizes], None]:
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

    def _most_rows(self) -> int:
        """Tokens that stand alone in a step, at most."""
        most = max(self._memory.rows["tokens"], self._memory.rows["samples"])
        return min(most, max(self._memory.limits.max_batch_size, 1))

    def _scratch_of(self, op: ops.Attention) -> tuple[int, int, int, int, int, int]:
        """Of single tokens: numbers of partial results, sums, counters and splits, over the classes of rows. Of tiles:
        rows and columns.
        """
        kv_heads, shared = op.k.width // op.head_dim, op.q.width // op.k.width
        most = self._most_rows()
        splits = max(
            min(rows, most) * decode_shape(min(rows, most), op.head_dim, shared, True, self._item).splits
            for rows in CLASSES
        )
        groups = splits * kv_heads * shared
        shape = tile_shape(op.head_dim, shared, self._item, self._alike)
        return groups * op.head_dim, groups, most * kv_heads, splits, shape.rows, 2 * self._common(op)["HALF"]

    @property
    def _item(self) -> int:
        return self._memory.dtype.itemsize

    def _tile_tokens(self, op: ops.Attention) -> int:
        shared = op.q.width // op.k.width
        return tile_shape(op.head_dim, shared, self._item, self._alike).rows // shared

    def _common(self, op: ops.Attention) -> dict[str, Any]:
        """What the kernels of a layer have in common."""
        half = power(op.head_dim // 2)
        return {
            "KV_HEADS": op.k.width // op.head_dim,
            "D": op.head_dim,
            "HALF": max(half, 16),
            "BLOCK_SIZE": self._memory.limits.block_size,
        }

    def _scales(self, op: ops.Attention) -> tuple[float, float, float]:
        """What products of queries and kept keys are multiplied by, what a capped one is, and kept values."""
        key, value = self._cache_scales.get(op.layer, (1.0, 1.0))
        if op.softcap:
            return op.scale * key / op.softcap, op.softcap * _LOG2E, value
        return op.scale * key * _LOG2E, 1.0, value

    def _fits(self, op: ops.Attention) -> tuple[float, float]:
        """What keys and values are multiplied by before they are kept."""
        key, value = self._cache_scales.get(op.layer, (1.0, 1.0))
        return 1.0 / key, 1.0 / value

    def _turns(self, op: ops.Attention) -> tuple[Tensor, Tensor]:
        return self._memory.turns(op.rope) if op.rope is not None else (self._sums, self._sums)

    def _norms(self, op: ops.Attention) -> tuple[Tensor, Tensor]:
        if op.q_norm is None or op.k_norm is None:
            return self._sums, self._sums
        return self._weights[op.q_norm], self._weights[op.k_norm]

    def _lister(self, op: ops.Attention) -> tuple[Tensor, Callable[[Sizes, int, DecodeShape], None] | None]:
        """The list of splits that a layer reads, and what makes it: None if a layer before does."""
        key = op.window, op.head_dim, op.q.width // op.k.width
        if key in self._lists:
            return self._lists[key], None
        items = self._lists[key] = torch.zeros(self._listed, dtype=torch.int32, device=self._memory.device.torch)
        most, launch = power(max(self._most_rows(), 16)), Site(list_splits)

        def make(n: Sizes, rows: int, shape: DecodeShape) -> None:
            launch(
                (1,),
                items, n.pairs, n.pairs if n.singles is None else n.singles, rows, BN=shape.keys, SPLITS=shape.splits,
                LEAST=shape.least, WINDOW=op.window, SOME=n.singles is not None, BLOCK=most, num_warps=4,
            )  # fmt: skip

        return items, make

    def _alone(self, op: ops.Attention) -> Callable[[Sizes], None]:
        q, k, v, out = (self._memory.value(x) for x in (op.q, op.k, op.v, op.out))
        keys, values = self._memory.cache(op.layer)
        tables, common, shared = self._slots.tables, self._common(op), op.q.width // op.k.width
        (cos, sin), (q_norm, k_norm), (scale, cap, v_scale) = self._turns(op), self._norms(op), self._scales(op)
        (k_fit, v_fit), (items, make_list) = self._fits(op), self._lister(op)
        kv_heads, launch = op.k.width // op.head_dim, Site(decode)

        def run(n: Sizes) -> None:
            rows = n.tokens if n.singles is None else len(n.singles)
            shape = decode_shape(rows, op.head_dim, shared, n.long, self._item)
            listed = shape.splits > 1 and rows > CLASSES[0]
            if listed and make_list is not None:
                make_list(n, rows, shape)
            launch(
                (kv_heads, rows * shape.splits),
                q, k, v, keys, values, out, n.pairs, n.pairs if n.singles is None else n.singles, tables, cos, sin,
                q_norm, k_norm, self._part, self._sums, self._counts, items, q.stride(0), k.stride(0), v.stride(0),
                tables.stride(0), op.eps, scale, cap, k_fit, v_fit, v_scale, **common, G=shared,
                GP=max(16, power(shared)), BN=shape.keys, SPLITS=shape.splits, LEAST=shape.least, WINDOW=op.window,
                CAPPED=op.softcap > 0, NORM=op.q_norm is not None, ROPE=op.rope is not None, SOME=n.singles is not None,
                LISTED=listed, PDL=n.early, STAGES=shape.stages, num_warps=shape.warps, **ahead(n.early),
            )  # fmt: skip

        return run

    def _writes(self, op: ops.Attention) -> Callable[[Sizes], None]:
        """Keys and values of all tokens to the cache, their queries turned."""
        q, k, v, turned = (*(self._memory.value(x) for x in (op.q, op.k, op.v)), self._memory.queries.view(-1))
        keys, values = self._memory.cache(op.layer)
        tables, common = self._slots.tables, self._common(op)
        (cos, sin), (q_norm, k_norm), (k_fit, v_fit) = self._turns(op), self._norms(op), self._fits(op)
        kv_heads, heads, launch = op.k.width // op.head_dim, op.q.width // op.head_dim, Site(write_heads)

        def run(n: Sizes) -> None:
            launch(
                (n.tokens,),
                q, k, v, keys, values, turned, n.pairs, tables, cos, sin, q_norm, k_norm, q.stride(0), k.stride(0),
                v.stride(0), tables.stride(0), op.eps, k_fit, v_fit, **common, HEADS=heads, HEADS2=power(heads),
                KV_HEADS2=power(kv_heads), NORM=op.q_norm is not None, ROPE=op.rope is not None, num_warps=4,
            )  # fmt: skip

        return run

    def _runs(self, op: ops.Attention) -> Callable[[Tensor, int], None]:
        """Attention of tiles, whose queries and keys are written; the longest looks at so many keys."""
        out, turned = self._memory.value(op.out), self._memory.queries.view(-1)
        keys, values = self._memory.cache(op.layer)
        tables, common, shared = self._slots.tables, self._common(op), op.q.width // op.k.width
        kv_heads, (scale, cap, v_scale) = op.k.width // op.head_dim, self._scales(op)
        shape, launch = tile_shape(op.head_dim, shared, self._item, self._alike), Site(attend_tiles)

        def run(tiles: Tensor, keys_of_longest: int) -> None:
            splits = 1 if self._alike else tile_splits(len(tiles), kv_heads, keys_of_longest)
            launch(
                (len(tiles), kv_heads, splits),
                turned, keys, values, out, tiles, tables, self._tile_part, self._tile_sums, self._tile_counts,
                tables.stride(0), splits, scale, cap, v_scale, **common, G=shared, BM=shape.rows, BN=shape.keys,
                LEAST=LEAST_KEYS, WINDOW=op.window, CAPPED=op.softcap > 0, ALIKE=self._alike, SPLIT=splits > 1,
                STAGES=shape.stages, num_warps=shape.warps,
            )  # fmt: skip

        return run


def tiles_of(
    firsts: NDArray[np.int64], starts: NDArray[np.int32], counts: NDArray[np.int32], slots: NDArray[np.int32], most: int
) -> NDArray[np.int32]:
    """Runs of tokens cut into tiles of at most `most`: (n, 4) first token of the step, its position, tokens, slot."""
    pieces = -(-counts // most)
    row = np.repeat(np.arange(len(counts)), pieces)
    done = (np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * most
    made = (firsts[row] + done, starts[row] + done, np.minimum(most, counts[row] - done), slots[row])
    return np.stack(made, 1).astype(np.int32)
