"""Sequences that run: each has a slot and blocks; how far each is stands in arrays by slot. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import ValuesView

import numpy as np

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.sequence import Int32, Sequence, entries_array


class Running:
    """The sequences by id, in order of admission, and their slots."""

    def __init__(self, pool: BlockPool, size: int) -> None:
        self._pool = pool
        self._by_id: dict[int, Sequence] = {}
        self._free_slots = list(range(size - 1, -1, -1))
        self.tokens = np.zeros(size, np.int32)  # by slot: tokens known here or on the device
        self.computed = np.zeros(size, np.int32)  # by slot: tokens whose cache entries a launched step has written
        self.last = np.zeros(size, np.int32)  # by slot: tokens ever to compute; the last one is only sampled
        self.held = np.zeros(size, np.int32)  # by slot: blocks
        # the sequences as a list and its slots: made anew when it changed, never written to, for batches hold them
        self.rows: list[Sequence] = []
        self.slots: Int32 = np.zeros(0, np.int32)
        self.changed = False  # since `refresh`
        self._entries: list[tuple[int, int, int]] = []  # of block tables, new in the step being planned

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._by_id

    def get(self, request_id: int) -> Sequence | None:
        """Return the sequence of this id; None if it does not run."""
        return self._by_id.get(request_id)

    def values(self) -> ValuesView[Sequence]:
        """Return all of them, in order of admission."""
        return self._by_id.values()

    @property
    def num_free(self) -> int:
        """The number of sequences that may join."""
        return len(self._free_slots)

    def refresh(self) -> None:
        """Begin a step: `rows` and `slots` are those that run now, in order of admission."""
        self._entries = []
        if self.changed:
            self.rows = list(self._by_id.values())
            self.slots = np.array([seq.slot for seq in self.rows], np.int32)
            self.changed = False

    def start(self, seq: Sequence, cached: list[int], fresh: list[int]) -> None:
        """Give `seq` a slot, and blocks for all its tokens, of which the first are cached."""
        slot = self._free_slots.pop()
        self._by_id[seq.id] = seq
        self.changed = True
        num_cached = len(cached) * self._pool.block_size
        seq.slot, seq.blocks = slot, cached + fresh
        seq.fill_end = seq.num_tokens
        seq.num_published = len(cached)
        seq.publish_at = num_cached + self._pool.block_size
        self.tokens[slot] = seq.num_tokens
        self.computed[slot] = num_cached
        self.last[slot] = seq.max_tokens - 1
        self.held[slot] = len(seq.blocks)
        self._entries += [(slot, index, block) for index, block in enumerate(seq.blocks)]

    def grow(self, seq: Sequence, need: int) -> bool:
        """Give `seq` that many more blocks; False, and nothing done, if there are too few."""
        fresh = self._pool.allocate(need)
        if fresh is None:
            return False
        held = len(seq.blocks)
        self._entries += [(seq.slot, held + index, block) for index, block in enumerate(fresh)]
        seq.blocks += fresh
        self.held[seq.slot] = held + need
        return True

    def release(self, seq: Sequence) -> None:
        """Take slot and blocks from `seq`.

        A launched step may still write to them. They can be handed on all the same: steps run in order, so that write
        lands before any later step's.
        """
        del self._by_id[seq.id]
        self.changed = True
        self._free_slots.append(seq.slot)
        self._pool.release(seq.blocks)
        seq.slot, seq.blocks = -1, []

    def entries(self) -> Int32:
        """Return (n, 3) slot, index in its table, block: entries of block tables that are new since `refresh`."""
        return entries_array(self._entries)

    def computed_of(self, seq: Sequence) -> int:
        """Return how many tokens of `seq` are computed once all planned steps have run."""
        return int(self.computed[seq.slot])
