"""Scratch memory that rows of the step table write and later rows of the same operation read.

Layers run one after another, so all share one array of each name, of the size that the largest needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tokenmill.backends.cpu.scratch import zeros
from tokenmill.backends.cpu.states import padded_width
from tokenmill.program.ops import LatentAttention, Op
from tokenmill.program.recurrence import RgLru
from tokenmill.program.value import Buffer, Program


class Rooms:
    """Named arrays. `rows`: the rows of a buffer."""

    def __init__(self, program: Program, rows: Callable[[Buffer], int]) -> None:
        sizes: dict[str, int] = {}
        for op in program.ops:
            for name, width in _widths(op):
                sizes[name] = max(sizes.get(name, 0), rows(op.out.spec) * 4 * width)
        self._arrays = {name: zeros((size,)) for name, size in sizes.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    def at(self, name: str) -> int:
        """Return the address of an array."""
        return int(self._arrays[name].ctypes.data)


def _widths(op: Op) -> Iterator[tuple[str, int]]:
    """Yield the names of the arrays that an operation needs, and the numbers that each holds for a row."""
    if isinstance(op, RgLru):
        yield "input gates", padded_width(op.x.width)
        yield "recurrence gates", padded_width(op.x.width)
    if isinstance(op, LatentAttention):
        heads, kept = op.q.width // op.head_dim, op.latent.width + op.key.width
        yield "queries", heads * kept
        yield "kept", kept
        yield "results", heads * op.latent.width
