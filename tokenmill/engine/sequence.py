"""Sequence: a request with its progress. Batch: the plan of one step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tokenmill.engine.block_pool import chain_hashes, chain_root
from tokenmill.wire.messages import Output, Payload, Request, TokenDetails

Int32 = NDArray[np.int32]

_NO_ENTRIES = np.zeros((0, 3), np.int32)
_NO_BLOCKS = np.zeros((0, 4), np.int32)
_AHEAD = 32  # blocks hashed per call: few calls for a long prompt, little waste at a cache miss


def entries_array(entries: list[tuple[int, int, int]]) -> Int32:
    """Return the entries as an array (n, 3). Do not write to it: all empty results are the same array."""
    return np.array(entries, np.int32) if entries else _NO_ENTRIES


def blocks_array(entries: list[int]) -> Int32:
    """Return the entries, four numbers each, as an array (n, 4), under the same condition."""
    return np.array(entries, np.int32).reshape(-1, 4) if entries else _NO_BLOCKS


@dataclass(eq=False, slots=True)
class Sequence:
    """State of one request, changed by the scheduler only. Its progress on the device is in the arrays of `Running`.

    A token that is sampled but not yet read back is not in `token_ids`: the plan of the step that consumes it does not
    depend on its value.
    """

    request: Request
    id: int = field(init=False)  # equals `request.id`
    token_ids: list[int] = field(init=False)  # of the prompt, then those read back from the device
    max_tokens: int = field(init=False)  # length at which it ends: prompt and `max_new_tokens`
    stop_ids: frozenset[int] = field(init=False)
    num_tokens: int = field(init=False)  # valid while it waits: len(token_ids) + tokens still on the device
    arrival: int = 0  # ordinal of its request; smaller: older
    slot: int = -1  # index of its state on the device; -1 while it waits
    blocks: list[list[int]] = field(default_factory=list)  # by table, from its entry of `firsts` on; none waiting
    firsts: list[int] = field(default_factory=list)  # by table: blocks before it were released: no token reads them
    prefill_end: int = 0  # tokens known at its last admission; it samples once all of them are computed
    hashes: list[bytes] = field(default_factory=list)  # of the leading full blocks of `token_ids`, computed on demand
    num_matched: int = 0  # leading blocks that were cached at the last lookup
    num_published: int = 0  # leading blocks published in the prefix cache
    publish_at: int = 0  # len(token_ids) at which the next block is full
    num_preemptions: int = 0
    valid_from: int = 0  # number of the first batch whose sampled token counts; an `Extend` voids earlier ones
    was_admitted: bool = False
    finish_reason: str = ""  # "": not finished; "stop", "length", "error", "abort"

    def __post_init__(self) -> None:
        self.id = self.request.id
        request = self.request
        self.token_ids = [*request.prompt_ids, *request.output_ids]  # as after a preemption
        self.num_tokens = len(self.token_ids)
        self.max_tokens = len(request.prompt_ids) + request.stopping.max_new_tokens
        self.stop_ids = frozenset(self.request.stopping.stop_ids)

    @property
    def num_blocks(self) -> int:
        """Number of blocks that it holds, over all tables."""
        return sum(map(len, self.blocks))

    def hash_blocks(self, count: int, block_size: int) -> None:
        """Extend `hashes` to the first `count` blocks, which must be full."""
        begin = len(self.hashes)
        if begin < count:
            parent = self.hashes[-1] if begin else chain_root(self.request.salt)
            self.hashes += chain_hashes(parent, self.token_ids[begin * block_size : count * block_size], block_size)

    def hashes_of(self, first: int, last: int, block_size: int) -> Iterator[bytes]:
        """Yield the hashes of the blocks `first` to `last` - 1, up to the last full block.

        They are computed lazily, so a cache miss stops the hashing.
        """
        last = min(last, len(self.token_ids) // block_size)
        while first < last:
            self.hash_blocks(min(first + _AHEAD, last), block_size)
            made = self.hashes[first:last]
            yield from made
            first += len(made)

    def hash_at(self, index: int, block_size: int) -> bytes:
        """Return the hash of one block, which must be full. Missing hashes of earlier blocks are computed too."""
        self.hash_blocks(index + 1, block_size)
        return self.hashes[index]

    def entries(self, start: int) -> list[tuple[int, int, int]]:
        """Return (slot, position, token id) for each entry of `token_ids` from position `start` on."""
        return [(self.slot, i, self.token_ids[i]) for i in range(start, len(self.token_ids))]

    def append(self, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        """Append tokens up to the first that ends the sequence.

        Return the appended tokens and the finish reason, "" if the sequence continues.
        """
        for count, token_id in enumerate(token_ids, 1):
            self.token_ids.append(token_id)
            if token_id in self.stop_ids:
                return token_ids[:count], "stop"
            if len(self.token_ids) == self.max_tokens:
                return token_ids[:count], "length"
        return token_ids, ""

    def output(
        self,
        token_ids: tuple[int, ...],
        details: TokenDetails | None = None,
        payload: Payload | None = None,
        message: str = "",
    ) -> Output:
        """Return the `Output` of a step that gave this sequence `token_ids`, `details` or `payload`."""
        return Output(
            self.id,
            token_ids,
            self.finish_reason,
            () if details is None else (details,),
            payload,
            num_preemptions=self.num_preemptions if self.finish_reason else 0,
            message=message,
        )

    def failure(self, message: str) -> Output:
        """Return the last `Output` of a sequence that failed, with the cause."""
        return Output(self.id, finish_reason="error", num_preemptions=self.num_preemptions, message=message)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Plan of one step: S rows, of which R sample, and the changes since the previous step. Never modified.

    Rows are sequences in order of admission. While no sequence joins or leaves, `slots` and `sequences` are the same
    objects as in the previous step. Use `slots[i]`, not `sequences[i].slot`: the sequence may have left that slot
    since.
    """

    slots: Int32  # (S,)
    starts: Int32  # (S,) first position to compute
    counts: Int32  # (S,) number of positions to compute, >= 1
    samples: Int32  # (R,) rows whose next token is sampled, ascending
    sequences: list[Sequence]  # by row
    admitted: list[Sequence]  # sequences that join in this step: the last rows
    blocks: Int32  # (n, 4) table, slot, index in that table, block: entries added since the last step
    num_tokens: int  # sum of `counts`
    num_prefill_rows: int  # rows that compute more than one token or do not sample
    number: int  # ordinal of the batch, from 1
    host_tokens: Int32  # (n, 3) slot, position, id: tokens not sampled on the device, added since the last step


class StepResult(Protocol):
    """Result of a step, on the host. `backends.base.StepResult` implements it."""

    @property
    def token_ids(self) -> list[int]:
        """One sampled id per entry of `Batch.samples`; -1: the logits of that row were not finite."""

    @property
    def details(self) -> list[TokenDetails | None] | None:
        """Log-probabilities per entry of `Batch.samples`, None for rows that did not request them."""

    @property
    def payloads(self) -> dict[int, Payload] | None:
        """Results other than tokens, by row of the batch. The engine passes them on without reading them."""
