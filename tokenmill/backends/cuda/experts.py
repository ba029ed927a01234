"""Mixtures of experts as launches: routing, and the products with the chosen experts.

A single row takes two launches behind its routing. More rows are sorted by expert on the device, and take four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tokenmill.backends.cuda.expert_shapes import (
    LEAST_ITEMS,
    SEGMENT,
    TileShape,
    padded,
    route_shape,
    row_shape,
    sort_size,
    tile_shape,
)
from tokenmill.backends.cuda.kernels import experts as kernels
from tokenmill.backends.cuda.kernels.routing import count_pairs, route, sort_pairs
from tokenmill.backends.cuda.launch import Run, Site, ahead
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.pack import DeviceWeights
from tokenmill.backends.cuda.shapes import power
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.program import ops

_BLOCK = 1024
_ROWS = 16  # segments that are added up at a time
_GROUP = 16  # tiles of items whose programs run side by side, so that they share tiles of the matrix
LAUNCHES = 4  # of `ops.Experts`, at most in a captured step


class _Scratch:
    """Scratch of the largest step, which all layers share."""

    def __init__(self, memory: Memory) -> None:
        found = [op for op in memory.program.ops if isinstance(op, ops.Experts)]
        routes = [op for op in memory.program.ops if isinstance(op, ops.Route)]
        rows = {op.out.buffer: memory.rows[op.out.spec.rows] for op in (*found, *routes)}

        def most(*sizes: int) -> int:
            return max(sizes, default=0)

        pairs = {op.out.buffer: rows[op.out.buffer] * op.ids.width for op in found}
        self.pairs = most(*pairs.values())
        experts, device = most(*(padded(len(op.down)) for op in found)), memory.device.torch
        numbers: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.items = torch.empty(self.pairs, **numbers)
        self.tiles = torch.empty((self.pairs // LEAST_ITEMS + experts) * 4, **numbers)
        segments = triton.cdiv(self.pairs, SEGMENT)
        self.counts = torch.empty(segments * experts, **numbers)
        self.firsts = torch.empty((segments + 1) * experts, **numbers)
        self.finished = torch.zeros(1 + most(*(triton.cdiv(n, LEAST_ITEMS) for n in rows.values())), **numbers)
        logits = most(*(rows[op.out.buffer] * padded(op.weight.rows) for op in routes))
        self.logits = torch.empty(logits, device=device)
        inner = most(*(pairs[op.out.buffer] * _inner(op) for op in found))
        self.inner = torch.empty(inner, dtype=memory.dtype, device=device)
        results = most(*(pairs[op.out.buffer] * op.out.width for op in found))
        self.results = torch.empty(results, dtype=memory.dtype, device=device)  # Before that, the rows of items.

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(tensor.nbytes for tensor in vars(self).values() if isinstance(tensor, Tensor))


def _inner(op: ops.Experts) -> int:
    """Return the number of an expert's inner values."""
    return op.gate_up[0].rows // 2


class Bank(NamedTuple):
    """Weights of a layer's experts, each stacked: (experts, outputs, columns), or (experts, outputs)."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class Operands(NamedTuple):
    """Tensors of a layer at the largest step; a smaller step uses the first rows."""

    x: Tensor  # (rows, width)
    ids: Tensor  # (rows, top_k) int32
    factors: Tensor  # (rows, top_k)
    out: Tensor  # (rows, width)
    inner: Tensor  # (items, inner values)
    results: Tensor  # (pairs, width): results, and before that the rows of items


class ExpertLowering:
    """Lowers the mixtures of experts of a program. All layers share scratch."""

    def __init__(self, memory: Memory, weights: DeviceWeights, batch_invariant: bool) -> None:
        self._memory, self._weights, self._invariant = memory, weights, batch_invariant
        self._scratch = _Scratch(memory)

    @property
    def nbytes(self) -> int:
        """Bytes of scratch."""
        return self._scratch.nbytes

    def route(self, op: ops.Route) -> Run:
        """Return the launch that chooses the experts of each row."""
        x, ids, factors = (self._memory.value(v) for v in (op.x, op.out, op.factors))
        tensors, scratch, launch = self._weights.tensors, self._scratch, Site(route)
        weight = tensors[op.weight]
        bias, correction = (None if w is None else tensors[w] for w in (op.bias, op.correction))
        experts, columns = weight.shape
        constants: dict[str, Any] = {
            "EP": padded(experts), "TOP_K": op.top_k, "KP": power(op.top_k), "SCORE": op.score,
            "GROUPS": op.groups, "GP": power(op.groups), "TOP_GROUPS": op.top_groups, "GROUP_BEST": op.group_best,
            "RENORMALIZE": op.renormalize, "BIAS": bias is not None, "CORRECTION": correction is not None,
        }  # fmt: skip

        def run(n: Sizes) -> None:
            rows = n.of(op.out)
            shape = route_shape(rows, experts, columns, self._invariant)
            launch(
                (triton.cdiv(experts, shape.experts), triton.cdiv(rows, shape.rows)),
                x, weight, weight if bias is None else bias, weight if correction is None else correction,
                scratch.logits, scratch.finished, ids, factors, x.stride(0), rows, op.least_sum, op.scale, op.margin,
                E=experts, K=columns, BM=shape.rows, BN=shape.experts, BK=shape.columns, **constants,
                PDL=n.early, STAGES=shape.stages, num_warps=shape.warps, **ahead(n.early),
            )  # fmt: skip

        return run

    def experts(self, op: ops.Experts) -> Run:
        """Return the launches of a layer's products."""
        one, several = one_row(op, self._bank(op), self._operands(op)), self.products(op)

        def run(n: Sizes) -> None:
            rows = n.of(op.out)
            if rows == 1 and not self._invariant:
                one(n.early)
            else:
                several.run(rows, *self.shapes(op, rows), n.early)

        return run

    def products(self, op: ops.Experts) -> GroupedProducts:
        """Return the launches of several rows, for tiles of any size."""
        operands = self._operands(op)
        sort = Sort(self._scratch, operands.ids, len(op.down))
        return GroupedProducts(op, self._bank(op), operands, sort, self._memory.device.copies_tiles)

    def shapes(self, op: ops.Experts, rows: int) -> tuple[TileShape, TileShape]:
        """Return the sizes of tiles for so many rows: of gate and up, and of down, with the same number of items."""
        mean, inner, width = rows * op.ids.width / len(op.down), _inner(op), op.out.width
        item = self._memory.dtype.itemsize
        up = tile_shape(mean, inner, width, True, item, self._invariant)
        down = tile_shape(mean, width, inner, False, item, self._invariant)
        return up, down._replace(items=up.items)

    def _bank(self, op: ops.Experts) -> Bank:
        stacks = self._weights.stacks
        gate_up_bias, down_bias = (stacks[ws[0]] if ws else None for ws in (op.gate_up_bias, op.down_bias))
        return Bank(stacks[op.gate_up[0]], stacks[op.down[0]], gate_up_bias, down_bias)

    def _operands(self, op: ops.Experts) -> Operands:
        value, scratch, pairs = self._memory.value, self._scratch, self._memory.rows[op.out.spec.rows] * op.ids.width
        inner = scratch.inner[: pairs * _inner(op)].view(pairs, -1)
        results = scratch.results[: pairs * op.out.width].view(pairs, -1)
        return Operands(value(op.x), value(op.ids), value(op.factors), value(op.out), inner, results)


def one_row(op: ops.Experts, bank: Bank, operands: Operands) -> Callable[[bool], None]:
    """Return the launches of a single row."""
    x, ids, factors, out, inner, _ = operands
    width, top_k, inner_width = op.out.width, op.ids.width, _inner(op)
    up, down = row_shape(inner_width, width, True), row_shape(width, inner_width, False)
    make, finish = Site(kernels.one_row_up), Site(kernels.one_row_down)

    def run(early: bool) -> None:
        make(
            (triton.cdiv(inner_width, up.outputs), top_k),
            x, bank.gate_up, bank.gate_up if bank.gate_up_bias is None else bank.gate_up_bias, ids, factors, inner,
            op.limit, op.up_offset, N=inner_width, K=width, BN=up.outputs, BK=up.columns, ACT=op.act,
            LIMIT=op.limit > 0, BIAS=bank.gate_up_bias is not None, SCALED=op.scale_inputs, PDL=early,
            STAGES=up.stages, num_warps=up.warps, **ahead(early),
        )  # fmt: skip
        finish(
            (triton.cdiv(width, down.outputs),),
            inner, bank.down, bank.down if bank.down_bias is None else bank.down_bias, ids, factors, out,
            N=width, K=inner_width, TOP_K=top_k, BN=down.outputs, BK=down.columns, BIAS=bank.down_bias is not None,
            SCALED=op.scale_inputs, PDL=early, STAGES=down.stages, num_warps=down.warps, **ahead(early),
        )  # fmt: skip

    return run


class Sort:
    """Sorting of the pairs of a layer by expert. `items`, `tiles`: the result, as `sort_pairs` defines it."""

    def __init__(self, scratch: _Scratch, ids: Tensor, experts: int) -> None:
        self._scratch, self._ids, self._experts = scratch, ids, experts
        self.items, self.tiles = scratch.items, scratch.tiles
        self._count, self._sort = Site(count_pairs), Site(sort_pairs)

    def num_tiles(self, pairs: int, items: int) -> int:
        """Return the number of places for tiles of so many items."""
        return pairs // items + self._experts

    def run(self, pairs: int, items: int, early: bool) -> None:
        """Launch for the first pairs. `items`: of a tile."""
        scratch, size = self._scratch, sort_size(pairs)
        segments = triton.cdiv(pairs, size)
        if segments > 1:
            self._count(
                (segments,),
                self._ids, scratch.counts, scratch.firsts, scratch.finished, pairs, E=self._experts,
                EP=padded(self._experts), BLOCK=size, ROWS=_ROWS, num_warps=8,
            )  # fmt: skip
        self._sort(
            (self._experts, segments),
            self._ids, scratch.firsts, self.items, self.tiles, pairs, segments, E=self._experts,
            EP=padded(self._experts), BM=items, BLOCK=size, ONE=segments == 1, PDL=early,
            num_warps=1 if size <= 64 else 4, **ahead(early),
        )  # fmt: skip


class GroupedProducts:
    """The launches of a layer's products for several rows."""

    def __init__(self, op: ops.Experts, bank: Bank, operands: Operands, sort: Sort, copies: bool) -> None:
        self._op, self._bank, self._operands, self._sort = op, bank, operands, sort
        self._copies = copies and operands.x.element_size() == 2
        self._up, self._down = Site(kernels.grouped), Site(kernels.grouped)
        self._spread, self._combine = Site(kernels.spread), Site(kernels.combine)
        self._descriptors: dict[tuple[int, int, int], TensorDescriptor] = {}

    def run(self, rows: int, up: TileShape, down: TileShape, early: bool) -> None:
        """Launch the first rows. `up`, `down`: sizes, with the same number of items of a tile."""
        x, _, factors, out, inner, results = self._operands
        op, top_k = self._op, self._op.ids.width
        pairs = rows * top_k
        self._sort.run(pairs, up.items, early)
        if up.spread:
            width = x.shape[1]
            self._spread(
                (pairs,), x, self._sort.items, results, x.stride(0), TOP_K=top_k, WIDTH=width,
                BLOCK=min(power(width), 4096), num_warps=4,
            )  # fmt: skip
            x = results
        self._multiply(self._up, x, inner, pairs, up, early, act=op.act, is_sorted=up.spread)
        self._multiply(self._down, inner, results, pairs, down, early, is_sorted=True)
        width = out.shape[1]
        block = min(power(width), _BLOCK)
        self._combine(
            (rows, triton.cdiv(width, block)),
            results, factors, out, TOP_K=top_k, WIDTH=width, BLOCK=block, SCALED=op.scale_inputs, PDL=early,
            num_warps=4, **ahead(early),
        )  # fmt: skip

    def _multiply(
        self, launch: Site, x: Tensor, out: Tensor, pairs: int, shape: TileShape, early: bool, *, is_sorted: bool,
        act: str = "",
    ) -> None:  # fmt: skip
        op, bank = self._op, self._bank
        weight, bias = (bank.gate_up, bank.gate_up_bias) if act else (bank.down, bank.down_bias)
        outputs, columns = weight.shape[1] // (2 if act else 1), weight.shape[2]
        copies = self._copies and columns % 8 == 0
        copies_x = copies and is_sorted
        launch(
            (triton.cdiv(outputs, shape.outputs), self._sort.num_tiles(pairs, shape.items)),
            self._described(x, shape.items, shape.columns) if copies_x else x,
            self._described(weight.view(-1, columns), shape.outputs, shape.columns) if copies else weight,
            weight if bias is None else bias, self._operands.factors, out, self._sort.items, self._sort.tiles,
            x.stride(0), op.limit, op.up_offset, N=outputs, K=columns, TOP_K=op.ids.width, BM=shape.items,
            BN=shape.outputs, BK=shape.columns, ACT=act, LIMIT=bool(act) and op.limit > 0, BIAS=bias is not None,
            SCALED=bool(act) and op.scale_inputs, SORTED=is_sorted, TMA=copies, TMA_X=copies_x, GROUP=_GROUP,
            PDL=early, STAGES=shape.stages, num_warps=shape.warps, **ahead(early),
        )  # fmt: skip

    def _described(self, matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
        """Return the copy engine's descriptor of tiles, made once because addresses stay."""
        key = matrix.data_ptr(), rows, columns
        if key not in self._descriptors:
            self._descriptors[key] = TensorDescriptor.from_tensor(matrix, [rows, columns])
        return self._descriptors[key]
