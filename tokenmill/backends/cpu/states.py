"""States of fixed size by slot. Their layout is in `layout.py`."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.scratch import zeros
from tokenmill.backends.steps import STATE_RING
from tokenmill.program.ops import Op
from tokenmill.program.recurrence import StateSpace
from tokenmill.program.value import Program

Floats = NDArray[np.float32]
STATE_KERNELS = ("conv", "scan", "delta", "lru")
"""Kernels that read and write states"""

assert STATE_RING == layout.STATE_RING


class States:
    """The states of all slots. `slots`: 0 for a program that is only lowered, not run."""

    def __init__(self, program: Program, slots: int) -> None:
        self._sizes = {spec.key: _floats(op) for op in program.ops if (spec := op.state()) is not None}
        self._slots = slots
        self._arrays: dict[tuple[int, str], Floats] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return 4 * sum(self._sizes.values()) * STATE_RING * self._slots

    def allocate(self) -> None:
        """Make the states. The system commits their memory when a state is first written."""
        self._arrays = {key: zeros((self._slots, STATE_RING, n), np.float32) for key, n in self._sizes.items()}

    def columns(self, op: Op) -> dict[int, int]:
        """Return the columns of a table row that accesses an operation's states."""
        spec = op.state()
        assert spec is not None
        array = self._arrays[spec.key]
        slot, state, _ = array.strides
        return {layout.STATE: array.ctypes.data, layout.STATE_SLOT: slot, layout.STATE_BYTES: state}

    def clear(self, slot: int) -> None:
        """Reset the states of a slot to zeros."""
        for array in self._arrays.values():
            array[slot] = 0


def padded_width(width: int) -> int:
    """Return `width` rounded up to whole vectors."""
    return -(-width // 16) * 16


def _floats(op: Op) -> int:
    """Return the numbers of a state of `op` in its kernel's layout."""
    spec = op.state()
    assert spec is not None
    if isinstance(op, StateSpace):
        return padded_width(op.x.width) * spec.shape[-1]
    return math.prod(spec.shape[:-1]) * padded_width(spec.shape[-1])
