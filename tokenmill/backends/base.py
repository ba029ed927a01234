"""The interface between the engine and a device: a step as arrays, its result, and `Backend`. No torch here.

A backend keeps all lasting state by *slot* (a row of its per-sequence state): the tokens so far, the block tables, the
sampling parameters. The host sends only differences. So a decode step that admits no sequence and adds no block
carries three short arrays, and a token sampled in step N feeds step N + 1 without the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenmill.wire.messages import Payload, Request, TokenDetails

Tail = Literal["greedy", "plain", "full"]
"""The sampling work of a step. greedy: argmax; plain: temperature only; full: every parameter."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Size of the largest step and of the lasting state, fixed before weights are read."""

    max_batch_tokens: int  # tokens of a step
    max_batch_size: int  # slots
    max_total_tokens: int  # of one sequence, prompt included
    block_size: int = 16  # tokens of a cache block


@dataclass(frozen=True, slots=True)
class Admitted:
    """A sequence that takes a slot: the state of the slot's previous sequence is dropped.

    `token_ids`: the prompt and, after a preemption, the tokens generated before. Randomness is a function of the
    position in the sequence, so a resumed sequence continues as if it had not been preempted.
    """

    slot: int
    request: Request
    token_ids: NDArray[np.int32]


_NO_BLOCKS = np.zeros((0, 4), np.int32)
_NO_TOKENS = np.zeros((0, 3), np.int32)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step: S rows, which are sequences in the scheduler's order; R of them sample.

    Invariant: the arrays belong to the step; they are not written to after the launch.
    """

    slots: NDArray[np.int32]  # (S,)
    starts: NDArray[np.int32]  # (S,) first position to compute
    counts: NDArray[np.int32]  # (S,) number of tokens, >= 1; position p's token is the slot's p-th
    samples: NDArray[np.int32]  # (R,) rows whose next token is sampled, ascending; it is the slot's at start + count
    admitted: tuple[Admitted, ...] = ()  # applied first
    # applied second: (n, 4) table, slot, index in that table of the slot, block
    blocks: NDArray[np.int32] = field(default_factory=lambda: _NO_BLOCKS)
    # applied third: (n, 3) slot, position, token id. Such a token was not sampled, or replaces the sampled one
    host_tokens: NDArray[np.int32] = field(default_factory=lambda: _NO_TOKENS)
    tail: Tail = "greedy"
    logprobs: int = -1  # the largest number that a sampling row asks for: -1 none, n >= 0
    prompt_logprobs: int = -1  # the same over all rows that compute prompt tokens
    deferred: bool = False  # the step samples when `Step.sample` is called; on rank 0 only


@dataclass(frozen=True, slots=True)
class StepResult:
    """The output of a step, on the host."""

    token_ids: list[int]  # one a sampling row, in the order of `samples`; -1: the row's logits were not finite
    details: list[TokenDetails | None] | None = None  # one a sampling row; None if no row asked
    payloads: dict[int, Payload] | None = None  # by row; today details of the prompt tokens at start + 1 …


@dataclass(frozen=True, slots=True)
class Masks:
    """Logits masks of some of a step's sampling rows. Each allows at least one id."""

    rows: NDArray[np.int32]  # (M,) places in `StepInputs.samples`, ascending; the other rows may choose any id
    bits: NDArray[np.uint32]  # (M, ceil(vocabulary / 32)) id i is allowed if bit i % 32 of word i // 32 is 1


class Step(Protocol):
    """A launched step."""

    def sample(self, masks: Masks) -> None:
        """Choose the tokens of a deferred step.

        Call once, before `result` and before the next launch, unless the step before raised OutOfMemory. Raise
        OutOfMemory as `Backend.run` does: nothing of the step counts.
        """

    def result(self) -> StepResult:
        """Wait for the step and return its output: the same token ids on every rank. Call once, on every rank.

        Raise OutOfMemory if the device had no memory for this step or for one before it whose error was not raised
        yet: nothing of the step counts. With several ranks, which cannot agree on that, any other error is raised.
        Raise OutOfMemory, too, for a deferred step whose `sample` was not called.
        """


class Backend(Protocol):
    """Runs a recorded program. Made by a `backends.kind.Kind`."""

    @property
    def num_blocks(self) -> int:
        """Cache blocks that `allocate` made; 0 before."""

    @property
    def windows(self) -> tuple[int, ...]:
        """Windows by block table of a slot: tokens that a token attends to there, its own included; 0: all tokens.

        Entries of a table for blocks before the window are not read.
        """

    def block_bytes(self) -> int:
        """Bytes of one cache block of this rank, which holds tokens of one table: over all layers if there is one."""

    def step_bytes(self) -> int:
        """Bytes that the largest step needs besides weights and cache."""

    def claimed_bytes(self) -> int:
        """Bytes of `step_bytes` that the constructor has taken already."""

    def allocate(self, num_blocks: int) -> None:
        """Make the cache, once, before the first step."""

    def warm_up(self) -> None:
        """Run the work that a first step would otherwise pay for. Slots and cache are empty afterwards."""

    def run(self, inputs: StepInputs) -> Step:
        """Launch a step behind those before it and return at once. Raise OutOfMemory if nothing was launched."""

    def idle_work(self) -> bool:
        """Do a piece of postponed work, a tenth of a second at most; return True while more remains.

        Called only while no step is on the device.
        """

    def close(self) -> None:
        """Free what outlives the process's own memory. Idempotent."""
