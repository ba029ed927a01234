"""What a step is, as arrays, and what a backend is. No torch here.

A backend keeps everything that lasts by *slot* (a row of its per-sequence state): the tokens known so far, the block
table, the sampling parameters. The host sends only differences, so a decode step in which nobody joined and nobody
crossed a block border carries three short arrays, and a token sampled in step N feeds step N + 1 without the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenmill.wire.messages import Request, TokenDetails

Tail = Literal["greedy", "plain", "full"]
"""How rows that sample get their token. greedy: the likeliest; plain: temperature only; full: everything."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step, and how much a backend must keep. Known before weights are read."""

    max_batch_tokens: int  # tokens of a step
    max_batch_size: int  # slots
    max_total_tokens: int  # of one sequence, prompt included
    block_size: int = 16  # tokens of a cache block


@dataclass(frozen=True, slots=True)
class Admitted:
    """A slot begins anew: what was kept of it is forgotten.

    `token_ids`: prompt and, after a preemption, what was generated before. Randomness is a function of the position in
    the sequence, so a resumed sequence goes on as if nothing had happened.
    """

    slot: int
    request: Request
    token_ids: NDArray[np.int32]


_NOTHING = np.zeros((0, 3), np.int32)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step. Arrays are the step's own: nobody writes to them after the launch.

    Rows are sequences, in the scheduler's order; S rows, R of them sample.
    """

    slots: NDArray[np.int32]  # (S,)
    starts: NDArray[np.int32]  # (S,) first position to compute
    counts: NDArray[np.int32]  # (S,) how many tokens, >= 1; position p's token is the slot's p-th
    samples: NDArray[np.int32]  # (R,) rows whose next token is sampled, ascending; it is the slot's at start + count
    admitted: tuple[Admitted, ...] = ()  # applied first
    # applied second: (n, 3) slot, index in its table, block
    blocks: NDArray[np.int32] = field(default_factory=lambda: _NOTHING)
    # applied third: (n, 3) slot, position, token id that was not sampled, or not this one
    known: NDArray[np.int32] = field(default_factory=lambda: _NOTHING)
    tail: Tail = "greedy"
    logprobs: int = -1  # the most that any sampling row wants: -1 none, n >= 0
    prompt_logprobs: int = -1  # the same over all rows that compute prompt tokens
    late: bool = False  # it samples when it is told by `Step.sample`; on rank 0 only


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a step, on the host."""

    token_ids: list[int]  # one a sampling row, in the order of `samples`; -1: the row's logits were not finite
    details: list[TokenDetails | None] | None = None  # one a sampling row; None if nobody asked
    # row -> of the tokens at positions start + 1 … (prompt only)
    prompt_details: dict[int, tuple[TokenDetails, ...]] | None = None


@dataclass(frozen=True, slots=True)
class Masks:
    """Which ids some of a step's sampling rows may choose: at least one each."""

    rows: NDArray[np.int32]  # (M,) places in `StepInputs.samples`, ascending; the others may choose any
    bits: NDArray[np.uint32]  # (M, ceil(vocabulary / 32)) id i is allowed if bit i % 32 of word i // 32 is 1


class Step(Protocol):
    """A launched step."""

    def sample(self, masks: Masks) -> None:
        """Of a step that is `late`: choose its tokens. Called once, before `result` and before the next launch,
        unless the step before found no memory.

        OutOfMemory, as of `Backend.run`: nothing of the step counts.
        """

    def result(self) -> StepResult:
        """Wait for it. Called once, on every rank; the same token ids on all of them.

        OutOfMemory if it found none on the device, and of every step launched behind it: nothing of them counts. With
        several ranks, which cannot agree on that, it is any other error. OutOfMemory, too, of a late step that was
        never told to sample.
        """


class Backend(Protocol):
    """Runs a recorded program. Made by a `backends.kind.Kind`."""

    @property
    def num_blocks(self) -> int:
        """Cache blocks that `allocate` made; 0 before."""

    def block_bytes(self) -> int:
        """Bytes of one cache block over all layers of this rank."""

    def step_bytes(self) -> int:
        """Bytes that the largest step needs besides weights and cache."""

    def claimed_bytes(self) -> int:
        """Bytes of `step_bytes` that the constructor has taken already."""

    def allocate(self, num_blocks: int) -> None:
        """Make the cache, once, before the first step."""

    def warm_up(self) -> None:
        """Run what a first step would otherwise pay for; leaves no trace in slots or cache."""

    def run(self, inputs: StepInputs) -> Step:
        """Launch a step behind those before it and return at once. OutOfMemory, as of `Step`: nothing was launched."""

    def idle_work(self) -> bool:
        """Do a piece of work that was put off, a tenth of a second at most; True while more remains.

        Called only while no step is on the device.
        """

    def close(self) -> None:
        """Free what outlives the process's own memory. Idempotent."""
