"""Per-slot state of running sequences: token ids, block tables and sampling parameters.

Only the backend's thread writes to it, in the order of the steps, so there is no lock: `apply` before a step, then the
sampling kernel at its end. Step N + 1 therefore reads the token of step N without waiting for the host. Kernels access
the arrays by address. Invariant: the addresses never change.
"""

from __future__ import annotations

import numpy as np

from tokenmill.backends.base import StepInputs, StepLimits
from tokenmill.backends.cpu.layout import BLOCK
from tokenmill.backends.sampling import Parameters
from tokenmill.backends.steps import state_shape, table_entries


class Slots:
    """Token ids, block tables and sampling parameters by slot.

    `tokens` (slots, max_total_tokens + 1) int32: token ids so far, including sampled ones not yet read by the host.
    `tables` (slots, tables · pages of the longest sequence) int32: cache pages of 16 tokens; a block is one or more
    pages. Entries that are not set are 0.
    `parameters`: sampling parameters.
    """

    def __init__(self, limits: StepLimits, num_tables: int = 1) -> None:
        shape = state_shape(limits)
        self._blocks = shape.blocks  # of a table
        self._pages = limits.block_size // BLOCK  # pages of a block
        self.tokens = np.zeros((shape.slots, shape.tokens), np.int32)
        self.tables = np.zeros((shape.slots, num_tables * shape.blocks * self._pages), np.int32)
        self.parameters = Parameters(shape.slots)

    @property
    def table_bytes(self) -> int:
        """Bytes of one table of a slot."""
        return self._blocks * self._pages * self.tables.itemsize

    def record(self, inputs: StepInputs, token_ids: list[int]) -> None:
        """Append the ids that rank 0 has sampled, -1 as 0, as its kernel does there."""
        rows = inputs.samples
        self.tokens[inputs.slots[rows], inputs.starts[rows] + inputs.counts[rows]] = np.maximum(token_ids, 0)

    def apply(self, inputs: StepInputs) -> None:
        """Apply the changes since the previous step: admitted sequences first, then blocks, then token ids."""
        for admitted in inputs.admitted:
            self.tokens[admitted.slot, : len(admitted.token_ids)] = admitted.token_ids
            self.parameters.admit(admitted.slot, admitted.request)
        if len(inputs.blocks):
            slots, columns, blocks = table_entries(inputs.blocks, self._blocks).T
            for page in range(self._pages):
                self.tables[slots, columns * self._pages + page] = blocks * self._pages + page
        if len(inputs.host_tokens):
            slots, positions, token_ids = inputs.host_tokens.T
            self.tokens[slots, positions] = token_ids
