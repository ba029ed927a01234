"""Sequences that wait to run, in lines of about the same size, and the order in which prompts are computed.

A size class holds sizes of less than double its smallest: within it the order is that of arrival.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import merge
from typing import NamedTuple

from tokenmill.engine.sequence import Sequence


class Prompt(NamedTuple):
    """A sequence that is not computed as far as it is known. Sorted, the first to be computed come first."""

    size_class: int
    arrival: int
    seq: Sequence
    row: int = -1  # of those that run; -1: it waits, or was admitted in this step


class Waiting:
    """The queue. A sequence keeps its place in the order of arrival when it comes back after a preemption."""

    def __init__(self) -> None:
        self._by_id: dict[int, Sequence] = {}
        self._lines: dict[int, OrderedDict[int, Sequence]] = {}  # by size class, in order of arrival; none is empty
        self._class_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._by_id

    def __iter__(self) -> Iterator[int]:
        """Ids in order of arrival."""
        return (seq.id for seq in sorted(self._by_id.values(), key=_arrival))

    def values(self) -> list[Sequence]:
        """Return all of them, in no order."""
        return list(self._by_id.values())

    def get(self, request_id: int) -> Sequence | None:
        """Return the sequence of this id; None if it does not wait."""
        return self._by_id.get(request_id)

    def add(self, seq: Sequence, size: int) -> None:
        """Queue `seq`, which is of that size class."""
        line = self._lines.setdefault(size, OrderedDict())
        last = next(reversed(line.values()), None)
        line[seq.id] = self._by_id[seq.id] = seq
        self._class_of[seq.id] = size
        if last is not None and seq.arrival < last.arrival:  # it was here before
            first = next(iter(line.values()))
            if seq.arrival < first.arrival:
                line.move_to_end(seq.id, last=False)
            else:
                self._lines[size] = OrderedDict((other.id, other) for other in sorted(line.values(), key=_arrival))

    def remove(self, seq: Sequence) -> None:
        """Take `seq` out."""
        del self._by_id[seq.id]
        size = self._class_of.pop(seq.id)
        line = self._lines[size]
        del line[seq.id]
        if not line:
            del self._lines[size]

    def heads(self) -> list[Sequence]:
        """Return the first of each line."""
        return [next(iter(line.values())) for line in self._lines.values()]

    def oldest(self) -> Sequence | None:
        """Return the one that arrived first; None if nothing waits."""
        return min(self.heads(), key=_arrival, default=None)

    def shortest_first(self, most: int) -> Iterator[Prompt]:
        """Return the prompts as they are now, sorted; `most` of a line at most."""
        lines = [
            [Prompt(size, seq.arrival, seq) for seq, _ in zip(line.values(), range(most), strict=False)]
            for size, line in self._lines.items()
        ]
        return merge(*lines)


def _arrival(seq: Sequence) -> int:
    return seq.arrival
