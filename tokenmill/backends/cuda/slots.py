"""What lasts by slot, on the device: tokens, block tables, sampling parameters, biases. Written by difference, in step
order.

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
from tokenmill.backends.cuda.shapes import power
from tokenmill.backends.torch.slots import Slots, last_of_each
from tokenmill.wire.messages import Request, SamplingParams, StoppingParams

COLUMNS = 16
"""Numbers of a slot's row of `sampling`, floats by their bits; `_rows` says which they are."""

_FLOATS = ("top_p", "min_p", "typical_p", "repetition", "frequency", "presence")
_FEW_BIASES = 16  # a slot has room for at first
_WRITTEN_AT_ONCE = 256


class CudaSlots(Slots):
    """Per-slot state; the slot after the last one is nobody's: rows that only pad a step belong to it.

    `sampling` (slots, COLUMNS) int32. `biases` (slots, room, 3) int32: id, value by its bits, position where it ends;
    as many as the row of `sampling` says. Room grows when a sequence brings more than there ever were: another tensor.
    """

    def __init__(self, limits: StepLimits, vocab_size: int, device: Device) -> None:
        super().__init__(replace(limits, max_batch_size=limits.max_batch_size + 1), vocab_size, str(device.torch))
        self.spare = limits.max_batch_size
        self._device = device
        self.parameters.admit(self.spare, Request(0, (0,), SamplingParams(), StoppingParams(1)))
        nobodys = torch.from_numpy(self._rows(np.array([self.spare])))
        self.sampling = nobodys.to(device.torch).repeat(limits.max_batch_size + 1, 1)
        self.biases = torch.zeros(limits.max_batch_size + 1, _FEW_BIASES, 3, dtype=torch.int32, device=device.torch)

    def apply(self, inputs: StepInputs) -> None:
        """Take in what is new since the step before: sequences first, then their blocks, then tokens."""
        for admitted in inputs.admitted:
            self.parameters.admit(admitted.slot, admitted.request)
            self.tokens[admitted.slot, : len(admitted.token_ids)] = self._device.send(
                np.asarray(admitted.token_ids, np.int32)
            )
        if inputs.admitted:
            slots = np.unique([admitted.slot for admitted in inputs.admitted])
            rows = self._rows(slots)
            for slot, row in zip(slots.tolist(), rows, strict=True):
                row[11] = self._send_biases(slot)
            self.sampling[self._device.send(slots)] = self._device.send(rows)
        if len(inputs.blocks):
            self._write(last_of_each(inputs.blocks))
        if len(inputs.host_tokens):
            slots, positions, token_ids = self._device.send(last_of_each(inputs.host_tokens).T.astype(np.int64))
            self.tokens[slots, positions] = token_ids.to(torch.int32)

    def set_blocks(self, slot: int, blocks: NDArray[np.int32]) -> None:
        """A slot's table, from its beginning."""
        self.tables[slot, : len(blocks)] = self._device.send(blocks)

    def _write(self, changes: NDArray[np.int32]) -> None:
        grid = (triton.cdiv(len(changes), _WRITTEN_AT_ONCE),)
        sent = self._device.send(changes.reshape(-1))
        write_blocks[grid](sent, self.tables, self.tables.stride(0), len(changes), BLOCK=_WRITTEN_AT_ONCE)

    def _send_biases(self, slot: int) -> int:
        """What is biased in a slot, added up by id and end; how many entries that makes."""
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

    def _rows(self, slots: NDArray[np.integer]) -> NDArray[np.int32]:
        """0 temperature, 1, 2 seed, 3 top_k, from 4 on `_FLOATS`, 10 num_prompt, 11 biases, 12 raw_logprobs."""
        rows, made = self.parameters.rows[slots], np.zeros((len(slots), COLUMNS), np.int32)
        for i, name in enumerate(("temperature", "seed_low", "seed_high", "top_k", *_FLOATS, "num_prompt")):
            made[:, i] = np.ascontiguousarray(rows[name]).view(np.int32)
        made[:, 12] = rows["raw_logprobs"]
        return made
