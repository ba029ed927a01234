"""The ranks of a sharded model as threads of the test's process."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from support_models import Driver

from tokenmill.parallel.group import Group
from tokenmill.program.value import Program

Steps = list[list[tuple[int, list[int]]]]


class Meeting:
    """Ranks as threads of this process: each gives a value, and all get all values once every rank has given one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
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


def logits_of_rank(
    program: Program, source: Any, group: Rank, steps: Steps, found: list[Any], options: dict[str, Any]
) -> None:
    try:
        backend = Driver(program, source, group=group, **options)
    except BaseException as error:  # noqa: BLE001  the main thread tells it
        found[group.rank] = error
        group.meeting.barrier.abort()
        return
    try:
        found[group.rank] = [backend.feed(rows) for rows in steps]
    except BaseException as error:  # noqa: BLE001  the main thread tells it
        found[group.rank] = error
        group.meeting.barrier.abort()
    finally:
        backend.close()


def of_ranks(program: Program, source: Any, size: int, steps: Steps, **options: Any) -> list[list[np.ndarray]]:
    """Return the logits of each step, on each rank. `options`: of the backend."""
    meeting, found = Meeting(size), [None] * size
    given = [(program, source, Rank(rank, meeting), steps, found, options) for rank in range(size)]
    work = [threading.Thread(target=logits_of_rank, args=each, daemon=True) for each in given]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join(60)
    for made in found:
        if isinstance(made, BaseException):
            raise made
    return found  # type: ignore[return-value]
