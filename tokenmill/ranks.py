"""The ranks of one engine, as the supervisor sees them: started, told, watched and ended together.

A rank of a group is of no use without the others, which wait for it in a collective: when one ends, all are killed,
and the whole group is started again.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenmill import config
from tokenmill.config import Settings
from tokenmill.heartbeat import SLACK_S, STARTING, Heartbeat, heartbeat_path, stack_path
from tokenmill.host import available_bytes, check_cpus, has_gpu, usable_cpus
from tokenmill.process import Child
from tokenmill.watch import Watch
from tokenmill.wire.messages import Configure, EngineInfo, Failed, ModelReady, Place, ToChild

ENGINE, LINK = "tokenmill.runtime.worker:main", "tokenmill.node_link:main"
RESTART_WINDOW_S = 600.0
"""Period over which restarts are counted. Earlier ones do not count."""
MOST_DELAY_S = 60.0
"""Longest delay before a restart."""
_log = logging.getLogger(__name__)
_CAUSE_S = 0.3  # in which a rank that died first is found to be dead, after others that died because of it


@dataclass
class Restarts:
    """Recent deaths of a process, and the delay before its restart: 1, 2, 4 … 60 seconds."""

    allowed: int
    times: list[float] = field(default_factory=list)

    def delay(self, now: float) -> float | None:
        """Record a death at `now` and return the delay in seconds; None if there were too many deaths."""
        self.times = [time for time in self.times if now - time < RESTART_WINDOW_S] + [now]
        return None if len(self.times) > self.allowed else min(MOST_DELAY_S, 2.0 ** (len(self.times) - 1))


def engine_address(run_dir: str, engine: int) -> str:
    """Return the path of the Unix socket that rank 0 of an engine listens on for HTTP workers."""
    return str(Path(run_dir) / f"engine-{engine}.sock")


def memory_share(settings: Settings) -> int | None:
    """Return the bytes of this machine's memory for each engine, measured before any starts; None for a single one.

    An engine that starts again gets its share again, although the others have theirs by then.
    """
    return available_bytes() // settings.data_parallel_size if settings.data_parallel_size > 1 else None


def check_machine(settings: Settings) -> None:
    """Raise ArgumentError if the ranks certainly compute on CPUs, and there are too few. Ranks check devices."""
    on_cpus = settings.device == "cpu" or settings.backend == "cpu" or (settings.device == "auto" and not has_gpu())
    if on_cpus and not settings.mock and not settings.share_devices:
        local = settings.nodes.local_ranks(settings.ranks_per_engine)
        check_cpus(len(local) * settings.data_parallel_size)


class Ranks:
    """The rank processes of engine number `engine` on this machine, and their restarts.

    `host_memory`: see `Place`. `info`: of the engine, since it was first ready.
    """

    def __init__(self, engine: int, settings: Settings, run_dir: str, host_memory: int | None = None) -> None:
        self.engine, self.settings, self.run_dir = engine, settings, run_dir
        self.name = "the engine" if settings.data_parallel_size == 1 else f"engine {engine}"
        self.children: dict[int, Child] = {}
        self.info: EngineInfo | None = None
        self.generation = 0  # number of restarts
        self.restarts = Restarts(settings.max_engine_restarts)
        self.watch = Watch()
        self._host_memory = host_memory

    @property
    def alone(self) -> bool:
        """True if the engine is one process."""
        return self.settings.ranks_per_engine == 1

    @property
    def ready(self) -> bool:
        """True if every rank is ready."""
        return bool(self.children) and all(child.ready for child in self.children.values())

    def start(self, model: ModelReady | None) -> None:
        """Start the ranks that run on this machine. `model`: None if it is not on disk yet."""
        settings, local = self.settings, self._local_ranks()
        in_all = len(local) * settings.data_parallel_size
        environment = config.environment(settings.cpu_threads or max(1, usable_cpus() // in_all))
        for node in range(1, settings.num_nodes if settings.node_rank == 0 else 1):
            self._start_link(node)
        for number, rank in enumerate(local):
            configure = Configure(
                settings=settings.to_dict(), index=rank, engine_addresses=(engine_address(self.run_dir, self.engine),),
                run_dir=self.run_dir, generation=self.generation,
                place=Place(self.engine * len(local) + number, in_all, self.engine, self._host_memory),
            )  # fmt: skip
            heartbeat = self._heartbeat(rank)
            Path(stack_path(self.run_dir, self.engine, rank)).write_bytes(b"")
            child = self.children[rank] = Child(self._name_of(rank), ENGINE, configure, environment)
            self.watch.add(rank, child.process.pid, heartbeat, stack_path(self.run_dir, self.engine, rank))
        if model is not None:
            self.tell(model)

    def restart(self, model: ModelReady | None) -> None:
        """Start the ranks again, as the next generation."""
        self.generation += 1
        self.start(model)

    def _heartbeat(self, rank: int) -> Heartbeat:
        heartbeat = Heartbeat(heartbeat_path(self.run_dir, self.engine, rank))
        heartbeat.note(STARTING, self.settings.rank_timeout + SLACK_S)
        return heartbeat

    def hung(self) -> Child | None:
        """Return the rank that hangs, if one does, with its failure. Log the stacks of all ranks."""
        hang = self.watch.look(time.monotonic())
        if hang is None:
            return None
        child = self.children[hang.rank]
        child.failure = Failed("ShardFailed", f"hung: {hang}", fatal=False)
        for rank, stack in hang.stacks.items():
            _log.error("Stack of %s:\n%s", self.children[rank].name, stack.rstrip())
        return child

    def _name_of(self, rank: int) -> str:
        return f"engine rank {rank}" if self.settings.data_parallel_size == 1 else f"rank {rank} of {self.name}"

    def _local_ranks(self) -> range:
        """Return the ranks of the engine that run on this machine."""
        return self.settings.nodes.local_ranks(self.settings.ranks_per_engine)

    def _start_link(self, node: int) -> None:
        """Start the process that holds the connection to another node, and lives as long as the ranks there."""
        configure = Configure(
            settings=self.settings.to_dict(), index=node, engine_addresses=(), run_dir=self.run_dir,
            generation=self.generation,
        )  # fmt: skip
        name = f"part of {self.name} on node {node}"
        self.children[self.settings.ranks_per_engine + node] = Child(name, LINK, configure, config.environment(1))

    def tell(self, message: ToChild) -> None:
        """Send a message to every rank."""
        for child in self.children.values():
            child.control.send(message)

    def end(self, first: Child) -> Child:
        """Kill all ranks, for `first` was found dead, and return the one that died of itself."""
        deadline = time.monotonic() + _CAUSE_S
        while _cause(first) > (0, 0.0) and time.monotonic() < deadline and len(self.children) > 1:
            time.sleep(0.02)
        dead = [child for child in self.children.values() if child is first or child.dead]
        for child in dead:
            child.poll()  # its last words
        culprit = min(dead, key=_cause)
        if culprit.failure is None or culprit.failure.at:  # that of a hang has it
            culprit.place = self.watch.place(next(rank for rank, child in self.children.items() if child is culprit))
        self.kill()
        return culprit

    def kill(self) -> None:
        """Kill all ranks."""
        for child in self.children.values():
            child.kill()
        self.children.clear()
        self.watch.clear()


def _cause(child: Child) -> tuple[int, float]:
    """Return a key that is the least for the death that has caused the others of its group.

    A rank that was killed comes first; then those that failed, by time. Last are ranks that ended because another was
    gone: with exit code 0, or aborted by a library.
    """
    code = child.process.poll()
    if child.failure is not None:
        return 1, child.failure.at
    if code is not None and code < 0 and code != -signal.SIGABRT:
        return 0, 0.0
    return (3 if code == 0 else 2), 0.0


def group_info(groups: Sequence[Ranks]) -> list[EngineInfo]:
    """Return what is known of the engines, in their order."""
    return [ranks.info for ranks in groups if ranks.info is not None]
