"""Attention to compressed rows as launches: single tokens attend to the rows, runs of several to expanded keys.

Batch-invariant attention computes all tokens like single ones, some at a time, always with the same sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tokenmill.backends.cuda.attention import LOG2E, AttentionOptions, most_single_rows
from tokenmill.backends.cuda.kernels import latent as kernels
from tokenmill.backends.cuda.kernels.decode import list_splits
from tokenmill.backends.cuda.launch import Run, Site, ahead
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.row_ops import rotation
from tokenmill.backends.cuda.shapes import (
    BUSY,
    CLASSES,
    LEAST_KEYS,
    Contexts,
    LatentShape,
    TileShape,
    expanded_shape,
    latent_shape,
    power,
    tile_splits,
)
from tokenmill.backends.cuda.sizes import Expansion, Sizes
from tokenmill.backends.cuda.slots import CudaSlots
from tokenmill.program import ops
from tokenmill.program.ops import Weight

_EXPANDED = 1 << 26  # numbers of expanded keys and values that are held at a time, unless one head has more
_LEAST_HELD = 1 << 14  # compressed rows that are gathered at a time, unless a sequence has more
_COLUMNS = 128  # of a row that a program computes
_INVARIANT_ROWS = 64  # class of rows whose sizes batch-invariant attention has


class LatentSizes(NamedTuple):
    """Sizes of an operation. `plain`, `turned`: columns of a head of a query; `value`: of a value; `rank`: of a row."""

    heads: int
    plain: int
    turned: int
    value: int
    rank: int

    @classmethod
    def of(cls, op: ops.LatentAttention) -> LatentSizes:
        """Return the sizes of an operation."""
        heads, turned = op.q.width // op.head_dim, op.key.width
        return cls(heads, op.head_dim - turned, turned, op.value_dim, op.latent.width)

    @property
    def width(self) -> int:
        """Columns of a cached row."""
        return self.rank + self.turned

    @property
    def expanded(self) -> int:
        """Columns of a key and a value of one head, without the rotated ones."""
        return self.plain + self.value


class LatentLowering:
    """Lowers attention to compressed rows. All layers share scratch."""

    def __init__(
        self, memory: Memory, weights: dict[Weight, Tensor], slots: CudaSlots, options: AttentionOptions
    ) -> None:
        self._memory, self._weights, self._slots = memory, weights, slots
        self._scales, self._invariant = options.scales, options.batch_invariant
        self._item, self._most, limits = memory.dtype.itemsize, most_single_rows(memory), memory.limits
        found = {LatentSizes.of(op) for op in memory.program.ops if isinstance(op, ops.LatentAttention)}
        in_all = limits.max_batch_size * limits.max_total_tokens
        self._held_rows = max(limits.max_total_tokens, min(_LEAST_HELD, in_all))
        self._tile_rows = min((self._tile(size).rows for size in found), default=0)
        expands = bool(found) and not self._invariant

        def scratch(sizes: list[int], dtype: torch.dtype = torch.float32, most: int = 1) -> Tensor:
            return torch.zeros(most * max(sizes, default=0), dtype=dtype, device=memory.device.torch)

        splits = {size: self._most_splits(size) for size in found}
        self._queries = scratch([size.heads * size.width for size in found], memory.dtype, self._most)
        self._results = scratch([size.heads * size.rank for size in found], memory.dtype, self._most)
        self._parts = scratch([splits[size] * size.heads * size.rank for size in found])
        self._sums = scratch([splits[size] * size.heads for size in found])
        self._listed = 1 + max(splits.values(), default=0)
        self._lists: dict[LatentSizes, Tensor] = {}
        self._held = scratch([self._held_rows * size.width for size in found], memory.dtype, expands)
        self._expanded = scratch([self._most_expanded(size) for size in found], memory.dtype, expands)
        self._tile_parts = scratch([self._tile(size).rows * _padded(size.value) for size in found], most=BUSY * expands)
        self._tile_sums = scratch([self._tile(size).rows for size in found], most=BUSY * expands)
        self._tile_counts = scratch([1 for _ in found], torch.int32, BUSY * expands)

    @property
    def nbytes(self) -> int:
        """Bytes of scratch."""
        held = [tensor for tensor in vars(self).values() if isinstance(tensor, Tensor)]
        return sum(tensor.nbytes for tensor in (*held, *self._lists.values()))

    @property
    def expands(self) -> tuple[int, int] | None:
        """The most tokens of a tile, and of compressed rows that are expanded together; None if none are."""
        return (self._tile_rows, self._held_rows) if self._tile_rows and not self._invariant else None

    def lower(self, op: ops.LatentAttention) -> Run:
        """Return the launches of one layer."""
        alone, write, expanded = self._alone(op), self._absorb(op, attend=False), self._runs(op)

        def run(n: Sizes) -> None:
            if self._invariant:
                for first in range(0, n.tokens, self._most):
                    alone(replace(n, singles=None), first, min(self._most, n.tokens - first))
                return
            if n.expansions:
                write(n, 0, n.tokens, 16)
                for expansion in n.expansions:
                    expanded(n, expansion)
            rows = n.tokens if n.singles is None else len(n.singles)
            if rows:
                alone(n, 0, rows)

        return run

    # ---- sizes ----

    def _most_splits(self, size: LatentSizes) -> int:
        """Return the most splits of single tokens, all rows together."""
        rows = {min(rows, self._most) for rows in CLASSES}
        return max(n * self._shape(size, n, long).splits for n in rows for long in (False, True))

    def _most_expanded(self, size: LatentSizes) -> int:
        """Return the numbers of expanded keys and values that are held at a time: at least those of one head."""
        of_head = self._held_rows * size.expanded
        return max(of_head, min(of_head * size.heads, _EXPANDED))

    def _shape(self, size: LatentSizes, rows: int, long: bool) -> LatentShape:
        if self._invariant:
            rows, long = _INVARIANT_ROWS, True
        return latent_shape(rows, size.heads, long, self._item)

    def _tile(self, size: LatentSizes) -> TileShape:
        return expanded_shape(size.plain + size.turned, self._item)

    # ---- launches ----

    def _common(self, op: ops.LatentAttention) -> dict[str, Any]:
        """Return the constants that the kernels of a layer share."""
        size = LatentSizes.of(op)
        return {"R": size.rank, "K": size.turned, "HALF": _padded(size.turned) // 2}

    def _cos_sin(self, op: ops.LatentAttention) -> tuple[Tensor, Tensor]:
        return (self._sums, self._sums) if op.rope is None else self._memory.cos_sin(op.rope, op.key.width)

    def _scale(self, op: ops.LatentAttention) -> float:
        """Return the factor that a cached row is multiplied by."""
        return self._scales.get(op.layer, (1.0, 1.0))[0]

    def _table(self, op: ops.LatentAttention) -> Tensor:
        return self._slots.table(self._memory.cache_plan.table(op.layer))

    def _absorb(self, op: ops.LatentAttention, attend: bool) -> Callable[[Sizes, int, int, int], None]:
        """Write the rows of tokens to the cache, and with `attend` make their queries."""
        q, latent, key = (self._memory.value(x) for x in (op.q, op.latent, op.key))
        expand, cache, tables = self._weights[op.expand], self._memory.rows_of(op.layer), self._table(op)
        size, (cos, sin), launch = LatentSizes.of(op), self._cos_sin(op), Site(kernels.absorb)
        rope = -rotation(op.rope) if op.interleaved else rotation(op.rope)
        columns = min(_COLUMNS if self._item == 2 else _COLUMNS // 2, _padded(size.rank))

        def run(n: Sizes, first: int, rows: int, tile: int) -> None:
            grid = triton.cdiv(rows, tile), size.heads + 1, triton.cdiv(size.rank, columns)
            some = attend and n.singles is not None
            launch(
                grid if attend else (grid[0], 1, grid[2]),
                q, latent, key, expand, cache, self._queries, n.pairs, n.singles if some else n.pairs, tables, cos, sin,
                q.stride(0), latent.stride(0), key.stride(0), tables.stride(0), 1.0 / self._scale(op), first, rows,
                **self._common(op), HEADS=size.heads, PLAIN=size.plain, P2=_padded(size.plain), V=size.value,
                BM=tile, BR=columns, BLOCK_SIZE=self._memory.limits.block_size, ROPE=rope, ATTEND=attend, SOME=some,
                PDL=n.early, num_warps=4 if tile == 16 else 8, **ahead(n.early),
            )  # fmt: skip

        return run

    def _alone(self, op: ops.LatentAttention) -> Callable[[Sizes, int, int], None]:
        """Attend from single tokens: all, those in `singles`, or so many from `first` on."""
        size, absorb, expand = LatentSizes.of(op), self._absorb(op, attend=True), self._expand_values(op)
        cache, tables, make_list = self._memory.rows_of(op.layer), self._table(op), self._lister(op)
        attend, merge, common = Site(kernels.attend_rows), Site(kernels.merge_rows), self._common(op)
        scale = op.scale * self._scale(op) * LOG2E

        def run(n: Sizes, first: int, rows: int) -> None:
            shape, some = self._shape(size, rows, n.contexts is Contexts.LONG), n.singles is not None
            tile = 16 if rows <= CLASSES[-2] or self._invariant else 64
            which = n.pairs if n.singles is None else n.singles
            listed = shape.splits > 1 and rows > CLASSES[0] and not self._invariant
            items = make_list(n, rows, shape) if listed else n.pairs
            absorb(n, first, rows, tile)
            attend(
                (triton.cdiv(size.heads, shape.heads), rows * shape.splits),
                self._queries, cache, self._results, self._parts, self._sums, n.pairs, which, tables, items,
                tables.stride(0), scale, self._scale(op), first, **common, HEADS=size.heads, G=shape.heads,
                GP=max(16, shape.heads), R2=_padded(size.rank), BLOCK_SIZE=self._memory.limits.block_size,
                BN=shape.keys, SPLITS=shape.splits, LEAST=shape.least, SOME=some, LISTED=listed, PDL=n.early,
                STAGES=shape.stages, num_warps=shape.warps, **ahead(n.early),
            )  # fmt: skip
            if shape.splits > 1:
                merge(
                    (rows, size.heads, triton.cdiv(size.rank, _COLUMNS)),
                    self._parts, self._sums, self._results, n.pairs, which, first, HEADS=size.heads, R=size.rank,
                    BC=_COLUMNS, BN=shape.keys, SPLITS=shape.splits, LEAST=shape.least, SOME=some, PDL=n.early,
                    num_warps=4, **ahead(n.early),
                )  # fmt: skip
            expand(n, first, rows, tile)

        return run

    def _lister(self, op: ops.LatentAttention) -> Callable[[Sizes, int, LatentShape], Tensor]:
        """Return the function that returns the list of splits; the first layer of its sizes launches its making."""
        size = LatentSizes.of(op)
        earlier = size in self._lists
        if not earlier:
            self._lists[size] = torch.zeros(self._listed, dtype=torch.int32, device=self._memory.device.torch)
        items, most, launch = self._lists[size], power(max(self._most, 16)), Site(list_splits)

        def make(n: Sizes, rows: int, shape: LatentShape) -> Tensor:
            if not earlier:
                launch(
                    (1,),
                    items, n.pairs, n.pairs if n.singles is None else n.singles, rows, BN=shape.keys,
                    SPLITS=shape.splits, LEAST=shape.least, WINDOW=0, SOME=n.singles is not None, BLOCK=most,
                    num_warps=4,
                )  # fmt: skip
            return items

        return make

    def _expand_values(self, op: ops.LatentAttention) -> Callable[[Sizes, int, int, int], None]:
        """Expand the results of single tokens to values."""
        size, expand, out = LatentSizes.of(op), self._weights[op.expand], self._memory.value(op.out)
        columns, launch = min(64, _padded(size.value)), Site(kernels.expand_values)

        def run(n: Sizes, first: int, rows: int, tile: int) -> None:
            launch(
                (triton.cdiv(rows, tile), size.heads, triton.cdiv(size.value, columns)),
                self._results, expand, out, n.pairs if n.singles is None else n.singles, first, rows, HEADS=size.heads,
                PLAIN=size.plain, V=size.value, R=size.rank, BM=tile, BV=columns, BK=min(64, _padded(size.rank)),
                SOME=n.singles is not None, PDL=n.early, STAGES=3 if self._item == 2 else 1, num_warps=4,
                **ahead(n.early),
            )  # fmt: skip

        return run

    def _runs(self, op: ops.LatentAttention) -> Callable[[Sizes, Expansion], None]:
        """Expand the cached rows of runs, for some heads at a time, and attend to them."""
        size, cache, tables = LatentSizes.of(op), self._memory.rows_of(op.layer), self._table(op)
        q, out, weight, (cos, sin) = (
            self._memory.value(op.q), self._memory.value(op.out), self._weights[op.expand], self._cos_sin(op)
        )  # fmt: skip
        rope = -rotation(op.rope) if op.interleaved else rotation(op.rope)
        gather, attend, common = Site(kernels.gather_rows), Site(kernels.attend_expanded), self._common(op)
        shape, columns = self._tile(size), size.expanded

        def run(n: Sizes, e: Expansion) -> None:
            gather(
                (triton.cdiv(e.longest, 16), e.runs),
                cache, self._held, e.rows, tables, tables.stride(0), self._scale(op), e.first_run, R=size.rank,
                K=size.turned, WIDTH=_padded(size.width), BM=16, BLOCK_SIZE=self._memory.limits.block_size, num_warps=4,
            )  # fmt: skip
            held = self._held[: e.keys * size.width].view(e.keys, size.width)[:, : size.rank]
            at_once = min(size.heads, len(self._expanded) // (e.keys * columns))
            for first in range(0, size.heads, at_once):
                heads = min(at_once, size.heads - first)
                made = self._expanded[: e.keys * heads * columns].view(e.keys, heads * columns)
                torch.mm(held, weight[first * columns : (first + heads) * columns].t(), out=made)
                splits = tile_splits(e.tiles, heads, e.longest)
                attend(
                    (e.tiles, heads, splits),
                    q, self._held, self._expanded, out, e.all_tiles, cos, sin, self._tile_parts, self._tile_sums,
                    self._tile_counts, q.stride(0), e.first_tile, first, heads, splits, op.scale * LOG2E, **common,
                    HEADS=size.heads, PLAIN=size.plain, P2=_padded(size.plain), V=size.value, V2=_padded(size.value),
                    BM=shape.rows, BN=shape.keys, LEAST=LEAST_KEYS, ROPE=rope, SPLIT=splits > 1, STAGES=shape.stages,
                    num_warps=shape.warps,
                )  # fmt: skip

        return run


def _padded(columns: int) -> int:
    """Return the columns that a tile of matrix units has for so many."""
    return power(max(columns, 16))
