"""Per-slot state of running sequences: token ids, block tables and sampling parameters.

Only the backend's thread writes to it, in the order of the steps, so there is no lock: `apply` before a step, then the
sampling kernel at its end. Step N + 1 therefore reads the token of step N without waiting for the host. Kernels access
the arrays by address. Invariant: the addresses never change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.base import StepInputs, StepLimits
from tokenmill.backends.cpu.layout import BLOCK
from tokenmill.backends.sampling import Parameters

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PromptPositions:
    """The P positions of a step at which prompt log-probabilities are requested.

    They are ordered by row of the step, then by position. `where` indexes the step's T tokens. `targets` are the prompt
    tokens one position later, whose log-probabilities the logits of these positions give.
    """

    rows: Ints  # (P,) row of the step
    where: Ints  # (P,)
    targets: Ints  # (P,)


@dataclass(frozen=True, slots=True)
class StepTokens:
    """The T tokens of a step, row after row, its S rows, and the R rows that sample."""

    positions: Ints  # (T,)
    slots: Ints  # (T,)
    firsts: Ints  # (S,) index of each row's first token
    samples: Ints  # (R,) index of each sampling row's last token
    sampled_slots: Ints  # (R,)
    sampled_positions: Ints  # (R,) positions of the tokens that this step samples
    single_token: bool  # every row has exactly one token


class Slots:
    """Token ids, block tables and sampling parameters by slot.

    `tokens` (slots, max_total_tokens + 1) int32: token ids so far, including sampled ones not yet read by the host.
    `tables` (slots, pages of the longest sequence) int32: cache pages of 16 tokens; a block is one or more pages.
    Entries that are not set are 0.
    `parameters`: sampling parameters.
    """

    def __init__(self, limits: StepLimits) -> None:
        self._pages = limits.block_size // BLOCK  # pages of a block
        num_pages = -(-limits.max_total_tokens // limits.block_size) * self._pages
        self.tokens = np.zeros((limits.max_batch_size, limits.max_total_tokens + 1), np.int32)
        self.tables = np.zeros((limits.max_batch_size, num_pages), np.int32)
        self.parameters = Parameters(limits.max_batch_size)

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

    def step_tokens(self, inputs: StepInputs) -> StepTokens:
        """Expand a step's rows to tokens. Reads no state that a step writes, so any thread may call it at any time."""
        slots, starts, samples = (a.astype(np.int64) for a in (inputs.slots, inputs.starts, inputs.samples))
        counts = inputs.counts.astype(np.int64)
        ends = starts + counts
        single_token = len(counts) == int(counts.sum())
        if single_token:
            firsts, token_slots, positions, last = np.arange(len(slots)), slots, starts, samples
        else:
            stops = np.cumsum(counts)
            firsts = stops - counts
            rows = np.repeat(np.arange(len(counts)), counts)
            token_slots, positions = slots[rows], np.arange(len(rows)) + (starts - firsts)[rows]
            last = (stops - 1)[samples]
        return StepTokens(positions, token_slots, firsts, last, slots[samples], ends[samples], single_token)

    def prompt_positions(self, inputs: StepInputs) -> PromptPositions:
        """Return the positions of this step at which requests ask for prompt log-probabilities."""
        rows = self.parameters.rows[inputs.slots]
        ends = np.minimum(inputs.starts + inputs.counts, rows["num_prompt"] - 1)  # the last one predicts the output
        counts = np.where(rows["prompt_logprobs"] >= 0, np.maximum(ends - inputs.starts, 0), 0)
        row = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = (np.cumsum(inputs.counts) - inputs.counts)[row]
        targets = self.tokens[inputs.slots[row], inputs.starts[row] + within + 1].astype(np.int64)
        return PromptPositions(row, first + within, targets)
