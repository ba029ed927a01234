"""Waiting sequences, by size class, and the order in which prompts are computed.

A size class covers sizes from a power of two to less than the next one. Within a class the order is that of arrival.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import merge
from typing import NamedTuple

from tokenmill.engine.sequence import Sequence


class Prompt(NamedTuple):
    """A sequence with several known tokens to compute. The sort order is that in which prompts are computed."""

    size_class: int
    arrival: int
    seq: Sequence
    row: int = -1  # among the running rows; -1: it waits, or was admitted in this step


class Waiting:
    """Queue of the waiting sequences. A preempted sequence returns to its place in the order of arrival."""

    def __init__(self) -> None:
        self._by_id: dict[int, Sequence] = {}
        self._queues: dict[int, OrderedDict[int, Sequence]] = {}  # by size class; in order of arrival, never empty
        self._class_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._by_id

    def __iter__(self) -> Iterator[int]:
        """Iterate over the request ids, in order of arrival."""
        return (seq.id for seq in sorted(self._by_id.values(), key=_arrival))

    def values(self) -> list[Sequence]:
        """Return all waiting sequences, in no particular order."""
        return list(self._by_id.values())

    def get(self, request_id: int) -> Sequence | None:
        """Return the sequence with this id; None if it is not waiting."""
        return self._by_id.get(request_id)

    def add(self, seq: Sequence, size: int) -> None:
        """Queue `seq` in the size class `size`."""
        queue = self._queues.setdefault(size, OrderedDict())
        last = next(reversed(queue.values()), None)
        queue[seq.id] = self._by_id[seq.id] = seq
        self._class_of[seq.id] = size
        if last is not None and seq.arrival < last.arrival:  # it was preempted: put it back in its place
            first = next(iter(queue.values()))
            if seq.arrival < first.arrival:
                queue.move_to_end(seq.id, last=False)
            else:
                self._queues[size] = OrderedDict((other.id, other) for other in sorted(queue.values(), key=_arrival))

    def remove(self, seq: Sequence) -> None:
        """Remove `seq` from the queue."""
        del self._by_id[seq.id]
        size = self._class_of.pop(seq.id)
        queue = self._queues[size]
        del queue[seq.id]
        if not queue:
            del self._queues[size]

    def heads(self) -> list[Sequence]:
        """Return the oldest sequence of each size class."""
        return [next(iter(queue.values())) for queue in self._queues.values()]

    def oldest(self) -> Sequence | None:
        """Return the oldest sequence; None if none waits."""
        return min(self.heads(), key=_arrival, default=None)

    def shortest_first(self, limit: int) -> Iterator[Prompt]:
        """Return at most `limit` prompts of each size class, in the order in which they are computed.

        Later changes of the queue do not affect the iteration.
        """
        queues = [
            [Prompt(size, seq.arrival, seq) for seq, _ in zip(queue.values(), range(limit), strict=False)]
            for size, queue in self._queues.items()
        ]
        return merge(*queues)


def _arrival(seq: Sequence) -> int:
    return seq.arrival
