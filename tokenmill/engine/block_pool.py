"""Which cache blocks are free, shared or cached. Pure bookkeeping: no device, no clock.

A full block is known by the hash of its tokens and of every block before it, so equal prefixes meet in the same
block: the hash chain is the prefix tree. A block that nobody uses keeps its hash and waits in the free list, oldest
first, until it is taken again (a cache hit) or overwritten.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Items
from hashlib import blake2b


def chain_root(salt: bytes) -> bytes:
    """What the first block's hash takes for its parent's. Different salts never meet in a block."""
    return blake2b(salt, digest_size=16, person=b"salt").digest() if salt else b""


def chain_hashes(parent: bytes, token_ids: Items[int], block_size: int) -> list[bytes]:
    """16-byte hashes of full blocks of tokens in a row, given that of the block before. Collisions are taken as
    impossible (128 bits)."""
    data, step = array("I", token_ids).tobytes(), 4 * block_size
    hashes: list[bytes] = []
    for start in range(0, len(data), step):
        parent = blake2b(parent + data[start : start + step], digest_size=16).digest()
        hashes.append(parent)
    return hashes


class BlockPool:
    """`num_blocks` cache blocks of `block_size` tokens: how often each is used and which hash it is known by."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.refs = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # its head is reused first

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give, cached ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that a sequence holds."""
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that a later sequence could share."""
        return len(self._block_of)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The longest cached prefix of `hashes`, as blocks. Takes nothing."""
        found: list[int] = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def unused(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody uses: `share` would take them from the free ones."""
        refs = self.refs
        return sum(refs[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Use `blocks`, found by `match`, once more."""
        for block in blocks:
            if self.refs[block] == 0:
                del self._free[block]
            self.refs[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, forgetting what the oldest free ones cached; None, nothing taken, if too few are."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self.refs[block] = 1
        return blocks

    def release(self, blocks: Items[int]) -> None:
        """Give blocks back, last one first, so that a sequence's tail is reused before its head."""
        for block in reversed(blocks):
            self.refs[block] -= 1
            if self.refs[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)  # holds nothing worth keeping

    def publish(self, block: int, key: bytes) -> None:
        """Let later sequences find this full block. The first block published under a hash stays."""
        if key not in self._block_of and self._hash_of[block] is None:
            self._block_of[key] = block
            self._hash_of[block] = key

    def unpublish(self, blocks: Iterable[int]) -> None:
        """Let nobody find these blocks any more: what they hold is worthless."""
        for block in blocks:
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self._hash_of[block]
        if key is not None:
            self._hash_of[block] = None
            del self._block_of[key]

    def check(self) -> None:
        """Raise AssertionError if the books do not balance. For tests and idle moments: it looks at every block."""
        assert all((self.refs[block] == 0) == (block in self._free) for block in range(self.num_blocks))
        assert all(self._hash_of[block] == key for key, block in self._block_of.items())
        assert sum(key is not None for key in self._hash_of) == len(self._block_of)
