"""Prefix cache lookups and publication by sequence. Pure bookkeeping on top of the block pool."""

from __future__ import annotations

from collections import deque

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.sequence import Sequence

NEVER = 1 << 62
"""Length that no sequence reaches."""


class PrefixCache:
    """Blocks of sequences in the prefix cache. Blocks published for steps that did not run are removed again.

    If not `enabled`, nothing is published, so nothing is found.
    """

    def __init__(self, pool: BlockPool, enabled: bool = True) -> None:
        self._pool, self._enabled = pool, enabled
        self._published: deque[list[int]] = deque()  # by step on the device: blocks that it will fill
        self.computing: list[Sequence] = []  # running sequences that are not computed up to `prefill_end` yet

    def match(self, seq: Sequence) -> list[int]:
        """Return the leading blocks of `seq` that are cached and may be shared. Reference counts do not change."""
        cached = self._pool.match(seq.hashes_of(0, self._num_sharable(seq), self._pool.block_size))
        seq.num_matched = len(cached)
        return cached

    def has_more(self, seq: Sequence) -> bool:
        """Return True if more blocks of `seq` are cached than at the last `match`."""
        num_cached = seq.num_matched
        last = min(num_cached + 1, self._num_sharable(seq))
        return bool(self._pool.match(seq.hashes_of(num_cached, last, self._pool.block_size)))

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
        seq.hash_blocks(full, size)
        for index in range(seq.num_published, full):
            self._pool.publish(seq.blocks[index], seq.hashes[index])
        if self._published:
            self._published[-1] += seq.blocks[seq.num_published : full]
        seq.num_published = max(full, seq.num_published)
        seq.publish_at = (seq.num_published + 1) * size

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
