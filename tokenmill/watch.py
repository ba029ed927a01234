"""Detection of ranks that hang: the supervisor's view of the heartbeats of one engine.

Only time in which the supervisor itself was awake counts, so a machine that was suspended, or a frozen container, kills
nothing. A rank under a debugger is not hung, nor is one that waits for pages from disk, nor for a CPU.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenmill.heartbeat import Heartbeat, Pulse

TICK_S = 0.5
"""Seconds between two looks, at most."""

STOPPED_S = 3.0
"""Seconds after which a process that a signal has stopped hangs."""

_DUMP_S = 0.5  # in which a rank writes its stack
_DUMP_BYTES = 20_000  # of a stack that are read
_FRAME = re.compile(r'File "(.*?)", line (\d+) in (\S+)')
_WAITS = ("all_reduce", "gather", "broadcast", "barrier", "receive", "exchange", "wait")
"""Functions in which a rank waits for another."""


@dataclass
class Watched:
    """One rank: its process, the files that it writes, and how long its heartbeat has been silent."""

    rank: int
    pid: int
    heartbeat: Heartbeat
    stack: str  # path; see `heartbeat.stack_path`
    pulse: Pulse
    faults: int = 0  # pages that it has read from disk
    queued_s: dict[int, float] = field(default_factory=dict)  # by thread: see `queued`
    silent_s: float = 0.0


@dataclass(frozen=True)
class Hang:
    """A rank that hangs. `stacks`: of the engine's ranks, by rank, as far as they could be had."""

    rank: int
    silent_s: float
    where: str
    stacks: dict[int, str]

    def __str__(self) -> str:
        return f"no progress for {self.silent_s:.0f} s; it stood at {self.where}"


class Watch:
    """The heartbeats of the ranks of an engine."""

    def __init__(self) -> None:
        self.ranks: list[Watched] = []
        self._looked: float | None = None

    def add(self, rank: int, pid: int, heartbeat: Heartbeat, stack: str) -> None:
        """Watch a process that has just been started."""
        self.ranks.append(Watched(rank, pid, heartbeat, stack, heartbeat.read()))

    def clear(self) -> None:
        """Forget all ranks."""
        for watched in self.ranks:
            watched.heartbeat.close()
        self.ranks.clear()

    def look(self, now: float) -> Hang | None:
        """Read the heartbeats and return the hang of the engine, if it hangs. `now`: time.monotonic() seconds.

        A rank may wait for another as long as that one may take. A stopped process hangs wherever it stands.
        """
        awake_s = min(now - self._looked, 2 * TICK_S) if self._looked is not None else 0.0
        self._looked = now
        for watched in self.ranks:
            pulse, faults = watched.heartbeat.read(), page_faults(watched.pid)
            moved = pulse.notes != watched.pulse.notes or faults != watched.faults or is_traced(watched.pid)
            queued_s = queued(watched.pid)
            starved_s = max((queued_s[tid] - watched.queued_s.get(tid, queued_s[tid]) for tid in queued_s), default=0.0)
            watched.silent_s = 0.0 if moved else watched.silent_s + max(0.0, awake_s - starved_s)
            watched.pulse, watched.faults, watched.queued_s = pulse, faults, queued_s
        limit_s = max((watched.pulse.limit_s for watched in self.ranks), default=0.0)
        silent = [watched for watched in self.ranks if watched.silent_s > limit_s or _stopped(watched)]
        return self._hang(silent) if silent else None

    def place(self, rank: int) -> str:
        """Return where a rank stood at its last note; "" if nothing is known of it."""
        return next((watched.heartbeat.read().place for watched in self.ranks if watched.rank == rank), "")

    def _hang(self, silent: Sequence[Watched]) -> Hang:
        """Find which of the silent ranks the others wait for: a stopped one, or one that is in no collective."""
        stopped = [watched for watched in silent if _stopped(watched)]
        stacks = dump([watched for watched in self.ranks if watched not in stopped])
        behind = min(silent, key=lambda watched: (in_collective(stacks.get(watched.rank, "")), watched.pulse.notes))
        culprit = stopped[0] if stopped else behind
        where = culprit.pulse.place
        if culprit in stopped:
            where += ", stopped by a signal (SIGSTOP or SIGTSTP)"
        elif frame := innermost(stacks.get(culprit.rank, "")):
            where += f", {frame}"
        return Hang(culprit.rank, culprit.silent_s, where, stacks)


def _stopped(watched: Watched) -> bool:
    return watched.silent_s > STOPPED_S and process_state(watched.pid) == "T"


def dump(ranks: Sequence[Watched]) -> dict[int, str]:
    """Ask processes for their stacks, and return those that were written in time."""
    for watched in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(watched.pid, signal.SIGUSR1)
    deadline = time.monotonic() + _DUMP_S
    stacks: dict[int, str] = {}
    while time.monotonic() < deadline:
        time.sleep(0.1)
        before = dict(stacks)
        for watched in ranks:
            with contextlib.suppress(OSError):
                if text := Path(watched.stack).read_text(errors="replace")[-_DUMP_BYTES:]:
                    stacks[watched.rank] = text
        if len(stacks) == len(ranks) and stacks == before:
            break  # they are complete
    return stacks


def innermost(stack: str) -> str:
    """Return the innermost frame of this package in a stack of `faulthandler`, of the main thread, its last one."""
    main_thread = re.split(r"^(?:Current t|T)hread ", stack, flags=re.MULTILINE)[-1]
    for path, line, function in _FRAME.findall(main_thread):
        if "tokenmill" in Path(path).parts:
            file = "/".join(Path(path).parts[-2:])
            return f"{function} ({file}:{line})"
    return ""


def in_collective(stack: str) -> bool:
    """Return True if the innermost frame of this package waits for another rank."""
    function = innermost(stack).partition(" ")[0]
    return any(function.strip("_").startswith(word) for word in _WAITS)


def process_state(pid: int) -> str:
    """Return the kernel's letter for the state of a process, "T" if it is stopped; "" if it is not known here."""
    return (_stat(pid) or [""])[0]


def page_faults(pid: int) -> int:
    """Return how often a process has waited for a page from disk; 0 if it is not known here."""
    fields = _stat(pid)
    return int(fields[9]) if len(fields) > 9 else 0


def queued(pid: int) -> dict[int, float]:
    """Return the seconds that each thread of a process has waited for a CPU while it could run; {} without /proc."""
    seconds: dict[int, float] = {}
    for thread in Path(f"/proc/{pid}/task").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):  # it has just ended
            seconds[int(thread.name)] = int((thread / "schedstat").read_text().split()[1]) / 1e9
    return seconds


def _stat(pid: int) -> list[str]:
    """Return the kernel's fields of a process from its state on; [] without /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def is_traced(pid: int) -> bool:
    """Return True if a debugger is attached to a process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in lines)
