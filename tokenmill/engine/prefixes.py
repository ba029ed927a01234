"""Prefix cache lookups and publication by sequence. Pure bookkeeping on top of the block pool."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.tables import UNBOUNDED, Tables

NEVER = 1 << 62
"""Length that no sequence reaches."""


class Hit(NamedTuple):
    """The cached prefix of a sequence."""

    length: int  # in blocks
    blocks: list[list[int]]  # by table: the cached blocks that later tokens read, of which the last ends the prefix

    @property
    def all(self) -> list[int]:
        """Blocks of all tables."""
        return [block for blocks in self.blocks for block in blocks]


class PrefixCache:
    """Blocks of sequences in the prefix cache. Blocks published for steps that did not run are removed again.

    A block of the first table is cached under the hash of its tokens, one of another table under that hash and the
    number of its table. If not `enabled`, nothing is published, so nothing is found.
    """

    def __init__(self, pool: BlockPool, tables: Tables, enabled: bool = True) -> None:
        self._pool, self._tables, self._enabled = pool, tables, enabled
        self._published: deque[list[int]] = deque()  # by step on the device: blocks that it will fill
        self.computing: list[Sequence] = []  # running sequences that are not computed up to `prefill_end` yet

    def match(self, seq: Sequence) -> Hit:
        """Return the longest prefix of `seq` that is cached and may be shared. Reference counts do not change.

        All its blocks are cached in tables without a window. In those with one, the blocks of the last window are.
        """
        count = self._num_sharable(seq)
        found: list[list[int]] = []
        for table, behind in enumerate(self._tables.behind):
            found.append(self._pool.match(self._keys(seq, table, 0, count)) if behind == UNBOUNDED else [])
            count = len(found[table]) if behind == UNBOUNDED else count
        if self._tables.windowed:
            count = self._num_in_windows(seq, count)
            for table, first in enumerate(self._tables.firsts(count * self._pool.block_size)):
                found[table] = self._pool.match(self._keys(seq, table, first, count))
        seq.num_matched = count
        return Hit(count, found)

    def has_more(self, seq: Sequence) -> bool:
        """Return True if more blocks of `seq` are cached than at the last `match`."""
        index = seq.num_matched
        return index < self._num_sharable(seq) and all(
            self._is_cached(seq, table, index) for table in range(len(self._tables.behind))
        )

    def is_being_computed(self, seq: Sequence, num_cached: int) -> bool:
        """Return True if a sequence of `computing` will compute at least half of the uncached tokens of `seq`.

        `num_cached`: number of its cached blocks.
        """
        size = self._pool.block_size
        half = -(-(len(seq.token_ids) - num_cached * size) // (2 * size))
        last = num_cached + half  # a hash covers all earlier blocks: comparing the last one suffices
        if last > self._num_sharable(seq):
            return False
        return any(
            last <= other.prefill_end // size
            and other.hash_at(num_cached, size) == seq.hash_at(num_cached, size)
            and other.hash_at(last - 1, size) == seq.hash_at(last - 1, size)
            for other in self.computing
        )

    def publish(self, seq: Sequence, computed: int) -> None:
        """Publish the full blocks of the first `computed` tokens, as far as their ids are on the host."""
        size = self._pool.block_size
        if not self._enabled:
            seq.publish_at = NEVER
            return
        full = min(len(seq.token_ids), computed) // size
        begin = seq.num_published
        if full <= begin:
            return
        seq.hash_blocks(full, size)
        for table, blocks in enumerate(seq.blocks):
            first = seq.firsts[table]
            start = begin if begin >= first else min(first, full)  # earlier blocks were released
            new, keys = blocks[start - first : full - first], seq.hashes[start:full]
            self._pool.publish(new, [key + bytes((table,)) for key in keys] if table else keys)
            if self._published:
                self._published[-1] += new
        seq.num_published = full
        seq.publish_at = (full + 1) * size

    def unpublish(self, seq: Sequence) -> None:
        """Remove the blocks that `seq` holds, and those that it held and released, from the prefix cache."""
        for table, (first, blocks) in enumerate(zip(seq.firsts, seq.blocks, strict=True)):
            self._pool.unpublish(blocks)
            if first:
                self._pool.unpublish(self._pool.find(self._keys(seq, table, 0, min(first, seq.num_published))))

    def begin_step(self) -> None:
        """Count a step as planned: blocks published from now on belong to it."""
        self._published.append([])

    def end_step(self) -> None:
        """Count the oldest planned step as run: its blocks are written."""
        self._published.popleft()

    def retract(self, steps: int) -> None:
        """Remove the blocks of the newest planned steps from the prefix cache."""
        for _ in range(steps):
            self._pool.unpublish(self._published.pop())

    def _num_sharable(self, seq: Sequence) -> int:
        """Return how many blocks may be shared: at least one token must run, because sampling needs its logits."""
        if not self._enabled or seq.request.computes_whole_prompt:
            return 0
        return (len(seq.token_ids) - 1) // self._pool.block_size

    def _num_in_windows(self, seq: Sequence, count: int) -> int:
        """Return the largest number of blocks, at most `count`, whose last windows are cached in all tables."""
        size, table = self._pool.block_size, 0
        while count and table < len(self._tables.behind):
            first = self._tables.firsts(count * size)[table]
            missing = -1 if self._tables.behind[table] == UNBOUNDED else self._last_missing(seq, table, first, count)
            # A prefix that ends behind a missing block has that block in its last window, unless it ends later.
            count, table = (missing, 0) if missing >= 0 else (count, table + 1)
        return count

    def _last_missing(self, seq: Sequence, table: int, first: int, last: int) -> int:
        """Return one of the blocks `first` to `last` - 1 that is not cached, preferably the first one; -1: none."""
        if first < last and not self._is_cached(seq, table, first):
            return first
        return next((index for index in range(last - 1, first, -1) if not self._is_cached(seq, table, index)), -1)

    def _is_cached(self, seq: Sequence, table: int, index: int) -> bool:
        return bool(self._pool.match(self._keys(seq, table, index, index + 1)))

    def _keys(self, seq: Sequence, table: int, first: int, last: int) -> Iterable[bytes]:
        """Return the keys of the blocks `first` to `last` - 1 of a table, made as they are needed."""
        hashes = seq.hashes_of(first, last, self._pool.block_size)
        return (key + bytes((table,)) for key in hashes) if table else hashes
