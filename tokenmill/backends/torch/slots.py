"""What the torch backend keeps for each running sequence: its tokens, its block table, its sampling parameters.

Steps write to it in the order in which they run, on the backend's own thread: `apply` before a step's forward pass,
`record` after its sampling. So step N + 1 finds the token of step N without the host. No lock: one thread only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.backends.base import StepInputs, StepLimits
from tokenmill.backends.sampling import Parameters


@dataclass(frozen=True, slots=True)
class PromptPositions:
    """The positions of a step whose logits are wanted because they say how likely the prompt's next token was.

    P positions, in the order of the step's rows and within a row of the positions; `where` indexes the step's T tokens
    (row after row, each its count), `targets` are the ids of the tokens one position later.
    """

    rows: NDArray[np.int64]  # (P,) row of the step
    where: NDArray[np.int64]  # (P,)
    targets: Tensor  # (P,) int64, on the device


class Slots:
    """Per-slot state.

    `tokens` (slots, max_total_tokens + 1) int32: the ids known so far; a sampled one stands here before the host knows.
    `tables` (slots, blocks of the longest sequence) int32: cache blocks; entries not set yet are 0.
    `parameters`: on the host.
    """

    def __init__(self, limits: StepLimits, vocab_size: int, device: str = "cpu") -> None:
        self.vocab_size, self.device = vocab_size, torch.device(device)
        num_blocks = -(-limits.max_total_tokens // limits.block_size)
        self.tokens = torch.zeros(limits.max_batch_size, limits.max_total_tokens + 1, dtype=torch.int32, device=device)
        self.tables = torch.zeros(limits.max_batch_size, num_blocks, dtype=torch.int32, device=device)
        self.parameters = Parameters(limits.max_batch_size)

    def apply(self, inputs: StepInputs) -> None:
        """Take in what is new since the step before: sequences first, then their blocks, then tokens."""
        for admitted in inputs.admitted:
            ids = torch.from_numpy(np.ascontiguousarray(admitted.token_ids, dtype=np.int32))
            self.tokens[admitted.slot, : len(ids)] = ids.to(self.device)
            self.parameters.admit(admitted.slot, admitted.request)
        if len(inputs.blocks):
            slot, index, block = self._indices(last_of_each(inputs.blocks)).unbind(1)
            self.tables[slot, index] = block.to(torch.int32)
        if len(inputs.host_tokens):
            slot, position, token_id = self._indices(inputs.host_tokens).unbind(1)
            self.tokens[slot, position] = token_id.to(torch.int32)

    def record(self, inputs: StepInputs, token_ids: Tensor) -> None:
        """Write the sampled ids (R,) behind their sequences. A -1 (not finite) becomes 0: its sequence is ending."""
        slots = self._indices(inputs.slots[inputs.samples])
        ends = self._indices((inputs.starts + inputs.counts)[inputs.samples])
        self.tokens[slots, ends] = token_ids.clamp(min=0).to(torch.int32)

    def prompt_positions(self, inputs: StepInputs) -> PromptPositions:
        """Where this step computes prompt tokens of sequences that want their prompt's log-probabilities."""
        rows = self.parameters.rows[inputs.slots]
        ends = np.minimum(inputs.starts + inputs.counts, rows["num_prompt"] - 1)  # the last one predicts the output
        counts = np.where(rows["prompt_logprobs"] >= 0, np.maximum(ends - inputs.starts, 0), 0)
        row = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = np.cumsum(inputs.counts) - inputs.counts  # of each row, among the step's tokens
        slots, positions = self._indices(inputs.slots[row]), self._indices(inputs.starts[row] + within + 1)
        return PromptPositions(row, first[row] + within, self.tokens[slots, positions].long())

    def _indices(self, array: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self.device)


def last_of_each(blocks: NDArray[np.int32]) -> NDArray[np.int32]:
    """Without the entries that a later one overwrites: a slot may be given up and taken again within one plan.

    The order in which a device writes to the same place is not defined.
    """
    backwards = blocks[::-1]
    places = backwards[:, 0].astype(np.int64) << 32 | backwards[:, 1]
    return backwards[np.unique(places, return_index=True)[1]]
