"""Block tables of a sequence: the blocks that each of them must hold. Pure arithmetic.

Every sequence has the same tables, and all their blocks come from one pool. A table without a window holds the blocks
of all tokens. One with a window holds those that the next tokens read, and those that they write in the next step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as Items
from typing import NamedTuple

UNBOUNDED = 1 << 30
"""More tokens, and more blocks, than any sequence has."""


class Tables(NamedTuple):
    """Sizes of the tables. All tuples are by table."""

    block_size: int
    behind: tuple[int, ...]  # blocks that a token reads besides its own; UNBOUNDED: all earlier ones
    ahead: tuple[int, ...]  # tokens for which blocks are held before they are computed
    most: tuple[int, ...]  # blocks that a sequence holds at most
    windowed: bool  # True if a table has a window

    @staticmethod
    def of(windows: Items[int], block_size: int, max_batch_tokens: int) -> Tables:
        """Return the tables for `windows`: tokens that a token attends to, its own included; 0: all tokens."""
        behind = tuple(-(-(window - 1) // block_size) if window else UNBOUNDED for window in windows)
        ahead = tuple(max_batch_tokens if window else UNBOUNDED for window in windows)
        step = -(-max_batch_tokens // block_size)
        most = tuple(blocks + step + 1 if window else UNBOUNDED for window, blocks in zip(windows, behind, strict=True))
        return Tables(block_size, behind, ahead, most, any(windows))

    def firsts(self, position: int) -> list[int]:
        """Return the first block by table that tokens from `position` on read."""
        if not self.windowed:
            return [0] * len(self.behind)
        own = position // self.block_size
        return [max(own - blocks, 0) for blocks in self.behind]

    def ends(self, start: int, num_tokens: int) -> list[int]:
        """Return the end of each table of a sequence of `num_tokens` tokens before a step that begins at `start`."""
        size = self.block_size
        if not self.windowed:
            return [-(-num_tokens // size)] * len(self.ahead)
        return [-(-min(num_tokens, start + tokens) // size) for tokens in self.ahead]

    def expires_at(self, firsts: Items[int]) -> int:
        """Return the first position from which on one of the blocks `firsts` is not read any more."""
        if not self.windowed:
            return UNBOUNDED
        blocks = min(first + behind + 1 for first, behind in zip(firsts, self.behind, strict=True))
        return min(blocks * self.block_size, UNBOUNDED)

    def blocks_of(self, num_tokens: int) -> int:
        """Return how many blocks a sequence holds at most, over all tables, until it has `num_tokens` tokens."""
        blocks = -(-num_tokens // self.block_size)
        if not self.windowed:
            return blocks * len(self.most)
        return sum(min(blocks, most) for most in self.most)

    def longest(self, num_blocks: int, max_tokens: int) -> int:
        """Return the tokens of the longest sequence that `num_blocks` blocks hold, at most `max_tokens`."""
        size = self.block_size
        lengths = range(-(-max_tokens // size) + 1)
        return min(max_tokens, (bisect_right(lengths, num_blocks, key=lambda n: self.blocks_of(n * size)) - 1) * size)
