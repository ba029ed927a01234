"""Division of an axis among ranks: rows or columns of a weight, or the columns of a value.

An axis consists of units that are not separated, such as heads. Every rank has the same number of places for units, so
that all ranks run the same program. A place without a unit holds zeros.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import NamedTuple

Heads = tuple[int, int]
"""Number of query heads, and number of key-value heads, each of which serves as many adjacent query heads"""

_UNITS = (128, 64, 32, 16, 8, 4, 2)


class Span(NamedTuple):
    """Adjacent elements of an axis; or, if `first` is negative, as many places that hold zeros."""

    first: int
    size: int

    @property
    def empty(self) -> bool:
        """True for places that hold zeros."""
        return self.first < 0


class Axis(NamedTuple):
    """Axis of `size` elements. `unit`: of adjacent ones that stay together. `heads`: (0, 0) if units are not heads.

    The units of an axis with heads are all its query heads or all its key-value heads.
    """

    size: int
    unit: int = 1
    heads: Heads = (0, 0)

    @property
    def units(self) -> int:
        """Number of units."""
        return self.size // self.unit

    def places(self, ranks: int) -> int:
        """Return the number of places that a rank has for units."""
        if not self.heads[1]:
            return _ceil(self.units, ranks)
        places, each = grouping(self.heads, ranks)
        return places * each if self.units == self.heads[0] else places

    def share(self, ranks: int) -> int:
        """Return the number of elements that a rank holds, zeros included."""
        axis = self.in_blocks(ranks)
        return axis.places(ranks) * axis.unit

    def in_blocks(self, ranks: int) -> Axis:
        """Return the same axis in units of up to 128 adjacent elements, if it has no units of its own.

        Elements that share a scale then rarely belong to two ranks. The units divide the axis. Units of 32 are taken
        where that is possible, others where they cost few zeros.
        """
        if self.unit > 1 or self.heads[1]:
            return self
        least = _ceil(self.size, ranks)
        fits = (n for n in _UNITS if self.size % n == 0 and (n == 32 or _ceil(least, n) * n - least <= least // 16))
        return self._replace(unit=next(fits, 1))

    def repeated(self, ranks: int) -> int:
        """Return the number of places, on all ranks, of each unit."""
        if not self.heads[1] or self.units == self.heads[0]:
            return 1
        return _ceil(self.heads[0] // self.heads[1], grouping(self.heads, ranks)[1])

    def spans(self, ranks: int, rank: int) -> tuple[Span, ...]:
        """Return what a rank holds, in order."""
        return _spans(self.in_blocks(ranks), ranks, rank)

    def step(self, ranks: int) -> int:
        """Return the largest number that divides the borders of what all ranks hold, and the axis."""
        spans = (span for rank in range(ranks) for span in self.spans(ranks, rank))
        return gcd(self.size, *(n for span in spans for n in (max(span.first, 0), span.size)))

    def padded(self, ranks: int) -> bool:
        """Return True if a rank holds zeros."""
        return any(span.empty for rank in range(ranks) for span in self.spans(ranks, rank))


@cache
def grouping(heads: Heads, ranks: int) -> tuple[int, int]:
    """Return the number of places for key-value heads on a rank, and of those for query heads at each of them.

    A key-value head has several places if its query heads are divided among them. Of all such divisions, this one has
    the smallest products.
    """
    queries, keys = heads
    per = queries // keys

    def places(each: int) -> int:
        return _ceil(keys * _ceil(per, each), ranks)

    each = min(range(1, per + 1), key=lambda n: (places(n) * (n + 1), places(n)))
    return places(each), each


@cache
def _spans(axis: Axis, ranks: int, rank: int) -> tuple[Span, ...]:
    if axis.heads[1]:
        return _merged(_heads(axis, ranks, rank), axis.unit)
    share = axis.share(ranks)
    real = min(max(axis.size - rank * share, 0), share)
    spans = Span(rank * share, real), Span(-1, share - real)
    return tuple(span for span in spans if span.size)


def _heads(axis: Axis, ranks: int, rank: int) -> list[int]:
    """Return the head at each place of a rank; -1: none."""
    (queries, keys), (places, each) = axis.heads, grouping(axis.heads, ranks)
    per = queries // keys
    chunks = _ceil(per, each)
    found = []
    for place in range(rank * places, (rank + 1) * places):
        head, chunk = divmod(place, chunks)
        if axis.units == queries:
            within = range(chunk * each, (chunk + 1) * each)
            found += [head * per + i if head < keys and i < per else -1 for i in within]
        else:
            found.append(head if head < keys else -1)
    return found


def _merged(places: list[int], unit: int) -> tuple[Span, ...]:
    spans: list[Span] = []
    for head in places:
        last = spans[-1] if spans else None
        if last is not None and (last.empty if head < 0 else last.first + last.size == head * unit):
            spans[-1] = last._replace(size=last.size + unit)
        else:
            spans.append(Span(head * unit if head >= 0 else -1, unit))
    return tuple(spans)


def _ceil(n: int, by: int) -> int:
    return -(-n // by)
