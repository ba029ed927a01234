"""A request while it runs, and the plan of one step."""

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
_AHEAD = 32  # blocks that are hashed together


def entries_array(entries: list[tuple[int, int, int]]) -> Int32:
    """Return a batch's entries as an array (n, 3); do not write to it, the one without entries is shared."""
    return np.array(entries, np.int32) if entries else _NO_ENTRIES


@dataclass(eq=False, slots=True)
class Sequence:
    """One request's state. Only the scheduler changes it; how far it is on the device stands in the scheduler's arrays.

    A token sampled on the device and not read back yet is not in `token_ids`: its value is not needed to plan the step
    that consumes it.
    """

    request: Request
    id: int = field(init=False)  # the request's
    token_ids: list[int] = field(init=False)  # prompt and tokens read back
    max_tokens: int = field(init=False)  # prompt and wanted tokens
    stop_ids: frozenset[int] = field(init=False)
    num_tokens: int = field(init=False)  # while it waits: len(token_ids) + tokens still on the device
    arrival: int = 0  # requests are counted as they are added: the smaller one is older
    slot: int = -1  # row of the device's per-sequence state; -1 while it waits
    blocks: list[int] = field(default_factory=list)
    fill_end: int = 0  # tokens known at its last admission: until they are computed it does not sample
    hashes: list[bytes] = field(default_factory=list)  # of the first blocks of `token_ids`, as far as needed
    num_found: int = 0  # leading blocks that were cached when this was last looked up
    num_published: int = 0  # leading blocks offered to the prefix cache
    publish_at: int = 0  # len(token_ids) at which there is another block to offer
    num_preemptions: int = 0
    valid_from: int = 0  # number of the first batch whose tokens count: earlier ones were overtaken by `Extend`
    was_admitted: bool = False
    finish_reason: str = ""  # "" while it lives; "stop", "length", "error", "abort"

    def __post_init__(self) -> None:
        self.id = self.request.id
        self.token_ids = list(self.request.prompt_ids)
        self.num_tokens = len(self.token_ids)
        self.max_tokens = self.num_tokens + self.request.stopping.max_new_tokens
        self.stop_ids = frozenset(self.request.stopping.stop_ids)

    def hash_blocks(self, count: int, block_size: int) -> None:
        """Make `hashes` of the first `count` blocks, which are full, unless it has been done."""
        begin = len(self.hashes)
        if begin < count:
            parent = self.hashes[-1] if begin else chain_root(self.request.salt)
            self.hashes += chain_hashes(parent, self.token_ids[begin * block_size : count * block_size], block_size)

    def hashes_of(self, first: int, last: int, block_size: int) -> Iterator[bytes]:
        """Hashes of blocks in a row, up to the last full one, made as they are looked at: who misses one needs no more.
        """
        last = min(last, len(self.token_ids) // block_size)
        while first < last:
            self.hash_blocks(min(first + _AHEAD, last), block_size)
            made = self.hashes[first:last]
            yield from made
            first += len(made)

    def hash_at(self, index: int, block_size: int) -> bytes:
        """The hash of one block, which is full, made if need be together with those before it."""
        self.hash_blocks(index + 1, block_size)
        return self.hashes[index]

    def entries(self, start: int) -> list[tuple[int, int, int]]:
        """Its slot, position and token, for all that are known here from `start` on."""
        return [(self.slot, i, self.token_ids[i]) for i in range(start, len(self.token_ids))]

    def append(self, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        """Take in tokens up to the first that ends it: those that it took, and the reason, "" if it goes on."""
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
        """What it was given."""
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
        """Its end, for a reason of its own."""
        return Output(self.id, finish_reason="error", num_preemptions=self.num_preemptions, message=message)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One step's plan, as arrays and differences. Nobody writes to it.

    Rows are sequences in order of admission; S rows, R of them sample. While nobody joins or leaves, `slots` and
    `sequences` are the same objects as in the step before. `sequences[i].slot` may already be another: `slots[i]`
    counts.
    """

    slots: Int32  # (S,)
    starts: Int32  # (S,) first position to compute
    counts: Int32  # (S,) how many, >= 1
    samples: Int32  # (R,) rows whose next token is sampled, ascending
    sequences: list[Sequence]  # by row
    admitted: list[Sequence]  # given a slot in this step; all of them are rows, the last ones
    blocks: Int32  # (n, 3) slot, index in its table, block: entries new since the last step
    num_tokens: int  # sum of `counts`
    num_prefill_rows: int  # rows that compute more than one token or do not sample
    number: int  # batches are counted as they are planned
    host_tokens: Int32  # (n, 3) slot, position, id: not sampled on the device; new since the last step


class StepResult(Protocol):
    """What came of a step, on the host. `backends.base.StepResult` is one."""

    @property
    def token_ids(self) -> list[int]:
        """One a sampling row, in the order of `Batch.samples`; -1: the row's logits were not finite."""

    @property
    def details(self) -> list[TokenDetails | None] | None:
        """One a sampling row, None where nobody asked."""

    @property
    def payloads(self) -> dict[int, Payload] | None:
        """Results beside tokens, by row of the batch; handed on unread."""
