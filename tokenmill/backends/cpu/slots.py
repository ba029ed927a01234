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
from tokenmill.backends.steps import state_shape


class Slots:
    """Token ids, block tables and sampling parameters by slot.

    `tokens` (slots, max_total_tokens + 1) int32: token ids so far, including sampled ones not yet read by the host.
    `tables` (slots, pages of the longest sequence) int32: cache pages of 16 tokens; a block is one or more pages.
    Entries that are not set are 0.
    `parameters`: sampling parameters.
    """

    def __init__(self, limits: StepLimits) -> None:
        shape = state_shape(limits)
        self._pages = limits.block_size // BLOCK  # pages of a block
        self.tokens = np.zeros((shape.slots, shape.tokens), np.int32)
        self.tables = np.zeros((shape.slots, shape.blocks * self._pages), np.int32)
        self.parameters = Parameters(shape.slots)

    def apply(self, inputs: StepInputs) -> None:
        """Apply the changes since the previous step: admitted sequences first, then blocks, then token ids."""
        for admitted in inputs.admitted:
            self.tokens[admitted.slot, : len(admitted.token_ids)] = admitted.token_ids
            self.parameters.admit(admitted.slot, admitted.request)
        if len(inputs.blocks):  # in order: the later of two entries for the same index wins
            slots, indices, blocks = inputs.blocks.T
            for page in range(self._pages):
                self.tables[slots, indices * self._pages + page] = blocks * self._pages + page
        if len(inputs.host_tokens):
            slots, positions, token_ids = inputs.host_tokens.T
            self.tokens[slots, positions] = token_ids
