"""Interface between the lowering of products and the formats of matrices on the device.

A format is a file of this package: a `Packed`, which holds a matrix in the form that its kernels read, and its
`Product`, the launches of one product with it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import triton
from torch import Tensor

_LEAST_PART = 1 << 21  # partial sums: 4 splits of 128 rows of a matrix with 4096 outputs
FEW = 64  # rows up to which kernels are launched ahead


class Operands(NamedTuple):
    """Tensors of a product x · matrixᵀ + bias, at the largest step; a smaller step uses the first rows."""

    x: Tensor  # (rows, columns)
    out: Tensor  # (rows, rows of the matrix)
    bias: Tensor | None = None
    act: str = ""  # activation behind the product: act(gate) · up, of the two halves of `out`
    gated: Tensor | None = None  # (rows, half as many): the result of the activation


class Needs(NamedTuple):
    """Elements of scratch memory in the computation's dtype.

    `unpacked`: of a matrix that is unpacked for a product. `ordered`: of rows of x with their columns in another order.
    """

    unpacked: int = 0
    ordered: int = 0


class NormedRow(NamedTuple):
    """Row that a product stores for those behind a norm: times the norm's weight, but not divided by its size yet.

    `squares`: sums of the squares of its parts.
    """

    row: Tensor  # (1, columns)
    weight: Tensor
    eps: float
    squares: Tensor


class Scratch:
    """Partial sums and counters of split products; `squares` of a `NormedRow`; memory for `Needs`, in `dtype`; and
    whether the device has a copy engine for tiles.
    """

    def __init__(
        self, outputs: int, device: torch.device, needs: Needs | None = None, dtype: torch.dtype = torch.float16
    ) -> None:
        needs = needs or Needs()
        tiles = triton.cdiv(outputs, 64)
        self.part = torch.empty(max(4 * tiles * 64 * FEW, _LEAST_PART), device=device)
        self.counts = torch.zeros(4 * tiles, dtype=torch.int32, device=device)
        self.tma = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
        self.squares = torch.empty(len(self.counts), device=device)
        self._unpacked = torch.empty(needs.unpacked, dtype=dtype, device=device)
        self._ordered = torch.empty(needs.ordered, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        own = self.part.nbytes + self.counts.nbytes + self.squares.nbytes
        return own + self._unpacked.nbytes + self._ordered.nbytes

    def holds(self, tiles: int, splits: int, each: int, gated: bool) -> bool:
        """Return True if there is room for the sums of so many tiles of `each` numbers."""
        return splits * tiles * each * (2 if gated else 1) <= len(self.part) and tiles <= len(self.counts)

    def unpacked(self, shape: tuple[int, int]) -> Tensor:
        """Return the memory for an unpacked matrix, valid until the next one is."""
        return self._unpacked[: shape[0] * shape[1]].view(shape)

    def ordered(self, rows: int, columns: int) -> Tensor:
        """Return the memory for rows of x in another order, valid until the next ones are."""
        return self._ordered[: rows * columns].view(rows, columns)


class Product(Protocol):
    """The launches of one product, for any number of rows."""

    @property
    def fuses_one(self) -> bool:
        """True if `one` may be called."""

    @property
    def norms_one(self) -> bool:
        """True if `one` norms its input itself, False if it reads a `NormedRow`."""

    def applies_act(self, rows: int) -> bool:
        """Return True if `run` applies the activation and writes `gated`; False if it writes `out`."""

    def run(self, rows: int, early: bool = False) -> None:
        """Launch the product of the first rows. `early`: while the kernel before still runs."""

    def one(
        self,
        norm: tuple[Tensor, Tensor, float] | None = None,
        residual: tuple[Tensor, Tensor] | None = None,
        early: bool = False,
    ) -> None:
        """Launch one row. `norm`: (in place of x, weight, eps). `residual`: (addend, in place of out)."""


class Packed(Protocol):
    """A matrix on the device in the format that its kernels read."""

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""

    def needs(self, rows: int) -> Needs:
        """Return what products of up to so many rows need of scratch memory."""

    def product(self, operands: Operands, scratch: Scratch | None, batch_invariant: bool) -> Product:
        """Return the product of these operands. `scratch`: None if products cannot be split.

        `batch_invariant`: a row's results must not depend on the number of rows.
        """
