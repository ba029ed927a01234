"""What lasts by slot, on the device: tokens, block tables, sampling parameters. Written by difference, in step order.

Copies go through fresh pinned buffers and the queue in which the steps run: a slot that is given to another sequence is
written to behind the last step of the one before, without the host waiting for that.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from tokenmill.backends.base import StepInputs, StepLimits
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.kernels.rows import write_blocks
from tokenmill.backends.torch.slots import Slots, last_of_each

COLUMNS = 16
"""Numbers of a slot's row of `sampling`, floats by their bits; `_row` says which they are."""

_WRITTEN_AT_ONCE = 256


class CudaSlots(Slots):
    """Per-slot state; the slot after the last one is nobody's: rows that only pad a step belong to it."""

    def __init__(self, limits: StepLimits, vocab_size: int, device: Device) -> None:
        super().__init__(replace(limits, max_batch_size=limits.max_batch_size + 1), vocab_size, str(device.torch))
        self.spare = limits.max_batch_size
        self.sampling = torch.zeros(limits.max_batch_size + 1, COLUMNS, dtype=torch.int32, device=device.torch)
        self._device = device

    def apply(self, inputs: StepInputs) -> None:
        """Take in what is new since the step before: sequences first, then their blocks."""
        for admitted in inputs.admitted:
            self.parameters.admit(admitted.slot, admitted.request)
            self.tokens[admitted.slot, : len(admitted.token_ids)] = self._device.send(
                np.asarray(admitted.token_ids, np.int32)
            )
        if inputs.admitted:
            slots = np.unique([admitted.slot for admitted in inputs.admitted])
            self.sampling[self._device.send(slots)] = self._device.send(self._rows(slots))
        if len(inputs.blocks):
            self._write(last_of_each(inputs.blocks))

    def set_blocks(self, slot: int, blocks: NDArray[np.int32]) -> None:
        """A slot's table, from its beginning."""
        self.tables[slot, : len(blocks)] = self._device.send(blocks)

    def _write(self, changes: NDArray[np.int32]) -> None:
        grid = (triton.cdiv(len(changes), _WRITTEN_AT_ONCE),)
        sent = self._device.send(changes.reshape(-1))
        write_blocks[grid](sent, self.tables, self.tables.stride(0), len(changes), BLOCK=_WRITTEN_AT_ONCE)

    def _rows(self, slots: NDArray[np.integer]) -> NDArray[np.int32]:
        rows, made = self.parameters.rows[slots], np.zeros((len(slots), COLUMNS), np.int32)
        names = ("temperature", "seed_low", "seed_high", "top_k", "top_p", "min_p", "typical_p", "repetition")
        for i, name in enumerate((*names, "frequency", "presence", "num_prompt", "num_biases")):
            made[:, i] = np.ascontiguousarray(rows[name]).view(np.int32)
        return made
