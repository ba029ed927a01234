"""Cosines and sines by position, for the kernels: made when a step first needs a position, in pieces."""

from __future__ import annotations

import numpy as np

from tokenmill.backends.cpu.scratch import zeros
from tokenmill.program.rope import RopeTable

_PIECE = 1024  # positions made at a time


class Turns:
    """Of one rope, for positions below `length`: a row of cos, then sin, of half the rotary columns, float32.

    A row costs memory only once its piece was made, so a model for a million tokens starts like any other.
    """

    def __init__(self, table: RopeTable, length: int) -> None:
        self.table, self.half = table, table.rotary_dim // 2
        self.rows = zeros((length, 2 * self.half), np.float32)
        self._made = 0

    def reach(self, position: int) -> None:
        """Make all rows up to `position`, if they are not there yet."""
        while self._made <= position:
            stop = min(self._made + _PIECE, len(self.rows))
            self._make(np.arange(self._made, stop))
            self._made = stop

    def _make(self, positions: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        if self.table.moves:
            inverse = self.table.frequencies_at(positions)
        else:
            inverse = self.table.inverse_frequencies()[None]
        angle = positions[:, None].astype(np.float32) * inverse
        magnitude = np.float32(self.table.magnitude())
        rows = self.rows[positions[0] : positions[0] + len(positions)]
        rows[:, : self.half], rows[:, self.half :] = np.cos(angle) * magnitude, np.sin(angle) * magnitude
