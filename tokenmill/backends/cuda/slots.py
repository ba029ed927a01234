"""Per-slot state of the CUDA backend: token ids, block tables, sampling parameters and biases.

It is written by difference, in step order. Copies go through fresh pinned buffers and the queue in which the steps run:
a slot that is given to another sequence is written behind the last step of the one before, and the host does not wait.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.backends.base import StepInputs, StepLimits
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.kernels.rows import write_blocks
from tokenmill.backends.cuda.shapes import power
from tokenmill.backends.sampling import Parameters, column, device_rows
from tokenmill.backends.steps import last_of_each, state_shape, table_entries
from tokenmill.wire.messages import Request, SamplingParams, StoppingParams

_FEW_BIASES = 16  # a slot has room for at first
_WRITTEN_AT_ONCE = 256
_ALIGNED = 4  # entries of a table: Triton compiles a kernel anew for addresses that are not divisible by 16


class CudaSlots:
    """Token ids, block tables, sampling parameters and biases by slot.

    `padding`: the last slot, for rows that only pad a step. `tokens` and `tables`: as `backends.torch.slots.Slots`.
    `parameters`: on the host. `sampling` (slots, `sampling.COLUMNS`) int32: the same on the device. `biases` (slots,
    room, 3) int32: id, value by its bits, position where it ends; as many as the row of `sampling` has. Room grows when
    a sequence brings more than any before: another tensor. `masked` (slots,), on the host: rank 0 may mask the logits.
    `skips_inputs`: of a prompt only the last token counts in penalties.
    """

    def __init__(self, limits: StepLimits, device: Device, num_tables: int = 1) -> None:
        shape = state_shape(limits)
        self._width = shape.blocks if num_tables == 1 else -(-shape.blocks // _ALIGNED) * _ALIGNED  # of a table
        self._device, self.padding, slots = device, shape.slots, shape.slots + 1
        self.tokens = torch.zeros(slots, shape.tokens, dtype=torch.int32, device=device.torch)
        self.tables = torch.zeros(slots, num_tables * self._width, dtype=torch.int32, device=device.torch)
        self.parameters, self.skips_inputs = Parameters(slots), False
        self.parameters.admit(self.padding, Request(0, (0,), SamplingParams(), StoppingParams(1)))
        row = torch.from_numpy(device_rows(self.parameters.rows[self.padding :]))
        self.sampling = row.to(device.torch).repeat(slots, 1)
        self.biases = torch.zeros(slots, _FEW_BIASES, 3, dtype=torch.int32, device=device.torch)
        self.masked = np.zeros(slots, bool)

    def apply(self, inputs: StepInputs) -> None:
        """Apply the changes since the previous step: admitted sequences first, then blocks, then token ids."""
        for admitted in inputs.admitted:
            self.parameters.admit(admitted.slot, admitted.request)
            self.masked[admitted.slot] = _may_be_masked(admitted.request)
            self.tokens[admitted.slot, : len(admitted.token_ids)] = self._device.send(
                np.asarray(admitted.token_ids, np.int32)
            )
        if inputs.admitted:
            slots = np.unique([admitted.slot for admitted in inputs.admitted])
            rows = device_rows(self.parameters.rows[slots])
            rows[:, column("num_biases")] = [self._send_biases(slot) for slot in slots.tolist()]
            self.sampling[self._device.send(slots)] = self._device.send(rows)
        if len(inputs.blocks):
            self._write(table_entries(inputs.blocks, self._width))
        if len(inputs.host_tokens):
            slots, positions, token_ids = self._device.send(last_of_each(inputs.host_tokens).T.astype(np.int64))
            self.tokens[slots, positions] = token_ids.to(torch.int32)

    def table(self, number: int) -> Tensor:
        """Return one table of all slots."""
        return self.tables[:, number * self._width : (number + 1) * self._width]

    def set_blocks(self, slot: int, blocks: NDArray[np.int32]) -> None:
        """Write the same first blocks to each table of a slot."""
        self.tables[slot].view(-1, self._width)[:, : len(blocks)] = self._device.send(blocks)

    def _write(self, changes: NDArray[np.int32]) -> None:
        grid = (triton.cdiv(len(changes), _WRITTEN_AT_ONCE),)
        sent = self._device.send(changes.reshape(-1))
        write_blocks[grid](sent, self.tables, self.tables.stride(0), len(changes), BLOCK=_WRITTEN_AT_ONCE)

    def _send_biases(self, slot: int) -> int:
        """Send a slot's biases, added up by id and end, and return the number of entries."""
        held, n = self.parameters, int(self.parameters.rows["num_biases"][slot])
        if not n:
            return 0
        ids, until = held.bias_ids[slot, :n], held.bias_until[slot, :n]
        places, at = np.unique(until.astype(np.int64) << 32 | ids, return_inverse=True)
        values = np.zeros(len(places), np.float32)
        np.add.at(values, at, held.bias_values[slot, :n])
        columns = places & 0xFFFFFFFF, values.view(np.int32), places >> 32
        if len(places) > self.biases.shape[1]:
            wider = self.biases.new_zeros(len(self.biases), power(len(places)), 3)
            wider[:, : self.biases.shape[1]] = self.biases
            self.biases = wider
        self.biases[slot, : len(places)] = self._device.send(np.stack(columns, 1).astype(np.int32))
        return len(places)


def _may_be_masked(request: Request) -> bool:
    return request.grammar is not None or request.stopping.force_after > 0
