"""Products with a matrix that stays quantized: few rows by kernels that unpack codes in registers; more by cuBLAS, for
which the matrix is unpacked into memory that all matrices share.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor

from tokenmill.backends.cuda.kernels.coded import few_coded, take_columns, unpack
from tokenmill.backends.cuda.launch import Site, ahead
from tokenmill.backends.cuda.products.base import Needs, NormedRow, Operands, Product, Scratch
from tokenmill.backends.cuda.products.coded_shapes import CodedShape, coded_shape, crossover, invariant_shape
from tokenmill.backends.cuda.products.dense import DenseProduct
from tokenmill.backends.cuda.products.forms import ROWS, Form

_TAKEN = 1024  # columns that a program brings into another order


class Lookup(NamedTuple):
    """Table of 16 numbers: as PTX, and in memory for the interpreter."""

    text: str
    numbers: Tensor


class CodedMatrix:
    """Implements `base.Packed` for packed codes.

    `meta`: words as `layout.pack_words` returns them, or scales of rows, float32. `order`: the column of x that belongs
    to each column of codes, int32; None: the same. `together`: rows whose codes of a block are adjacent.
    """

    def __init__(
        self, form: Form, shape: tuple[int, int], codes: Tensor, meta: Tensor, factor: float = 1.0,
        lookup: Lookup | None = None, order: Tensor | None = None, together: int = ROWS,
    ) -> None:  # fmt: skip
        self.form, self.shape, self.codes, self.meta, self.factor = form, shape, codes, meta, factor
        self.lookup, self.order, self.together = lookup, order, together

    @property
    def nbytes(self) -> int:
        """See `Packed`."""
        return self.codes.nbytes + self.meta.nbytes + (0 if self.order is None else self.order.nbytes)

    def needs(self, rows: int) -> Needs:
        """See `Packed`."""
        outputs, columns = self.shape
        unpacked = outputs * columns if rows > crossover(self.form, outputs) else 0
        return Needs(unpacked, 0 if self.order is None else rows * columns)

    def product(self, operands: Operands, scratch: Scratch | None, batch_invariant: bool) -> CodedProduct:
        """See `Packed`."""
        assert scratch is not None, "matrices are packed for 16-bit computation only"
        return CodedProduct(self, operands, scratch, batch_invariant)

    def unpack(self, out: Tensor) -> None:
        """Write the numbers into `out`, contiguous, of the matrix's shape and in 16 bits."""
        self.unpacking()(out)

    def unpacking(self) -> Unpacking:
        """Return a launch site of `unpack`."""
        return Unpacking(self)


class Unpacking:
    """Launch site that unpacks one matrix."""

    def __init__(self, matrix: CodedMatrix) -> None:
        self._matrix, self._launch = matrix, Site(unpack)

    def __call__(self, out: Tensor) -> None:
        """Write the matrix into `out`."""
        matrix, form = self._matrix, self._matrix.form
        (n, k), text = matrix.shape, "" if matrix.lookup is None else matrix.lookup.text
        self._launch(
            (triton.cdiv(n, 16), triton.cdiv(k, form.block)),
            matrix.codes, matrix.meta, _numbers(matrix), out, matrix.factor, N=n, K=k, BN=16, SL=form.depth,
            R=matrix.together, G=form.group, KIND=form.kind, META=form.meta, TEXT=text, ASM=out.is_cuda, num_warps=4,
        )  # fmt: skip


def _numbers(matrix: CodedMatrix) -> Tensor:
    """Return the table in memory, or any tensor where there is none."""
    return matrix.meta if matrix.lookup is None else matrix.lookup.numbers


class CodedProduct:
    """Implements `base.Product` for packed codes."""

    norms_one = False

    def __init__(self, matrix: CodedMatrix, operands: Operands, scratch: Scratch, batch_invariant: bool) -> None:
        self._matrix, self._scratch, self._invariant = matrix, scratch, batch_invariant
        self._source, whole, self._bias, self._act, gated = operands
        self._x = self._source if matrix.order is None else scratch.ordered(len(self._source), matrix.shape[1])
        self._out = whole if gated is None else gated
        self._outputs = matrix.shape[0] // (2 if self._act else 1)
        self._few, self._take, self._unpack = Site(few_coded), Site(take_columns), matrix.unpacking()
        self._dense: Product | None = None
        if not batch_invariant and len(self._source) > crossover(matrix.form, matrix.shape[0]):
            self._buffer = scratch.unpacked(matrix.shape)
            self._dense = DenseProduct(self._buffer, operands._replace(x=self._x), scratch)

    @property
    def fuses_one(self) -> bool:
        """See `Product`. A row whose columns are brought into another order comes from a launch of its own."""
        return not self._invariant and self._matrix.order is None

    def applies_act(self, rows: int) -> bool:
        """See `Product`."""
        return bool(self._act) and (self._is_few(rows) or self._dense is None or self._dense.applies_act(rows))

    def run(self, rows: int, early: bool = False) -> None:
        """See `Product`."""
        if self._matrix.order is not None:
            columns = self._matrix.shape[1]
            self._take(
                (rows, triton.cdiv(columns, _TAKEN)),
                self._source, self._matrix.order, self._x, self._source.stride(0), K=columns, BLOCK=_TAKEN, num_warps=4,
            )  # fmt: skip
            early = False
        if self._is_few(rows) or self._dense is None:
            self._launch(rows, self._shape(rows), early)
        else:
            self._unpack(self._buffer)
            self._dense.run(rows)

    def one(
        self,
        norm: tuple[Tensor, Tensor, float] | None = None,
        residual: tuple[Tensor, Tensor] | None = None,
        early: bool = False,
        given: NormedRow | None = None,
        makes: NormedRow | None = None,
    ) -> None:
        """See `Product`. `given`: in place of x; `makes`: stored beside the result."""
        assert norm is None, "its input is normed before, or given"
        self._launch(1, self._shape(1), early, residual, given, makes)

    def normed(self, row: Tensor, weight: Tensor, eps: float) -> NormedRow:
        """Return what `one` makes of its result for the products behind a norm. `row`: where it is stored."""
        tiles = triton.cdiv(self._outputs, self._shape(1).outputs)
        return NormedRow(row, weight, eps, self._scratch.squares[:tiles])

    def _is_few(self, rows: int) -> bool:
        return self._invariant or rows <= crossover(self._matrix.form, self._matrix.shape[0])

    def _shape(self, rows: int) -> CodedShape:
        form, gated = self._matrix.form, bool(self._act)
        if self._invariant:
            return invariant_shape(rows, form)
        shape = coded_shape(rows, self._outputs, self._matrix.shape[1], gated, form)
        tiles = triton.cdiv(self._outputs, shape.outputs)
        while shape.splits > 1 and not self._scratch.holds(tiles, shape.splits, shape.outputs * shape.rows, gated):
            shape = shape._replace(splits=shape.splits // 2)
        return shape

    def _launch(
        self, rows: int, shape: CodedShape, early: bool, residual: tuple[Tensor, Tensor] | None = None,
        given: NormedRow | None = None, makes: NormedRow | None = None,
    ) -> None:  # fmt: skip
        assert given is None or makes is None, "both would be in the same memory"
        matrix, form, bias, none = self._matrix, self._matrix.form, self._bias, self._x
        x, normed = (none if given is None else given.row), given or makes or NormedRow(none, none, 0.0, none)
        added, out = residual or (none, self._out)
        self._few(
            (triton.cdiv(self._outputs, shape.outputs), shape.splits, triton.cdiv(rows, shape.rows)),
            x, matrix.codes, matrix.meta, _numbers(matrix), none if bias is None else bias, added, normed.weight,
            normed.row, normed.squares, out, self._scratch.part, self._scratch.counts, matrix.factor, normed.eps,
            x.stride(0), rows, N=self._outputs, K=matrix.shape[1], BM=shape.rows, BN=shape.outputs, SL=form.depth,
            D=shape.depth, R=matrix.together, G=form.group, KIND=form.kind, META=form.meta,
            TEXT="" if matrix.lookup is None else matrix.lookup.text, OPERAND=shape.operand, SPLITS=shape.splits,
            SQUARES=0 if given is None else len(given.squares), BIAS=bias is not None, RESIDUAL=residual is not None,
            NORM=makes is not None, ACT=self._act, PDL=early, STAGES=shape.stages, ASM=out.is_cuda,
            num_warps=shape.warps, **ahead(early),
        )  # fmt: skip
