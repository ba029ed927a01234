"""Mixtures of experts as launches: routing, and the products with the chosen experts.

A single row takes two launches behind its routing. More rows are sorted by expert on the device, and take four.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tokenmill.backends.cuda.expert_shapes import (
    LEAST_ITEMS,
    SEGMENT,
    RouteShape,
    RowShape,
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
LAUNCHES = 4  # of `ops.Experts`, at most in a captured step


Normed = tuple[Tensor, Tensor, float]
"""A row before its RMS norm, the norm's weight and its epsilon."""


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
        self.results = torch.empty(results, dtype=memory.dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(tensor.nbytes for tensor in vars(self).values() if isinstance(tensor, Tensor))


def _inner(op: ops.Experts) -> int:
    """Return the number of an expert's inner values."""
    return op.gate_up[0].rows // 2 if op.gated else op.gate_up[0].rows


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
    results: Tensor  # (pairs, width)


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
        routing = self.routing(op)

        def run(n: Sizes) -> None:
            rows = n.of(op.out)
            routing.run(rows, route_shape(rows, op.weight.rows, op.x.width, self._invariant), n.early)

        return run

    def experts(self, op: ops.Experts) -> Run:
        """Return the launches of a layer's products."""
        one, several = self.experts_one(op, None, None), self.products(op)

        def run(n: Sizes) -> None:
            rows = n.of(op.out)
            if rows == 1 and not self._invariant:
                one(n)
            else:
                several.run(rows, *self.shapes(op, rows), n.early)

        return run

    def route_one(self, op: ops.Route, norm: Normed) -> Run:
        """Return the launch of a single row, which includes the norm of its input."""
        routing = self.routing(op)
        shape = route_shape(1, op.weight.rows, op.x.width)

        def run(n: Sizes) -> None:
            routing.run(1, shape, n.early, norm)

        return run

    def experts_one(self, op: ops.Experts, norm: Normed | None, residual: tuple[Tensor, Tensor] | None) -> Run:
        """Return the launches of a single row, which include the norm of its input, and the sum behind them.

        `residual`: (addend, in place of out).
        """
        one = self.one_row(op)
        up, down = row_shape(op.x.width), row_shape(_inner(op), op.ids.width)

        def run(n: Sizes) -> None:
            one.gate_up(up, n.early, norm)
            one.down(down, n.early, residual)

        return run

    def routing(self, op: ops.Route) -> Routing:
        """Return the launch of a routing, for blocks of any size."""
        x, ids, factors = (self._memory.value(v) for v in (op.x, op.out, op.factors))
        tensors = self._weights.tensors
        bias, correction = (None if w is None else tensors[w] for w in (op.bias, op.correction))
        return Routing(op, RouteOperands(x, ids, factors, tensors[op.weight], bias, correction), self._scratch)

    def one_row(self, op: ops.Experts) -> OneRow:
        """Return the launches of a single row, for programs of any size."""
        return OneRow(op, self._bank(op), self._operands(op))

    def products(self, op: ops.Experts) -> GroupedProducts:
        """Return the launches of several rows, for tiles of any size."""
        operands = self._operands(op)
        sort = Sort(self._scratch, operands.ids, len(op.down))
        return GroupedProducts(op, self._bank(op), operands, sort, self._memory.device.copies_tiles)

    def shapes(self, op: ops.Experts, rows: int) -> tuple[TileShape, TileShape]:
        """Return the sizes of tiles for so many rows: of gate and up, and of down, with the same number of items."""
        mean, item = rows * op.ids.width / len(op.down), self._memory.dtype.itemsize
        up, down = (tile_shape(mean, gated, item, self._invariant) for gated in (True, False))
        assert up.items == down.items
        return up, down

    def _bank(self, op: ops.Experts) -> Bank:
        stacks = self._weights.stacks
        gate_up_bias, down_bias = (stacks[ws[0]] if ws else None for ws in (op.gate_up_bias, op.down_bias))
        return Bank(stacks[op.gate_up[0]], stacks[op.down[0]], gate_up_bias, down_bias)

    def _operands(self, op: ops.Experts) -> Operands:
        value, scratch, pairs = self._memory.value, self._scratch, self._memory.rows[op.out.spec.rows] * op.ids.width
        inner = scratch.inner[: pairs * _inner(op)].view(pairs, -1)
        results = scratch.results[: pairs * op.out.width].view(pairs, -1)
        return Operands(value(op.x), value(op.ids), value(op.factors), value(op.out), inner, results)


class RouteOperands(NamedTuple):
    """Tensors of a routing at the largest step."""

    x: Tensor  # (rows, width)
    ids: Tensor  # (rows, top_k) int32
    factors: Tensor  # (rows, top_k)
    weight: Tensor  # (experts, width)
    bias: Tensor | None
    correction: Tensor | None


class Routing:
    """The launch of a routing."""

    def __init__(self, op: ops.Route, operands: RouteOperands, scratch: _Scratch) -> None:
        self._op, self._operands, self._scratch, self._launch = op, operands, scratch, Site(route)
        self._constants: dict[str, Any] = {
            "EP": padded(op.weight.rows), "TOP_K": op.top_k, "KP": power(op.top_k), "SCORE": op.score,
            "GROUPS": op.groups, "GP": power(op.groups), "TOP_GROUPS": op.top_groups, "GROUP_BEST": op.group_best,
            "RENORMALIZE": op.renormalize, "BIAS": op.bias is not None, "CORRECTION": op.correction is not None,
        }  # fmt: skip
        if op.score == "sparsemixer":  # It chooses by the logits alone.
            self._constants |= {"GROUPS": 1, "CORRECTION": False}

    def run(self, rows: int, shape: RouteShape, early: bool, norm: Normed | None = None) -> None:
        """Launch the first rows. `norm`: in place of x, of a single row."""
        x, ids, factors, weight, bias, correction = self._operands
        op, scratch, (experts, columns) = self._op, self._scratch, weight.shape
        x, norm_weight, eps = norm or (x, weight, 0.0)
        self._launch(
            (triton.cdiv(experts, shape.experts), triton.cdiv(rows, shape.rows)),
            x, weight, weight if bias is None else bias, weight if correction is None else correction, norm_weight,
            scratch.logits, scratch.finished, ids, factors, x.stride(0), rows, op.least_sum, op.scale, op.margin, eps,
            E=experts, K=columns, BM=shape.rows, BN=shape.experts, BK=shape.columns, **self._constants,
            NORM=norm is not None, PDL=early, STAGES=shape.stages, num_warps=shape.warps, **ahead(early),
        )  # fmt: skip


class OneRow:
    """The launches of a layer's products for a single row."""

    def __init__(self, op: ops.Experts, bank: Bank, operands: Operands) -> None:
        self._op, self._bank, self._operands = op, bank, operands
        self._up, self._down = Site(kernels.one_row_up), Site(kernels.one_row_down)

    def gate_up(self, shape: RowShape, early: bool, norm: Normed | None = None) -> None:
        """Launch the inner values of the chosen experts. `norm`: in place of x."""
        op, (x, ids, factors, _, inner, _) = self._op, self._operands
        weight, bias = self._bank.gate_up, self._bank.gate_up_bias
        outputs, (x, norm_weight, eps) = _inner(op), norm or (x, weight, 0.0)
        self._up(
            (triton.cdiv(outputs, shape.outputs), op.ids.width),
            x, weight, weight if bias is None else bias, norm_weight, ids, factors, inner, op.limit, op.up_offset, eps,
            N=outputs, K=op.x.width, BN=shape.outputs, BK=shape.columns, ACT=op.act, GATED=op.gated, LIMIT=op.limit > 0,
            BIAS=bias is not None, SCALED=op.scale_inputs, NORM=norm is not None, PDL=early, STAGES=shape.stages,
            num_warps=shape.warps, **ahead(early),
        )  # fmt: skip

    def down(self, shape: RowShape, early: bool, residual: tuple[Tensor, Tensor] | None = None) -> None:
        """Launch the sum of the chosen experts' outputs, behind `gate_up`. `residual`: (addend, in place of out)."""
        op, (_, ids, factors, out, inner, _) = self._op, self._operands
        weight, bias = self._bank.down, self._bank.down_bias
        added, out = residual or (weight, out)
        self._down(
            (triton.cdiv(op.out.width, shape.outputs),),
            inner, weight, weight if bias is None else bias, ids, factors, added, out, N=op.out.width, K=_inner(op),
            TOP_K=op.ids.width, KP=power(op.ids.width), BN=shape.outputs, BK=shape.columns, BIAS=bias is not None,
            SCALED=op.scale_inputs, RESIDUAL=residual is not None, PDL=early, STAGES=shape.stages,
            num_warps=shape.warps, **ahead(early),
        )  # fmt: skip


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
            self._ids, scratch.firsts, self.items, self.tiles, pairs, segments, items, E=self._experts,
            EP=padded(self._experts), BLOCK=size, ONE=segments == 1, PDL=early,
            num_warps={64: 1, 512: 4}.get(size, 8), **ahead(early),
        )  # fmt: skip


class GroupedProducts:
    """The launches of a layer's products for several rows."""

    def __init__(self, op: ops.Experts, bank: Bank, operands: Operands, sort: Sort, copies: bool) -> None:
        self._op, self._bank, self._operands, self._sort = op, bank, operands, sort
        self._copies = copies and operands.x.element_size() == 2
        self._up, self._down = Site(kernels.grouped), Site(kernels.grouped)
        self._combine = Site(kernels.combine)
        self._descriptors: dict[tuple[int, int, int], TensorDescriptor] = {}

    def run(self, rows: int, up: TileShape, down: TileShape, early: bool) -> None:
        """Launch the first rows. `up`, `down`: sizes, with the same number of items of a tile."""
        self.sort(rows, up.items, early)
        self.gate_up(rows, up, early)
        self.down(rows, down, early)
        self.combine(rows, early)

    def sort(self, rows: int, items: int, early: bool) -> None:
        """Launch the sorting. `items`: of a tile."""
        self._sort.run(rows * self._op.ids.width, items, early)

    def gate_up(self, rows: int, shape: TileShape, early: bool) -> None:
        """Launch the inner values of all items."""
        x, inner = self._operands.x, self._operands.inner
        self._multiply(self._up, x, inner, rows * self._op.ids.width, shape, early, self._op.act)

    def down(self, rows: int, shape: TileShape, early: bool) -> None:
        """Launch the results of all pairs."""
        inner, results = self._operands.inner, self._operands.results
        self._multiply(self._down, inner, results, rows * self._op.ids.width, shape, early)

    def combine(self, rows: int, early: bool) -> None:
        """Launch the sums of the pairs of each row."""
        _, _, factors, out, _, results = self._operands
        width = out.shape[1]
        block = min(power(width), _BLOCK)
        self._combine(
            (rows, triton.cdiv(width, block)),
            results, factors, out, TOP_K=self._op.ids.width, WIDTH=width, BLOCK=block, SCALED=self._op.scale_inputs,
            PDL=early, num_warps=4, **ahead(early),
        )  # fmt: skip

    def _multiply(
        self, launch: Site, x: Tensor, out: Tensor, pairs: int, shape: TileShape, early: bool, act: str = ""
    ) -> None:
        op, bank = self._op, self._bank
        weight, bias = (bank.gate_up, bank.gate_up_bias) if act else (bank.down, bank.down_bias)
        gated, columns = bool(act) and op.gated, weight.shape[2]
        outputs = weight.shape[1] // (2 if gated else 1)
        copies = self._copies and columns % 8 == 0
        copies_x = copies and not act and not shape.halves
        launch(
            (triton.cdiv(outputs, shape.outputs), self._sort.num_tiles(pairs, shape.items)),
            self._described(x, shape.items, shape.columns) if copies_x else x,
            self._described(weight.view(-1, columns), shape.outputs, shape.columns) if copies else weight,
            weight if bias is None else bias, self._operands.factors, out, self._sort.items, self._sort.tiles,
            x.stride(0), op.limit, op.up_offset, N=outputs, K=columns, TOP_K=op.ids.width, BM=shape.items,
            BN=shape.outputs, BK=shape.columns, ACT=act, GATED=gated, LIMIT=bool(act) and op.limit > 0,
            BIAS=bias is not None, SCALED=bool(act) and op.scale_inputs, TMA=copies, TMA_X=copies_x,
            HALVES=shape.halves, GROUP=shape.group, PDL=early, STAGES=shape.stages, num_warps=shape.warps,
            **ahead(early),
        )  # fmt: skip

    def _described(self, matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
        """Return the copy engine's descriptor of tiles, made once because addresses stay."""
        key = matrix.data_ptr(), rows, columns
        if key not in self._descriptors:
            self._descriptors[key] = TensorDescriptor.from_tensor(matrix, [rows, columns])
        return self._descriptors[key]
