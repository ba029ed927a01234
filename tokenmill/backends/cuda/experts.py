"""Mixtures of experts as launches: routing, and the products with the chosen experts.

A single row takes two launches behind its routing. More rows are sorted by expert on the device, and take four.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor

from tokenmill.backends.cuda.expert_banks import CodedStack
from tokenmill.backends.cuda.expert_products import (
    Bank,
    GroupedProducts,
    OneRow,
    Operands,
    OwnPairs,
    Scratch,
    Sort,
    inner_width,
)
from tokenmill.backends.cuda.expert_shapes import (
    RouteShape,
    TileShape,
    coded_row_shape,
    coded_tile_shape,
    padded,
    route_shape,
    row_shape,
    tile_items,
    tile_shape,
)
from tokenmill.backends.cuda.kernels.routing import route
from tokenmill.backends.cuda.launch import Run, Site, ahead
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.pack import DeviceWeights
from tokenmill.backends.cuda.shapes import power
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.program import ops

LAUNCHES = 4  # of `ops.Experts`, at most in a captured step

Normed = tuple[Tensor, Tensor, float]
"""A row before its RMS norm, the norm's weight and its epsilon."""


class ExpertLowering:
    """Lowers the mixtures of experts of a program. All layers share scratch."""

    def __init__(self, memory: Memory, weights: DeviceWeights, batch_invariant: bool, rank: int = 0) -> None:
        self._memory, self._weights, self._invariant, self._rank = memory, weights, batch_invariant, rank
        self._scratch = Scratch(memory)

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
        one, several, own = self.experts_one(op), self.products(op), self._own_pairs(op)

        def run(n: Sizes) -> None:
            rows = n.of(op.out)
            if rows == 1 and not self._invariant:
                one(n)
            else:
                if own is not None:
                    own.run(rows, sorted_by_expert=True)
                several.run(rows, *self.shapes(op, rows), n.early)

        return run

    def route_one(self, op: ops.Route, norm: Normed) -> Run:
        """Return the launch of a single row, which includes the norm of its input and writes it for the experts."""
        routing = self.routing(op)
        shape = route_shape(1, op.weight.rows, op.x.width)

        def run(n: Sizes) -> None:
            routing.run(1, shape, n.early, norm)

        return run

    def experts_one(self, op: ops.Experts, residual: tuple[Tensor, Tensor] | None = None) -> Run:
        """Return the launches of a single row, which include the sum behind them.

        `residual`: (addend, in place of out).
        """
        one, bank = self.one_row(op), self._bank(op)
        up, down = row_shape(op.x.width), row_shape(inner_width(op), op.ids.width)
        if isinstance(bank.gate_up, CodedStack):
            up = coded_row_shape(op.x.width, inner_width(op), op.ids.width, bank.gate_up.form, down=False)
        if isinstance(bank.down, CodedStack):
            down = coded_row_shape(inner_width(op), op.out.width, op.ids.width, bank.down.form, down=True)

        own = self._own_pairs(op)

        def run(n: Sizes) -> None:
            if own is not None:
                own.run(1, sorted_by_expert=False)
            one.gate_up(up, n.early)
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
        sort = Sort(self._scratch, operands.ids, len(op.down), op.shard == "part")
        return GroupedProducts(op, self._bank(op), operands, sort, self._memory.device.copies_tiles)

    def shapes(self, op: ops.Experts, rows: int) -> tuple[TileShape, TileShape]:
        """Return the sizes of tiles for so many rows: of gate and up, and of down, with the same number of items."""
        experts = len(op.down) * (op.down[0].ranks if op.shard == "part" else 1)
        mean, bank = rows * op.ids.width / experts, self._bank(op)
        stacks = bank.gate_up, bank.down
        forms = [stack.form if isinstance(stack, CodedStack) else None for stack in stacks]
        items = tile_items(mean, forms[0] or forms[1])
        up, down = (
            tile_shape(items, mean, gated, self._memory.dtype.itemsize, self._invariant)
            if form is None
            else coded_tile_shape(items, gated, columns, form, self._invariant)
            for gated, columns, form in zip((op.gated, False), (op.x.width, inner_width(op)), forms, strict=True)
        )
        assert up.items == down.items
        return up, down

    def _bank(self, op: ops.Experts) -> Bank:
        stacks = self._weights.stacks
        biases = [stacks[ws[0]] if ws else None for ws in (op.gate_up_bias, op.down_bias)]
        gate_up_bias, down_bias = (bias if isinstance(bias, Tensor) else None for bias in biases)
        return Bank(stacks[op.gate_up[0]], stacks[op.down[0]], gate_up_bias, down_bias)

    def _operands(self, op: ops.Experts) -> Operands:
        value, scratch, pairs = self._memory.value, self._scratch, self._memory.rows[op.out.spec.rows] * op.ids.width
        inner = scratch.inner[: pairs * inner_width(op)].view(pairs, -1)
        results = scratch.results[: pairs * op.out.width].view(pairs, -1)
        ids, factors = value(op.ids), value(op.factors)
        if op.shard == "part":
            ids, factors = (own[:pairs].view(ids.shape) for own in (scratch.own_ids, scratch.own_factors))
        return Operands(value(op.x), ids, factors, value(op.out), inner, results)

    def _own_pairs(self, op: ops.Experts) -> OwnPairs | None:
        if op.shard != "part":
            return None
        return OwnPairs(op, self._memory.value(op.ids), self._memory.value(op.factors), self._scratch, self._rank)


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

    def __init__(self, op: ops.Route, operands: RouteOperands, scratch: Scratch) -> None:
        self._op, self._operands, self._scratch, self._launch = op, operands, scratch, Site(route)
        self._constants: dict[str, Any] = {
            "EP": padded(op.weight.rows), "TOP_K": op.top_k, "KP": power(op.top_k), "SCORE": op.score,
            "GROUPS": op.groups, "GP": power(op.groups), "TOP_GROUPS": op.top_groups, "GROUP_BEST": op.group_best,
            "RENORMALIZE": op.renormalize, "BIAS": op.bias is not None, "CORRECTION": op.correction is not None,
        }  # fmt: skip
        if op.score == "sparsemixer":  # It chooses by the logits alone.
            self._constants |= {"GROUPS": 1, "CORRECTION": False}

    def run(self, rows: int, shape: RouteShape, early: bool, norm: Normed | None = None) -> None:
        """Launch the first rows. `norm`: of a single row, written to x."""
        normed, ids, factors, weight, bias, correction = self._operands
        op, scratch, (experts, columns) = self._op, self._scratch, weight.shape
        x, norm_weight, eps = norm or (normed, weight, 0.0)
        self._launch(
            (triton.cdiv(experts, shape.experts) + (norm is not None), triton.cdiv(rows, shape.rows)),
            x, weight, weight if bias is None else bias, weight if correction is None else correction, norm_weight,
            normed, scratch.logits, scratch.finished, ids, factors, x.stride(0), rows, op.least_sum, op.scale,
            op.margin, eps, E=experts, K=columns, BM=shape.rows, BN=shape.experts, BK=shape.columns, **self._constants,
            NORM=norm is not None, PDL=early, STAGES=shape.stages, num_warps=shape.warps, **ahead(early),
        )  # fmt: skip
