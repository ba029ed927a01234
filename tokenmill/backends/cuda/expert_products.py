"""The launches of a layer's products with chosen experts: for a single row, and for several sorted by expert."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tokenmill.backends.cuda.expert_banks import NO_CODES, CodedStack, Stack
from tokenmill.backends.cuda.expert_shapes import (
    FEWEST,
    LEAST_ITEMS,
    SEGMENT,
    RowShape,
    TileShape,
    padded,
    sort_size,
)
from tokenmill.backends.cuda.kernels import experts as kernels
from tokenmill.backends.cuda.kernels.coded_experts import coded_row_down, coded_row_up
from tokenmill.backends.cuda.kernels.routing import count_pairs, own_pairs, sort_pairs
from tokenmill.backends.cuda.launch import Site, ahead
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.shapes import power
from tokenmill.program import ops

_BLOCK = 1024
_ROWS = 16  # segments that are added up at a time


class Scratch:
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
        inner = most(*(pairs[op.out.buffer] * inner_width(op) for op in found))
        self.inner = torch.empty(inner, dtype=memory.dtype, device=device)
        divided = self.pairs if any(op.shard == "part" for op in found) else 0
        self.own_ids = torch.empty(divided, **numbers)
        self.own_factors = torch.empty(divided, dtype=memory.dtype, device=device)
        results = most(*(pairs[op.out.buffer] * op.out.width for op in found))
        self.results = torch.empty(results, dtype=memory.dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(tensor.nbytes for tensor in vars(self).values() if isinstance(tensor, Tensor))


def inner_width(op: ops.Experts) -> int:
    """Return the number of an expert's inner values."""
    return op.gate_up[0].rows // 2 if op.gated else op.gate_up[0].rows


class Bank(NamedTuple):
    """Weights of a layer's experts, each stacked; biases are (experts, outputs)."""

    gate_up: Stack
    down: Stack
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class Operands(NamedTuple):
    """Tensors of a layer at the largest step; a smaller step uses the first rows."""

    x: Tensor  # (rows, width)
    ids: Tensor  # (rows, top_k) int32; of `OwnPairs`, if ranks divide the experts
    factors: Tensor  # (rows, top_k), likewise
    out: Tensor  # (rows, width)
    inner: Tensor  # (items, inner values)
    results: Tensor  # (pairs, width)


class OwnPairs:
    """The launch that finds the pairs of this rank's experts, where ranks divide a layer's experts among them.

    `ids`, `factors`: of all experts.
    """

    def __init__(self, op: ops.Experts, ids: Tensor, factors: Tensor, scratch: Scratch, rank: int) -> None:
        self._ids, self._factors, self._scratch = ids, factors, scratch
        self._experts, self._first, self._launch = len(op.down), rank * len(op.down), Site(own_pairs)

    def run(self, rows: int, sorted_by_expert: bool) -> None:
        """Launch the first rows. Pairs of other ranks are left out by the sorting; a single row takes expert 0."""
        pairs = rows * self._ids.shape[1]
        self._launch(
            (triton.cdiv(pairs, _BLOCK),),
            self._ids, self._factors, self._scratch.own_ids, self._scratch.own_factors, pairs, self._first,
            self._experts if sorted_by_expert else 0, E=self._experts, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip


class OneRow:
    """The launches of a layer's products for a single row."""

    def __init__(self, op: ops.Experts, bank: Bank, operands: Operands) -> None:
        self._op, self._bank, self._operands = op, bank, operands
        self._up = Site(coded_row_up if isinstance(bank.gate_up, CodedStack) else kernels.one_row_up)
        self._down = Site(coded_row_down if isinstance(bank.down, CodedStack) else kernels.one_row_down)

    def gate_up(self, shape: RowShape, early: bool) -> None:
        """Launch the inner values of the chosen experts."""
        op, (x, ids, factors, _, inner, _) = self._op, self._operands
        weight, bias, outputs = _tensors(self._bank.gate_up), self._bank.gate_up_bias, inner.shape[1]
        self._up(
            (triton.cdiv(outputs, shape.outputs), op.ids.width),
            x, *weight, factors if bias is None else bias, ids, factors, inner, op.limit, op.up_offset, N=outputs,
            K=op.x.width, BN=shape.outputs, **_round(self._bank.gate_up, shape, FEWEST), ACT=op.act, GATED=op.gated,
            LIMIT=op.limit > 0, BIAS=bias is not None, SCALED=op.scale_inputs, PDL=early, STAGES=shape.stages,
            num_warps=shape.warps, **ahead(early),
        )  # fmt: skip

    def down(self, shape: RowShape, early: bool, residual: tuple[Tensor, Tensor] | None = None) -> None:
        """Launch the sum of the chosen experts' outputs, behind `gate_up`. `residual`: (addend, in place of out)."""
        op, (_, ids, factors, out, inner, _) = self._op, self._operands
        weight, bias = _tensors(self._bank.down), self._bank.down_bias
        added, out = residual or (factors, out)
        self._down(
            (triton.cdiv(op.out.width, shape.outputs),),
            inner, *weight, factors if bias is None else bias, ids, factors, added, out, N=op.out.width,
            K=inner.shape[1], TOP_K=op.ids.width, KP=power(op.ids.width), BN=shape.outputs,
            **_round(self._bank.down, shape, max(FEWEST, shape.splits * power(op.ids.width))), BIAS=bias is not None,
            SCALED=op.scale_inputs, RESIDUAL=residual is not None, PDL=early, STAGES=shape.stages,
            num_warps=shape.warps, **ahead(early),
        )  # fmt: skip


def _tensors(stack: Stack) -> tuple[Tensor, ...]:
    """Return the tensors of matrices that kernels read."""
    return (stack,) if isinstance(stack, Tensor) else stack.tensors


def _round(stack: Stack, shape: RowShape, size: int) -> dict[str, Any]:
    """Return the constants of the rounds of a single row. `size`: BK of coded weights, at least."""
    if isinstance(stack, Tensor):
        return {"BK": shape.columns}
    return {"BK": size, "ON_WEIGHTS": shape.on_weights, "SPLITS": shape.splits, **stack.constants}


class Sort:
    """Sorting of the pairs of a layer by expert. `items`, `tiles`: the result, as `sort_pairs` defines it.

    `part`: the ids may be `experts`, of no expert here.
    """

    def __init__(self, scratch: Scratch, ids: Tensor, experts: int, part: bool = False) -> None:
        self._scratch, self._ids, self._experts, self._part = scratch, ids, experts, part
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
                EP=padded(self._experts), BLOCK=size, ROWS=_ROWS, PART=self._part, num_warps=8,
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
            PART=self._op.shard == "part", PDL=early, num_warps=4, **ahead(early),
        )  # fmt: skip

    def _multiply(
        self, launch: Site, x: Tensor, out: Tensor, pairs: int, shape: TileShape, early: bool, act: str = ""
    ) -> None:
        op, bank = self._op, self._bank
        stack, bias = (bank.gate_up, bank.gate_up_bias) if act else (bank.down, bank.down_bias)
        gated, outputs, columns = bool(act) and op.gated, out.shape[1], x.shape[1]
        tensors = stack.tensors if isinstance(stack, CodedStack) else (stack,) * 5
        copies = self._copies and columns % 8 == 0 and isinstance(stack, Tensor)
        copies_x = copies and not act and not shape.halves
        launch(
            (triton.cdiv(outputs, shape.outputs), self._sort.num_tiles(pairs, shape.items)),
            self._described(x, shape.items, shape.columns) if copies_x else x,
            self._described(tensors[0].view(-1, columns), shape.outputs, shape.columns) if copies else tensors[0],
            *tensors[1:], x if bias is None else bias, self._operands.factors, out, self._sort.items,
            self._sort.tiles, x.stride(0), op.limit, op.up_offset, N=outputs, K=columns, TOP_K=op.ids.width,
            BM=shape.items, BN=shape.outputs, BK=shape.columns, ACT=act, GATED=gated,
            LIMIT=bool(act) and op.limit > 0, BIAS=bias is not None, SCALED=bool(act) and op.scale_inputs, TMA=copies,
            TMA_X=copies_x, HALVES=shape.halves, GROUP=shape.group,
            **(stack.constants if isinstance(stack, CodedStack) else NO_CODES), ON_WEIGHTS=shape.on_weights, PDL=early,
            STAGES=shape.stages, num_warps=shape.warps, **ahead(early),
        )  # fmt: skip

    def _described(self, matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
        """Return the copy engine's descriptor of tiles, made once because addresses stay."""
        key = matrix.data_ptr(), rows, columns
        if key not in self._descriptors:
            self._descriptors[key] = TensorDescriptor.from_tensor(matrix, [rows, columns])
        return self._descriptors[key]
