"""Progress of the states that a backend keeps by slot, in rings: on the host, for every backend with such states."""

from __future__ import annotations

import numpy as np

from tokenmill.backends.base import StepInputs
from tokenmill.backends.steps import STATE_RING


class RingProgress:
    """The number of tokens that each state of each slot is after.

    `after` (slots, STATE_RING): -1 where a slot has no state.
    """

    def __init__(self, num_slots: int) -> None:
        self.after = np.full((num_slots, STATE_RING), -1, np.int64)

    def advance(self, inputs: StepInputs) -> None:
        """Record a step. Raise RuntimeError if a row does not continue where a state of its slot is."""
        slots, starts = inputs.slots.astype(np.int64), inputs.starts.astype(np.int64)
        lost = (starts > 0) & (self.after[slots, starts % STATE_RING] != starts)
        if lost.any():
            row = int(np.flatnonzero(lost)[0])
            raise RuntimeError(f"slot {slots[row]} has no state after {starts[row]} tokens: {self.after[slots[row]]}")
        ends = starts + inputs.counts
        self.after[slots, ends % STATE_RING] = ends

    def clear(self, slot: int) -> None:
        """Forget the states of a slot."""
        self.after[slot] = -1
