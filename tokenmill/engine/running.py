"""Running sequences: their slots, their blocks, and their progress in arrays by slot. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import ValuesView

import numpy as np

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.sequence import Int32, Sequence, entries_array


class Running:
    """The running sequences in order of admission, with their slots and blocks."""

    def __init__(self, pool: BlockPool, size: int) -> None:
        self._pool = pool
        self._by_id: dict[int, Sequence] = {}
        self._free_slots = list(range(size - 1, -1, -1))
        self.tokens = np.zeros(size, np.int32)  # by slot: tokens that exist on the host or on the device
        self.computed = np.zeros(size, np.int32)  # by slot: tokens whose KV entries a planned step writes
        self.max_computed = np.zeros(size, np.int32)  # by slot: tokens to compute until its end, all but the last one
        self.num_blocks = np.zeros(size, np.int32)  # by slot: number of blocks
        # Sequences and slots as of `refresh`. Replaced, never modified: batches keep references to them.
        self.rows: list[Sequence] = []
        self.slots: Int32 = np.zeros(0, np.int32)
        self.changed = False  # True if a sequence joined or left since `refresh`
        self._entries: list[tuple[int, int, int]] = []  # slot, index in its block table, block: added since `refresh`

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._by_id

    def get(self, request_id: int) -> Sequence | None:
        """Return the sequence with this id; None if it is not running."""
        return self._by_id.get(request_id)

    def values(self) -> ValuesView[Sequence]:
        """Return all running sequences, in order of admission."""
        return self._by_id.values()

    @property
    def num_free(self) -> int:
        """Number of free slots."""
        return len(self._free_slots)

    def refresh(self) -> None:
        """Begin the plan of a step: update `rows` and `slots`, and clear the new block table entries."""
        self._entries = []
        if self.changed:
            self.rows = list(self._by_id.values())
            self.slots = np.array([seq.slot for seq in self.rows], np.int32)
            self.changed = False

    def start(self, seq: Sequence, cached: list[int], fresh: list[int]) -> None:
        """Start `seq`: assign a slot and its blocks, first those of the cached prefix, then newly allocated ones."""
        slot = self._free_slots.pop()
        self._by_id[seq.id] = seq
        self.changed = True
        num_cached = len(cached) * self._pool.block_size
        seq.slot, seq.blocks = slot, cached + fresh
        seq.prefill_end = seq.num_tokens
        seq.num_published = len(cached)
        seq.publish_at = num_cached + self._pool.block_size
        self.tokens[slot] = seq.num_tokens
        self.computed[slot] = num_cached
        self.max_computed[slot] = seq.max_tokens - 1
        self.num_blocks[slot] = len(seq.blocks)
        self._entries += [(slot, index, block) for index, block in enumerate(seq.blocks)]

    def grow(self, seq: Sequence, need: int) -> bool:
        """Allocate `need` more blocks for `seq`. Return False, without a change, if too few are free."""
        fresh = self._pool.allocate(need)
        if fresh is None:
            return False
        held = len(seq.blocks)
        self._entries += [(seq.slot, held + index, block) for index, block in enumerate(fresh)]
        seq.blocks += fresh
        self.num_blocks[seq.slot] = held + need
        return True

    def release(self, seq: Sequence) -> None:
        """Free the slot and the blocks of `seq`.

        A launched step may still write to them. They can be reused at once all the same: steps run in order, so that
        write precedes all writes of later steps.
        """
        del self._by_id[seq.id]
        self.changed = True
        self._free_slots.append(seq.slot)
        self._pool.release(seq.blocks)
        seq.slot, seq.blocks = -1, []

    def entries(self) -> Int32:
        """Return (n, 3) slot, index in its block table, block: the entries added since `refresh`."""
        return entries_array(self._entries)

    def computed_of(self, seq: Sequence) -> int:
        """Return the number of tokens of `seq` that are computed once all planned steps have run."""
        return int(self.computed[seq.slot])
