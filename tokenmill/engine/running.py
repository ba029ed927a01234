"""Running sequences: their slots, their blocks, and their progress in arrays by slot. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import ValuesView

import numpy as np

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.prefixes import Hit
from tokenmill.engine.sequence import Int32, Sequence, blocks_array
from tokenmill.engine.tables import UNBOUNDED, Tables


class Running:
    """The running sequences in order of admission, with their slots and blocks."""

    def __init__(self, pool: BlockPool, tables: Tables, size: int) -> None:
        self._pool = pool
        self._tables = tables
        self._by_id: dict[int, Sequence] = {}
        self._free_slots = list(range(size - 1, -1, -1))
        self.tokens = np.zeros(size, np.int32)  # by slot: tokens that exist on the host or on the device
        self.computed = np.zeros(size, np.int32)  # by slot: tokens whose KV entries a planned step writes
        self.max_computed = np.zeros(size, np.int32)  # by slot: tokens to compute until its end, all but the last one
        self.covered = np.zeros(size, np.int32)  # by slot: tokens that have a block in every table
        # By slot: number of the first batch that may compute its last token, which was sampled; 0: none was sampled yet
        self.ready_at = np.zeros(size, np.int32)
        self._expires_at = np.zeros(size, np.int32)  # by slot: computed tokens at which a block is not read any more
        # Sequences and slots as of `refresh`. Replaced, never modified: batches keep references to them.
        self.rows: list[Sequence] = []
        self.slots: Int32 = np.zeros(0, np.int32)
        self.changed = False  # True if a sequence joined or left since `refresh`
        self._entries: list[int] = []  # table, slot, index and block of each entry that was added since `refresh`

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
        """Begin the plan of a step: update `rows` and `slots`, clear the new block table entries, trim the tables."""
        self._entries = []
        if self.changed:
            self.rows = list(self._by_id.values())
            self.slots = np.array([seq.slot for seq in self.rows], np.int32)
            self.changed = False
        if self._tables.windowed:
            for row in np.flatnonzero(self.computed[self.slots] >= self._expires_at[self.slots]).tolist():
                self._trim(self.rows[row])

    def start(self, seq: Sequence, hit: Hit) -> None:
        """Start `seq` behind its cached prefix: assign a slot and share the prefix's blocks. `grow` must follow."""
        slot = self._free_slots.pop()
        self._by_id[seq.id] = seq
        self.changed = True
        num_cached = hit.length * self._pool.block_size
        seq.slot, seq.blocks, seq.firsts = slot, hit.blocks, self._tables.firsts(num_cached)
        seq.prefill_end = seq.num_tokens
        seq.num_published = hit.length
        seq.publish_at = num_cached + self._pool.block_size
        self.tokens[slot] = seq.num_tokens
        self.computed[slot] = num_cached
        self.max_computed[slot] = seq.max_tokens - 1
        self.ready_at[slot] = 0
        self._expires_at[slot] = self._tables.expires_at(seq.firsts)
        for table, blocks in enumerate(seq.blocks):
            self._pool.share(blocks)
            self._add_entries(table, slot, seq.firsts[table], blocks)

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Allocate the blocks that `seq` lacks in the next step of `num_tokens` tokens in all.

        Return False, without a change, if too few are free.
        """
        slot, ends = seq.slot, self._tables.ends(self.computed_of(seq), num_tokens)
        if len(ends) > 1 and self._num_lacking(seq, ends) > self._pool.num_free:
            return False
        covered = UNBOUNDED
        for table, end in enumerate(ends):
            blocks = seq.blocks[table]
            begin = seq.firsts[table] + len(blocks)
            if end > begin:
                fresh = self._pool.allocate(end - begin)
                if fresh is None:
                    return False
                self._add_entries(table, slot, begin, fresh)
                blocks += fresh
            else:
                end = begin
            if end < covered:
                covered = end
        self.covered[slot] = covered * self._pool.block_size
        return True

    def _num_lacking(self, seq: Sequence, ends: list[int]) -> int:
        """Return the number of blocks that `seq` lacks for tables which end at `ends`."""
        held = zip(ends, seq.firsts, seq.blocks, strict=True)
        return sum(max(end - first - len(blocks), 0) for end, first, blocks in held)

    def _add_entries(self, table: int, slot: int, first: int, blocks: list[int]) -> None:
        for index, block in enumerate(blocks, first):
            self._entries.extend((table, slot, index, block))

    def _trim(self, seq: Sequence) -> None:
        """Release the blocks of `seq` that no token reads any more.

        Steps that were launched may still read them. They can be reused at once all the same: steps run in order.
        """
        # An extension may void tokens that are not read back, and compute from the last known one on again.
        firsts = self._tables.firsts(min(self.computed_of(seq), len(seq.token_ids) - 1))
        for table, (before, first) in enumerate(zip(seq.firsts, firsts, strict=True)):
            if first > before:
                self._pool.release(seq.blocks[table][: first - before])
                del seq.blocks[table][: first - before]
                seq.firsts[table] = first
        self._expires_at[seq.slot] = self._tables.expires_at(seq.firsts)

    def release(self, seq: Sequence) -> None:
        """Free the slot and the blocks of `seq`.

        A launched step may still write to them. They can be reused at once all the same: steps run in order, so that
        write precedes all writes of later steps.
        """
        del self._by_id[seq.id]
        self.changed = True
        self._free_slots.append(seq.slot)
        for blocks in seq.blocks:
            self._pool.release(blocks)
        seq.slot, seq.blocks, seq.firsts = -1, [], []

    def entries(self) -> Int32:
        """Return (n, 4) table, slot, index in that table, block: the entries added since `refresh`."""
        return blocks_array(self._entries)

    def computed_of(self, seq: Sequence) -> int:
        """Return the number of tokens of `seq` that are computed once all planned steps have run."""
        return self.computed.item(seq.slot)
