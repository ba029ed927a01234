"""Placement of ranks on the memory nodes of a host, so that each rank reads weights from its own node's memory."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

_log = logging.getLogger(__name__)
_NODES = Path("/sys/devices/system/node")


def memory_nodes(folder: Path = _NODES) -> list[frozenset[int]]:
    """Return the CPUs of each memory node that this process may use; [] where the system does not report nodes."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    allowed, found = os.sched_getaffinity(0), []
    for path in sorted(folder.glob("node[0-9]*/cpulist"), key=lambda path: int(path.parent.name[4:])):
        with contextlib.suppress(OSError, ValueError):
            found.append(frozenset(parse(path.read_text()) & allowed))
    return [cpus for cpus in found if cpus]


def parse(text: str) -> set[int]:
    """Return the CPUs of a list such as "0-3,8,10-11"."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def cpus_of(rank: int, ranks: int, nodes: Sequence[frozenset[int]]) -> frozenset[int]:
    """Return the CPUs for a rank to run on; none if it should not be tied to some.

    Ranks share nodes, or nodes ranks, only if their numbers divide. On a single node a rank that is tied to some CPUs
    gains nothing, and waits whenever another process runs there.
    """
    none: frozenset[int] = frozenset()
    if len(nodes) < 2 or ranks < 2:
        return none
    if len(nodes) % ranks == 0:
        each = len(nodes) // ranks
        return none.union(*nodes[rank * each : (rank + 1) * each])
    if ranks % len(nodes):
        return none
    each = ranks // len(nodes)
    cpus = sorted(nodes[rank // each])
    share, part = len(cpus) // each, rank % each
    return frozenset(cpus[part * share : (part + 1) * share])


def tie(rank: int, ranks: int) -> None:
    """Tie this thread, and those that it starts, to the CPUs of a rank. Call before weights are read."""
    cpus = cpus_of(rank, ranks, memory_nodes())
    if cpus:
        os.sched_setaffinity(0, cpus)
        _log.info("Rank %d runs on %d CPUs of its memory node, from CPU %d on.", rank, len(cpus), min(cpus))
