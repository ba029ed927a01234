"""KV cache blocks: free, in use or cached. Pure bookkeeping: no device, no clock.

A full block is identified by the hash of its tokens and of all blocks before it, so equal prefixes share blocks: the
hash chain acts as a prefix tree. A block without users keeps its hash in the free list, which is reused from the oldest
entry on, until it is shared again (a cache hit) or allocated anew.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Items
from hashlib import blake2b


def chain_root(salt: bytes) -> bytes:
    """Return the parent hash of first blocks. Requests with different salts never share a block."""
    return blake2b(salt, digest_size=16, person=b"salt").digest() if salt else b""


def chain_hashes(parent: bytes, token_ids: Items[int], block_size: int) -> list[bytes]:
    """Return 16-byte hashes of consecutive full blocks. `parent`: hash of the block before them.

    Collisions of 128-bit hashes are assumed not to occur.
    """
    data, step = array("I", token_ids).tobytes(), 4 * block_size
    hashes: list[bytes] = []
    for start in range(0, len(data), step):
        parent = blake2b(parent + data[start : start + step], digest_size=16).digest()
        hashes.append(parent)
    return hashes


class BlockPool:
    """Reference counts and hashes of `num_blocks` KV cache blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.refs = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # reused from its head on

    @property
    def num_free(self) -> int:
        """Number of blocks that can be allocated, including cached blocks without users."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Number of blocks that sequences hold."""
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Number of blocks that a new sequence could share."""
        return len(self._block_of)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest cached prefix of `hashes`. Reference counts do not change."""
        found: list[int] = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Return the cached blocks among those of `keys`."""
        return [block for key in keys if (block := self._block_of.get(key)) is not None]

    def unused(self, blocks: Iterable[int]) -> int:
        """Return how many of `blocks` have no users: `share` would remove them from the free list."""
        refs = self.refs
        return sum(refs[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Add one user to each of `blocks`, which `match` returned."""
        for block in blocks:
            if self.refs[block] == 0:
                del self._free[block]
            self.refs[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """Allocate `count` blocks and evict their cached content, the oldest free blocks first.

        Return None, without a change, if fewer are free.
        """
        if count > len(self._free):
            return None
        blocks: list[int] = []
        for _ in range(count):
            block = self._free.popitem(last=False)[0]
            if self._hash_of[block] is not None:
                self._evict(block)
            self.refs[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Items[int]) -> None:
        """Remove one user from each of `blocks`, last to first: the tail of a sequence is evicted before its head."""
        for block in reversed(blocks):
            self.refs[block] -= 1
            if self.refs[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)  # not cached: reuse it first

    def publish(self, blocks: list[int], keys: list[bytes]) -> None:
        """Cache full blocks under their hashes, so that later sequences can share them.

        If another block is cached under a hash, that one stays.
        """
        for block, key in zip(blocks, keys, strict=True):
            if key not in self._block_of and self._hash_of[block] is None:
                self._block_of[key] = block
                self._hash_of[block] = key

    def unpublish(self, blocks: Iterable[int]) -> None:
        """Remove blocks with invalid content from the prefix cache. Reference counts do not change."""
        for block in blocks:
            self._evict(block)

    def _evict(self, block: int) -> None:
        key = self._hash_of[block]
        if key is not None:
            self._hash_of[block] = None
            del self._block_of[key]

    def check(self) -> None:
        """Raise AssertionError if the internal state is inconsistent. For tests: its time grows with the pool."""
        assert all((self.refs[block] == 0) == (block in self._free) for block in range(self.num_blocks))
        assert all(self._hash_of[block] == key for key, block in self._block_of.items())
        assert sum(key is not None for key in self._hash_of) == len(self._block_of)
