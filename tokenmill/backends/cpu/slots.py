"""What the CPU backend keeps for each running sequence: its tokens, its block table, its sampling parameters.

Steps write to it in the order in which they run, on the backend's own thread: `apply` before a step, then the kernel
that samples puts its tokens there. So step N + 1 finds the token of step N without the host. No lock: one thread only.
Kernels use the arrays by address, which never changes.
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
    """The positions of a step whose logits are wanted because they say how likely the prompt's next token was.

    P positions, in the order of the step's rows and within a row of the positions; `where` indexes the step's T tokens
    (row after row, each its count), `targets` are the ids of the tokens one position later.
    """

    rows: Ints  # (P,) row of the step
    where: Ints  # (P,)
    targets: Ints  # (P,)


@dataclass(frozen=True, slots=True)
class StepTokens:
    """A step's T tokens, row after row, and its R rows that sample."""

    positions: Ints  # (T,)
    slots: Ints  # (T,)
    firsts: Ints  # (S,) place of each row's first token
    samples: Ints  # (R,) place of each sampling row's last token
    sampled_slots: Ints  # (R,)
    sampled_positions: Ints  # (R,) of the tokens that are being sampled
    single_token: bool  # every row has one token


class Slots:
    """Per-slot state.

    `tokens` (slots, max_total_tokens + 1) int32: the ids known so far; a sampled one stands here before the host knows.
    `tables` (slots, pages of the longest sequence) int32: cache pages of 16 tokens, of which a block is one or more;
    entries not set yet are 0.
    `parameters`: of sampling.
    """

    def __init__(self, limits: StepLimits) -> None:
        self._pages = limits.block_size // BLOCK  # of a block
        num_pages = -(-limits.max_total_tokens // limits.block_size) * self._pages
        self.tokens = np.zeros((limits.max_batch_size, limits.max_total_tokens + 1), np.int32)
        self.tables = np.zeros((limits.max_batch_size, num_pages), np.int32)
        self.parameters = Parameters(limits.max_batch_size)

    def apply(self, inputs: StepInputs) -> None:
        """Take in what is new since the step before: sequences first, then their blocks, then tokens."""
        for admitted in inputs.admitted:
            self.tokens[admitted.slot, : len(admitted.token_ids)] = admitted.token_ids
            self.parameters.admit(admitted.slot, admitted.request)
        if len(inputs.blocks):  # in order: of two entries for the same place the later one counts
            slots, indices, blocks = inputs.blocks.T
            for page in range(self._pages):
                self.tables[slots, indices * self._pages + page] = blocks * self._pages + page
        if len(inputs.host_tokens):
            slots, positions, token_ids = inputs.host_tokens.T
            self.tokens[slots, positions] = token_ids

    def step_tokens(self, inputs: StepInputs) -> StepTokens:
        """Where the step's tokens stand. Reads nothing that steps write: any thread may ask, at any time."""
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
        """Where this step computes prompt tokens of sequences that want their prompt's log-probabilities."""
        rows = self.parameters.rows[inputs.slots]
        ends = np.minimum(inputs.starts + inputs.counts, rows["num_prompt"] - 1)  # the last one predicts the output
        counts = np.where(rows["prompt_logprobs"] >= 0, np.maximum(ends - inputs.starts, 0), 0)
        row = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = (np.cumsum(inputs.counts) - inputs.counts)[row]
        targets = self.tokens[inputs.slots[row], inputs.starts[row] + within + 1].astype(np.int64)
        return PromptPositions(row, first + within, targets)
