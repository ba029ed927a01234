"""Ranks as threads of the test's process. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from tokenmill.parallel.group import Group

T = TypeVar("T")


class Meeting:
    """Ranks as threads of this process: each gives a value, and all get all values once every rank has given one."""

    def __init__(self, size: int, timeout_s: float = 20) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=timeout_s)
        self.given: list[Any] = [None] * size

    def exchange(self, rank: int, x: Any) -> list[Any]:
        self.given[rank] = x
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found


class Rank(Group):
    """Group of threads. The transports that a backend makes from it are the real ones."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, meeting.size)
        self.meeting = meeting

    def exchange(self, data: bytes = b"") -> list[bytes]:
        return self.meeting.exchange(self.rank, data)


def on_ranks(size: int, work: Callable[[Rank], T], timeout_s: float = 20) -> list[T]:
    """Call `work` for each rank, on a thread of its own, and return the results. Raises the first rank's error."""
    meeting, found = Meeting(size, timeout_s), list[Any]([None]) * size

    def run(rank: int) -> None:
        try:
            found[rank] = work(Rank(rank, meeting))
        except BaseException as error:  # noqa: BLE001  the main thread tells it
            found[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * timeout_s)
    errors = [made for made in found if isinstance(made, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return found
