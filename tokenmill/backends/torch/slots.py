"""Per-slot state of the torch backend: token ids, block tables and sampling parameters.

Only the backend's thread writes to it, in the order of the steps, so there is no lock: `apply` before a step's forward
pass, `record` after its sampling. Step N + 1 therefore reads the token of step N without the host.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.backends.base import StepInputs, StepLimits
from tokenmill.backends.sampling import Parameters
from tokenmill.backends.steps import state_shape, table_entries

_CPU = torch.device("cpu")


class Slots:
    """Token ids, block tables and sampling parameters by slot.

    `tokens` (slots, max_total_tokens + 1) int32: token ids so far, including sampled ones not yet read by the host.
    `tables` (slots, tables · blocks of the longest sequence) int32: cache blocks; entries that are not set are 0.
    `parameters`: on the host. `skips_inputs`: of a prompt only the last token counts in penalties.
    """

    def __init__(self, limits: StepLimits, device: torch.device = _CPU, num_tables: int = 1) -> None:
        self.device, shape = device, state_shape(limits)
        self.blocks = shape.blocks  # of a table
        self.tokens = torch.zeros(shape.slots, shape.tokens, dtype=torch.int32, device=device)
        self.tables = torch.zeros(shape.slots, num_tables * shape.blocks, dtype=torch.int32, device=device)
        self.parameters = Parameters(shape.slots)
        self.skips_inputs = False

    def apply(self, inputs: StepInputs) -> None:
        """Apply the changes since the previous step: admitted sequences first, then blocks, then token ids."""
        for admitted in inputs.admitted:
            ids = torch.from_numpy(np.ascontiguousarray(admitted.token_ids, dtype=np.int32))
            self.tokens[admitted.slot, : len(ids)] = ids.to(self.device)
            self.parameters.admit(admitted.slot, admitted.request)
        if len(inputs.blocks):
            slot, index, block = self._indices(table_entries(inputs.blocks, self.blocks)).unbind(1)
            self.tables[slot, index] = block.to(torch.int32)
        if len(inputs.host_tokens):
            slot, position, token_id = self._indices(inputs.host_tokens).unbind(1)
            self.tokens[slot, position] = token_id.to(torch.int32)

    def record(self, inputs: StepInputs, token_ids: Tensor) -> None:
        """Append the sampled ids (R,) to their sequences. A -1 (not finite) becomes 0: its sequence is ending."""
        slots = self._indices(inputs.slots[inputs.samples])
        ends = self._indices((inputs.starts + inputs.counts)[inputs.samples])
        self.tokens[slots, ends] = token_ids.clamp(min=0).to(torch.int32)

    def _indices(self, array: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self.device)
