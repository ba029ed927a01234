"""Interface between the lowering of products and the formats of matrices on the device.

A format is a file of this package: a `Packed`, which holds a matrix in the form that its kernels read, and its
`Product`, the launches of one product with it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import triton
from torch import Tensor

FEW = 64  # rows up to which kernels are launched ahead


class Operands(NamedTuple):
    """Tensors of a product x · matrixᵀ + bias, at the largest step; a smaller step uses the first rows."""

    x: Tensor  # (rows, columns)
    out: Tensor  # (rows, rows of the matrix)
    bias: Tensor | None = None
    act: str = ""  # activation behind the product: act(gate) · up, of the two halves of `out`
    gated: Tensor | None = None  # (rows, half as many): the result of the activation


class Scratch:
    """Partial sums and counters of split products; and whether the device has a copy engine for tiles."""

    def __init__(self, outputs: int, device: torch.device) -> None:
        tiles = triton.cdiv(outputs, 64)
        self.part = torch.empty(4 * tiles * 64 * FEW, device=device)
        self.counts = torch.zeros(tiles, dtype=torch.int32, device=device)
        self.tma = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


class Product(Protocol):
    """The launches of one product, for any number of rows."""

    @property
    def fuses_one(self) -> bool:
        """True if `one` may be called."""

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

    def product(self, operands: Operands, scratch: Scratch | None, batch_invariant: bool) -> Product:
        """Return the product of these operands. `scratch`: None if products cannot be split.

        `batch_invariant`: a row's results must not depend on the number of rows.
        """
