"""The ranks of a sharded model as threads of the test's process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any, TypeVar

import numpy as np
from support_meeting import Meeting, Rank
from support_models import Driver

from tokenmill.parallel.mesh import Mesh
from tokenmill.program.stage import stage
from tokenmill.program.value import Program
from tokenmill.runtime.assembly import EngineOptions, assemble
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.weights.source import ModelSource

T = TypeVar("T")
Steps = list[list[tuple[int, list[int]]]]


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


def logits_of_stages(
    program: Program, source: Any, num_stages: int, steps: Steps, tensor: int = 1
) -> list[list[np.ndarray]]:
    """Return the logits of each step of a model cut into stages of so many ranks, from each rank of the last stage."""
    meeting = Meeting(num_stages * tensor)
    found: list[Any] = [None] * meeting.size

    def work(rank: int) -> None:
        mesh = Mesh.of(Rank(rank, meeting), num_stages)
        own = stage(program, mesh.stage, num_stages)
        try:
            with closing(Driver(own, source, group=mesh.tensor, mesh=mesh)) as backend:
                backend.warm_up()
                found[rank] = [backend.feed(rows) for rows in steps]
                meeting.exchange(rank, None)  # all values have arrived
        except BaseException as error:  # noqa: BLE001  the main thread tells it
            found[rank] = error
            meeting.barrier.abort()

    run_threads(work, meeting.size)
    raise_first(found)
    return found[-tensor:]


def run_threads(work: Callable[[int], None], count: int) -> None:
    """Call `work` with 0 to `count` - 1, each on a thread."""
    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


def of_ranks(program: Program, source: Any, size: int, steps: Steps, **options: Any) -> list[list[np.ndarray]]:
    """Return the logits of each step, on each rank. `options`: of the backend."""
    meeting, found = Meeting(size), [None] * size
    groups = [Rank(rank, meeting) for rank in range(size)]
    run_threads(lambda rank: logits_of_rank(program, source, groups[rank], steps, found, options), size)
    raise_first(found)
    return found  # type: ignore[return-value]


def raise_first(found: list[Any]) -> None:
    """Raise the error of a rank; if there are several, not one of a rank that only waited for another."""
    errors = [made for made in found if isinstance(made, BaseException)]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error


def engines_of_ranks(source: ModelSource, size: int, options: EngineOptions, ask: Callable[[OfflineEngine], T]) -> T:
    """Return what `ask` gets from an engine of several ranks, each of which runs all of it on the same requests."""
    meeting, found = Meeting(size), list[Any]([None] * size)

    def run(rank: int) -> None:
        try:
            with OfflineEngine(assemble(source, options, Rank(rank, meeting), lambda _: None)) as engine:
                found[rank] = ask(engine)
        except BaseException as error:  # noqa: BLE001  the main thread tells it
            found[rank] = error
            meeting.barrier.abort()

    run_threads(run, size)
    raise_first(found)
    assert all(made == found[0] for made in found), "the ranks have different tokens"
    result: T = found[0]
    return result
