"""The interface of collective operations, each bound once to tensors at fixed addresses and launched for every step.

All ranks make the same objects in the same order, and launch the same operations with the same numbers of rows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor

from tokenmill.backends.cuda.sizes import Sizes


class Normed(NamedTuple):
    """Norm right behind a sum over the ranks: out = norm(Σ x + y). `y`, `weight`, `bias`: None for none."""

    y: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    total: Tensor  # its input
    out: Tensor
    eps: float
    center: bool


class Reduction(Protocol):
    """The sum of x over the ranks, bound to its operands."""

    def norms(self, rows: int) -> bool:
        """Return True if `run_normed` serves so many rows."""

    def run(self, rows: int, early: bool = False) -> None:
        """Launch the sum of the first rows. `early`: while the kernel before still runs."""

    def run_normed(self, rows: int, early: bool = False) -> None:
        """Launch the sum of the first rows and the norm behind it in one kernel."""


class Gathering(Protocol):
    """The concatenation of the ranks' columns, bound to its operands."""

    def run(self, rows: int) -> None:
        """Launch it for the first rows."""


class Spreading(Protocol):
    """Rank 0's tokens on all ranks, bound to the memory of tokens."""

    def run(self, sizes: Sizes, rows: int) -> None:
        """Launch it for the first rows that sample: set the chosen ids, and append them to the slots' tokens."""


class Collectives(Protocol):
    """Collective operations of one rank."""

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""

    def reduction(self, x: Tensor, out: Tensor, normed: Normed | None = None) -> Reduction:
        """Bind out = Σ x. Both are (rows, columns), contiguous. `normed`: a norm that may be done with it."""

    def gathering(self, x: Tensor, out: Tensor, first_only: bool) -> Gathering:
        """Bind out (rows, width) = the ranks' x (rows, columns) side by side, without what is beyond `width`.

        `first_only`: on rank 0 alone; on others, `out` is not written.
        """

    def spreading(self, chosen: Tensor, tokens: Tensor) -> Spreading:
        """Bind the tokens of rank 0. `chosen` (rows,) int32; `tokens`: as of `CudaSlots`."""

    def agree(self, ok: bool) -> bool:
        """Return True if `ok` is true on all ranks. Blocks until all have called it."""

    def unlaunched(self) -> AbstractContextManager[None]:
        """Return a context in which nothing is launched, because a hook only records our own kernels."""

    def started(self) -> None:
        """Wait for all ranks to be ready to serve. From then on no launch waits long for another rank's."""

    def check(self) -> None:
        """Raise RankAbsent if a collective operation was given up because another rank did not take part."""

    def close(self) -> None:
        """Leave the other ranks. Idempotent."""


class Needs(NamedTuple):
    """Largest operands of a program's collective operations."""

    rows: int  # of a step
    row_bytes: int  # of a row that is summed
    samples: int  # rows that sample
    columns: int  # of a rank, that are gathered
    item_bytes: int


class RankAbsent(RuntimeError):
    """Another rank did not take part in a collective operation within the limit: the engine must be restarted."""
