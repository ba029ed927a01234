"""Ranks of the CUDA backend in one process: as threads, or with memory that all of them see."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import support_cuda
import torch
from support_ranks import Meeting, Rank

from tokenmill.backends.cuda.collectives.base import Needs
from tokenmill.backends.cuda.collectives.choice import Limits
from tokenmill.backends.cuda.collectives.peers import Layout, Peers, Shared

T = TypeVar("T")
DEVICE = support_cuda.DEVICE
_ONE_KERNEL = threading.Lock()

if not support_cuda.ON_GPU:
    executor = support_cuda.interpreter.GridExecutor
    launched = executor.__call__

    def alone(self: Any, *arguments: Any, **options: Any) -> Any:
        """Launch a kernel while no other thread does: the interpreter keeps the place in the grid in a global."""
        with _ONE_KERNEL:
            return launched(self, *arguments, **options)

    executor.__call__ = alone


def on_ranks(size: int, run: Callable[[Rank], T]) -> list[T]:
    """Call `run` as each rank, in threads, and return the results."""
    meeting, found, failed = Meeting(size), dict[int, T](), list[BaseException]()
    meeting.barrier = threading.Barrier(size, timeout=120)  # others use this machine

    def one(rank: int) -> None:
        try:
            found[rank] = run(Rank(rank, meeting))
        except BaseException as error:  # noqa: BLE001  raised below
            failed.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if failed:
        raise next((error for error in failed if not isinstance(error, threading.BrokenBarrierError)), failed[0])
    return [found[rank] for rank in range(size)]


def peers_of(needs: Needs, size: int, limits: Limits) -> list[Peers]:
    """Return ranks that write to each other's memory in this process."""
    layout = Layout.of(needs, size)
    memories = [torch.zeros(layout.nbytes, dtype=torch.uint8, device=DEVICE) for _ in range(size)]
    made = []
    for rank, own in enumerate(memories):
        deltas = [other.data_ptr() - own.data_ptr() for other in memories]
        made.append(Peers(Shared(rank, own, torch.tensor(deltas, device=DEVICE)), layout, limits))
    return made


def at_once(peers: list[Peers], launch: Callable[[int], None]) -> None:
    """Launch an operation of all ranks.

    On a GPU, on streams of their own. The interpreter runs one kernel after another, so a rank's flags are not there
    when others look for them, once, and give up; then their launches are repeated, with all numbers in place.
    """
    if support_cuda.ON_GPU:
        for rank, stream in enumerate([torch.cuda.Stream() for _ in peers]):
            with torch.cuda.stream(stream):
                launch(rank)
        torch.cuda.synchronize()
        return
    counts = [each.counts.clone() for each in peers]
    for _ in range(3):  # a sum in two shots needs the sums of all ranks, which need the numbers of all
        for rank, each in enumerate(peers):
            each.counts.copy_(counts[rank])
            each.wait_up_to(0)
            each.fault.zero_()
            launch(rank)
