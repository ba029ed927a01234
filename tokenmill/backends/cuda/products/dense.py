"""Products with a matrix in the computation's dtype: of one row, of few rows, or by cuBLAS; sizes of their tiles.

The sizes were measured fastest on an H100 and an H200 for the matrices of an 8B and a 1B model, where many alternatives
lie within 3 %. cuBLAS is used where it was faster.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tokenmill.backends.cuda.kernels.products import few_rows, one_row
from tokenmill.backends.cuda.launch import Site, ahead
from tokenmill.backends.cuda.products.base import FEW, Needs, Operands, Scratch
from tokenmill.backends.cuda.shapes import power

MOST = 128  # rows of a tile at most, and up to which products other than gated ones have a kernel of our own
MANY = 1536  # rows from which the fused kernel of a gated product is faster again: it saves the activation's traffic
_TILES = (16, 32, 64, MOST)  # rows of a tile


class RowShape(NamedTuple):
    """Sizes for one row: outputs of a program, columns of a round, rounds in flight, warps."""

    outputs: int
    columns: int
    stages: int
    warps: int


class FewShape(NamedTuple):
    """Sizes for few rows: outputs a tile, columns a round, splits, rounds in flight, warps; copy engine or not."""

    outputs: int
    columns: int
    splits: int
    stages: int
    warps: int
    tma: bool = False


def row_shape(outputs: int, columns: int, gated: bool) -> RowShape | None:
    """Return the sizes for a matrix (outputs, columns); None if none fits it."""
    if columns < 4096:
        shape = RowShape(4, 512, 1, 2) if outputs >= 1 << 16 else RowShape(4, 1024, 1, 4)
    elif gated:
        shape = RowShape(4, 1024, 4, 4)
    elif columns == 4096 and outputs < columns:
        shape = RowShape(4, 2048, 1, 4)
    elif outputs >= 1 << 16:
        shape = RowShape(8, 1024, 4, 8)
    elif columns > 2 * outputs and columns < 12288:
        shape = RowShape(4, 1024, 4, 4)
    else:
        shape = RowShape(8, 512, 4, 4) if columns == outputs else RowShape(8, 512, 3, 2)
    while columns % shape.columns and shape.columns > 64:
        shape = shape._replace(columns=shape.columns // 2)
    return None if columns % shape.columns else shape


def few_shape(rows: int, outputs: int, columns: int, gated: bool) -> FewShape | None:
    """Return the sizes for a matrix (outputs, columns) and so many rows; None if cuBLAS is better.

    Above MOST rows the kernel needs a copy engine.
    """
    if columns % 128:
        return None
    if rows > MOST:
        better = gated and (columns < 4096 or rows <= 2 * MOST or rows >= MANY)
        return FewShape(128, 64, 1, 4, 8, True) if better else None
    if rows > FEW:
        return _shape_of_many(outputs, columns, gated)
    if outputs >= 1 << 16:
        return FewShape(128 if columns >= 4096 or rows > 32 else 64, 128, 1, 4, 4)
    if gated:
        return FewShape(64, 128, 1, 4, 4, True)
    if columns < 4096 and rows > 32:
        return None
    splits = 1
    if (columns < 4096 and outputs <= columns) or columns >= 4 * outputs:
        splits = 4
    elif columns > 2 * outputs:
        splits = 2 if rows <= 32 else 1
    while splits > 1 and columns % (128 * splits):
        splits //= 2
    return FewShape(64, 128, splits, 4 if splits > 1 else 6, 4, columns >= 4096)


def _shape_of_many(outputs: int, columns: int, gated: bool) -> FewShape | None:
    """Return the sizes for more than FEW rows."""
    if outputs >= 1 << 16:
        return FewShape(128, 128, 1, 3, 4, True) if columns >= 4096 else FewShape(64, 128, 1, 4, 4, True)
    if gated:
        return FewShape(64, 64, 1, 6, 4, True)
    deep = columns > 2 * outputs and columns >= 12288 and columns % 256 == 0
    return FewShape(64, 128, 2, 4, 4, True) if deep else None


def invariant_shape(rows: int, columns: int, item_bytes: int = 2) -> FewShape:
    """Return batch-invariant sizes for so many rows: never split, always summed in the same order."""
    at_once = next(n for n in (64, 32, 16) if columns % n == 0)
    if item_bytes > 2:
        return FewShape(64, min(at_once, 32), 1, 2, 4)
    return FewShape(64, at_once, 1, 6, 4) if rows <= FEW else FewShape(128, at_once, 1, 3, 8)


class Dense:
    """Implements `base.Packed` for a matrix in the computation's dtype."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix

    @property
    def nbytes(self) -> int:
        """See `Packed`."""
        return self._matrix.nbytes

    def needs(self, rows: int) -> Needs:
        """See `Packed`."""
        return Needs()

    def product(self, operands: Operands, scratch: Scratch | None, batch_invariant: bool) -> DenseProduct:
        """See `Packed`."""
        return DenseProduct(self._matrix, operands, scratch, batch_invariant)


class DenseProduct:
    """Implements `base.Product`: kernels for few rows, cuBLAS for more."""

    norms_one = True

    def __init__(
        self, weight: Tensor, operands: Operands, scratch: Scratch | None, batch_invariant: bool = False
    ) -> None:
        self._x, self._whole, self._bias, self._act, gated = operands
        self._out = self._whole if gated is None else gated
        self._weight, self._transposed, self._scratch = weight, weight.t(), scratch
        self._outputs, self._columns = weight.shape[0] // (2 if self._act else 1), weight.shape[1]
        self._invariant, self._one, self._few = batch_invariant, Site(one_row), Site(few_rows)
        self._descriptors: dict[tuple[int, int, int], tuple[TensorDescriptor, TensorDescriptor]] = {}

    @property
    def fuses_one(self) -> bool:
        """See `Product`."""
        return self.fits(1)

    def applies_act(self, rows: int) -> bool:
        """See `Product`."""
        return bool(self._act) and self.fits(rows)

    def run(self, rows: int, early: bool = False) -> None:
        """See `Product`."""
        if self.fits(rows):
            self._run(rows, early)
        elif self._bias is not None:
            torch.addmm(self._bias, self._x[:rows], self._transposed, out=self._whole[:rows])
        else:
            torch.mm(self._x[:rows], self._transposed, out=self._whole[:rows])

    def fits(self, rows: int) -> bool:
        """Return True if there is a kernel for so many rows, False if cuBLAS is better."""
        if self._invariant:
            return True
        if self._scratch is None:
            return False
        if rows == 1:
            return self._row is not None
        shape = few_shape(rows, self._outputs, self._columns, bool(self._act))
        return shape is not None and (rows <= MOST or self._copies(shape))

    def _copies(self, shape: FewShape) -> bool:
        """Return True if the copy engine reads the tiles."""
        return shape.tma and self._scratch is not None and self._scratch.tma and self._x.stride(0) % 8 == 0

    @property
    def _row(self) -> RowShape | None:
        return row_shape(self._outputs, self._columns, bool(self._act))

    def _run(self, rows: int, early: bool) -> None:
        if rows == 1 and not self._invariant:
            self.one(early=early)
            return
        shape = self._shape(rows)
        part, counts = (self._out, self._out) if self._scratch is None else (self._scratch.part, self._scratch.counts)
        tile = next((tile for tile in _TILES if rows <= tile), MOST)
        tma = self._copies(shape)
        x, weight = self._described(tile, shape) if tma else (self._x, self._weight)
        self._few(
            (triton.cdiv(self._outputs, shape.outputs), shape.splits, triton.cdiv(rows, tile)),
            x, weight, self._weight if self._bias is None else self._bias, self._out, part, counts, self._x.stride(0),
            rows, N=self._outputs, K=self._columns, BM=tile, BN=shape.outputs, BK=shape.columns, SPLITS=shape.splits,
            BIAS=self._bias is not None, ACT=self._act, TMA=tma, PDL=early, STAGES=shape.stages,
            num_warps=shape.warps, **ahead(early),
        )  # fmt: skip

    def _described(self, tile: int, shape: FewShape) -> tuple[TensorDescriptor, TensorDescriptor]:
        """Return the copy engine's descriptors of inputs and weights, made once because addresses stay."""
        key = tile, shape.outputs, shape.columns
        if key not in self._descriptors:
            self._descriptors[key] = (
                TensorDescriptor(self._x, list(self._x.shape), [self._x.stride(0), 1], [tile, shape.columns]),
                TensorDescriptor.from_tensor(self._weight, [shape.outputs, shape.columns]),
            )
        return self._descriptors[key]

    def _shape(self, rows: int) -> FewShape:
        if self._invariant:
            return invariant_shape(rows, self._columns, self._x.element_size())
        shape = few_shape(rows, self._outputs, self._columns, bool(self._act))
        assert shape is not None
        return shape

    def one(
        self,
        norm: tuple[Tensor, Tensor, float] | None = None,
        residual: tuple[Tensor, Tensor] | None = None,
        early: bool = False,
        shape: RowShape | None = None,
    ) -> None:
        """See `Product`. `shape`: None for the sizes chosen by the matrix."""
        shape = shape or self._row
        assert shape is not None
        x, norm_weight, eps = norm or (self._x, self._weight, 0.0)
        added, out = residual or (self._weight, self._out)
        self._one(
            (triton.cdiv(self._outputs, shape.outputs),),
            x, self._weight, norm_weight, self._weight if self._bias is None else self._bias, added, out, eps,
            N=self._outputs, K=self._columns, BN=shape.outputs, BK=shape.columns, NORM=norm is not None,
            BIAS=self._bias is not None, RESIDUAL=residual is not None, ACT=self._act, PDL=early,
            STAGES=shape.stages, num_warps=shape.warps, **ahead(early),
        )  # fmt: skip


def largest(*outputs: int) -> int:
    """Return the number of outputs that scratch must hold: the most of a matrix whose product is split."""
    return power(max([64, *(n for n in outputs if n < 1 << 16)]))
