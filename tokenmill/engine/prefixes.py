"""The blocks of sequences that the prefix cache holds, or will hold soon. Pure bookkeeping over the block pool."""

from __future__ import annotations

from collections import deque

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.sequence import Sequence


class PrefixCache:
    """The blocks that sequences offer each other. Offers of steps that did not run are taken back."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._offered: deque[list[int]] = deque()  # by step on the device: blocks published before it has filled them
        self.computing: list[Sequence] = []  # sequences that run and are not computed to `fill_end` yet

    def find(self, seq: Sequence) -> list[int]:
        """Return the blocks of `seq` that are cached and need not be computed. Takes nothing."""
        found = self._pool.match(seq.hashes_of(0, self._sharable(seq), self._pool.block_size))
        seq.num_found = len(found)
        return found

    def has_more(self, seq: Sequence) -> bool:
        """Return True if more blocks of `seq` are cached than `find` saw last."""
        found = seq.num_found
        last = min(found + 1, self._sharable(seq))
        return bool(self._pool.match(seq.hashes_of(found, last, self._pool.block_size)))

    def comes(self, seq: Sequence, found: int) -> bool:
        """Return True if one of `computing` will compute half or more of what `seq` lacks behind its cached blocks."""
        size = self._pool.block_size
        half = -(-(len(seq.token_ids) - found * size) // (2 * size))
        last = found + half  # equal hashes of the last block mean that all before it are equal
        if last > self._sharable(seq):
            return False
        return any(
            last <= other.fill_end // size
            and other.hash_at(found, size) == seq.hash_at(found, size)
            and other.hash_at(last - 1, size) == seq.hash_at(last - 1, size)
            for other in self.computing
        )

    def publish(self, seq: Sequence, computed: int) -> None:
        """Offer the full blocks of the first `computed` tokens, as far as the tokens are known."""
        size = self._pool.block_size
        full = min(len(seq.token_ids), computed) // size
        seq.hash_blocks(full, size)
        for index in range(seq.num_published, full):
            self._pool.publish(seq.blocks[index], seq.hashes[index])
        if self._offered:
            self._offered[-1] += seq.blocks[seq.num_published : full]
        seq.num_published = max(full, seq.num_published)
        seq.publish_at = (seq.num_published + 1) * size

    def planned(self) -> None:
        """Count a step as planned: what is offered from now on is its."""
        self._offered.append([])

    def passed(self) -> None:
        """Count the oldest planned step as run: what it computed is there."""
        self._offered.popleft()

    def retract(self, steps: int) -> None:
        """Take back what the newest planned steps offered."""
        for _ in range(steps):
            self._pool.unpublish(self._offered.pop())

    def _sharable(self, seq: Sequence) -> int:
        """Return how many blocks may be shared: one token must run at least, or there is nothing to sample from."""
        return 0 if seq.request.computes_whole_prompt else (len(seq.token_ids) - 1) // self._pool.block_size
