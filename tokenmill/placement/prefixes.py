"""PrefixIndex: an approximate index of the prefixes that replicas have in their caches, from what was sent to them.

It follows the replicas' own eviction without messages from them. Each replica has a count of the tokens that it had to
compute so far, and an entry of the index holds that count as of its last use. Once a replica has computed as many
further tokens as its cache holds, least-recently-used eviction has reached the entry: it is dead, and is dropped when
it is met. A replica that restarts gets a new number, so everything of the old number is dead at once.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from random import Random

from tokenmill.placement.prompt import EDGES, Prompt

Holders = dict[int, int]
"""Replicas that hold a prefix: number of the replica -> its count of computed tokens at the last use."""

_TRIES = 4  # holders looked at for a live one
_SWEPT = 2  # oldest keys looked at for each key that is recorded


class PrefixIndex:
    """Prefixes by key, least recently used first; at most `max_keys`, of which each takes about 200 bytes."""

    def __init__(self, max_keys: int) -> None:
        self._max_keys = max_keys
        # One holder, which is the rule, is kept as (number, count), because a dict takes four times the memory.
        self._holders: OrderedDict[bytes, Holders | tuple[int, int]] = OrderedDict()
        self._computed: dict[int, int] = {}  # by replica: tokens computed so far
        self._capacity: dict[int, int] = {}  # by replica: tokens that its cache holds

    def __len__(self) -> int:
        return len(self._holders)

    def join(self, number: int, capacity: int) -> None:
        """Add a replica with an empty cache of `capacity` tokens. `number` must never have been used before."""
        self._computed[number], self._capacity[number] = 0, capacity

    def leave(self, number: int) -> None:
        """Remove a replica with all that it holds."""
        del self._computed[number], self._capacity[number]

    def match(self, prompt: Prompt) -> Match:
        """Return the replicas that hold prefixes of `prompt`, by length of the prefix."""
        levels = []
        for key in prompt.keys:
            entry = self._holders.get(key)
            if entry is None:
                break
            levels.append({entry[0]: entry[1]} if isinstance(entry, tuple) else entry)
        return Match(self, levels)

    def record(self, number: int, prompt: Prompt, num_cached: int) -> None:
        """Record that a replica computes `prompt` without its first `num_cached` tokens, and caches all of it."""
        self.advance(number, prompt.num_tokens - num_cached)
        count, holders = self._computed[number], self._holders
        for key in reversed(prompt.keys):  # the tail of a sequence is evicted before its head
            entry = holders.get(key)
            if entry is None or (isinstance(entry, tuple) and (entry[0] == number or not self.is_live(*entry))):
                holders[key] = (number, count)
            elif isinstance(entry, tuple):
                holders[key] = {entry[0]: entry[1], number: count}
            else:
                entry[number] = count
            holders.move_to_end(key)
        self._sweep(_SWEPT * len(prompt.keys))

    def advance(self, number: int, num_tokens: int) -> None:
        """Record that a replica has computed tokens that are not looked up, such as those of an answer."""
        self._computed[number] += num_tokens

    def is_live(self, number: int, count: int) -> bool:
        """Return True if an entry of a replica, last used at `count`, is probably still in its cache."""
        computed = self._computed.get(number)
        return computed is not None and computed - count <= self._capacity[number]

    def _sweep(self, most: int) -> None:
        """Drop keys beyond `max_keys`, and up to `most` of the least recently used ones that are dead."""
        while len(self._holders) > self._max_keys:
            self._holders.popitem(last=False)
        for _ in range(min(most, len(self._holders))):
            entry = next(iter(self._holders.values()))
            pairs = (entry,) if isinstance(entry, tuple) else entry.items()
            if any(self.is_live(*pair) for pair in pairs):
                return
            self._holders.popitem(last=False)


class Match:
    """The replicas that hold prefixes of one prompt. Valid until the index changes."""

    def __init__(self, index: PrefixIndex, levels: list[Holders]) -> None:
        """Make a match. `levels[i]`: holders of the first `EDGES[i]` tokens."""
        self._index, self._levels = index, levels

    def num_cached(self, number: int) -> int:
        """Return the length in tokens of the longest prefix that a replica holds.

        A replica that holds a prefix holds all shorter ones, so bisection finds it.
        """
        low, high = 0, len(self._levels)
        while low < high:
            middle = (low + high) // 2
            count = self._levels[middle].get(number)
            if count is not None and self._index.is_live(number, count):
                low = middle + 1
            else:
                high = middle
        return EDGES[low - 1] if low else 0

    def candidates(self, random: Random) -> list[int]:
        """Return up to two holders of the longest prefix, and up to two of the longest one that more replicas hold."""
        levels = self._levels
        found: list[int] = []
        depth = len(levels)
        while depth and not found:  # a level whose holders are all dead is passed
            depth -= 1
            found = self._some(levels[depth], random)
        if found:
            width = len(levels[depth])
            wider = next((level for level in reversed(levels[:depth]) if len(level) > width), None)
            found += self._some(wider, random) if wider else []
        return found

    def _some(self, holders: Holders, random: Random) -> list[int]:
        """Return up to two live holders, drawn at random. Dead ones that are met are dropped."""
        found: list[int] = []
        for _ in range(_TRIES):
            if not holders or len(found) == 2:
                break
            number, count = next(islice(holders.items(), random.randrange(len(holders)), None))
            if not self._index.is_live(number, count):
                del holders[number]
            elif number not in found:
                found.append(number)
        return found
