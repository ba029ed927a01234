"""Supervisor: binds the port, starts the processes, watches them, restarts those that die, stops them in order.

    supervisor ─┬─ HTTP worker 0 … W-1   server/worker.py    the port answers at once; /health reports the phase
                ├─ fetching child        fetch.py            only if the model is not on disk
                └─ engine 0 … E-1        ranks.py            several with --data-parallel-size
                   └─ rank 0 … N-1       runtime/worker.py   waits for the model, loads it

Invariant: it imports neither torch nor an HTTP server, and holds no requests. Its loop waits for one of four events: a
message of a child, the end of a child, a signal, or the time of a planned start.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import msgspec

from tokenmill import config, fetch, logs, streams
from tokenmill.config import Settings
from tokenmill.errors import StartError
from tokenmill.extras import need_opentelemetry
from tokenmill.listening import listen
from tokenmill.node import run_node
from tokenmill.process import Child
from tokenmill.progress import Display, display
from tokenmill.ranks import MOST_DELAY_S, Ranks, Restarts, check_machine, engine_address, group_info, memory_share
from tokenmill.readiness import announce, readiness
from tokenmill.rundir import run_dir
from tokenmill.surroundings import raise_open_files, shortage
from tokenmill.watch import TICK_S
from tokenmill.wire.messages import Configure, Drain, Drained, ModelReady, Phase, Progress, Ready, ToChild

SERVER, FETCH = "tokenmill.server.worker:main", "tokenmill.fetch:main"
STOP_S = 5.0
"""Time for a child to end after `Stop`, or after its time to drain is over."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

_log = logging.getLogger(__name__)


class ServerFailed(StartError):
    """A process of the server has died too often, or for a reason that a restart would not remove."""

    def __init__(self, variant: str, message: str) -> None:
        super().__init__(message)
        self.variant = variant


class Supervisor:
    """One server, from its start to its end. Call `run` once, from the main thread; it blocks."""

    def __init__(self, settings: Settings, listener: socket.socket, run_dir: str, screen: Display) -> None:
        port = listener.getsockname()[1]
        self.settings = msgspec.structs.replace(settings, port=port)
        self.listener, self.run_dir, self.screen = listener, run_dir, screen
        self.workers: dict[int, Child] = {}
        memory = memory_share(self.settings)
        self.engines = [Ranks(engine, self.settings, run_dir, memory) for engine in range(settings.data_parallel_size)]
        self.fetcher: Child | None = None
        self.model: ModelReady | None = None
        self.phase = Phase("starting")
        self.has_been_ready = False  # with all engines
        self.planned: list[tuple[float, int | Ranks]] = []  # starts: monotonic time; HTTP worker or engine
        self.restarts: dict[int, Restarts] = {}  # of HTTP workers
        self.began = time.monotonic()
        self.signals = 0
        self.stop_by = float("inf")  # deadline of draining, after which processes are killed; inf: not draining

    # Starting

    def run(self) -> int:
        """Serve until a signal and return the exit code 0. Raises StartError if the server cannot continue."""
        with _wakeup() as wakeup:
            try:
                self._start()
                while not self._stopped():
                    self._wait(wakeup)
                    self._step()
            finally:
                self.screen.close()
                self._kill_all()
        return 0

    def _start(self) -> None:
        for index in range(self.settings.http_workers):
            self._start_worker(index)
        for ranks in self.engines:
            ranks.start(self.model)
        source = fetch.on_disk(self.settings)
        if source is not None:
            self._model_is_here(ModelReady(msgspec.to_builtins(source)))
        else:
            self._set_phase(Phase("download"))
            self.fetcher = Child("fetch", FETCH, self._configure(0), config.environment(1))

    def _configure(self, index: int) -> Configure:
        addresses = tuple(engine_address(self.run_dir, ranks.engine) for ranks in self.engines)
        return Configure(settings=self.settings.to_dict(), index=index, engine_addresses=addresses,
                         run_dir=self.run_dir, listen_fd=self.listener.fileno())  # fmt: skip

    def _start_worker(self, index: int) -> None:
        fd = self.listener.fileno()
        child = Child(f"HTTP worker {index}", SERVER, self._configure(index), config.environment(1), [fd])
        self.workers[index] = child
        for message in (self.phase, self.model):
            if message is not None:
                child.control.send(message)

    def _model_is_here(self, message: ModelReady) -> None:
        self.model = message
        source = message.source
        revision = f" at {source['revision'][:12]}" if source.get("revision") else ""
        self.screen.line(f"Model {source['model_id']}{revision}: {source['path']} ({source['format']})")
        self._tell([*self.workers.values(), *self._ranks()], message)
        self._set_phase(Phase("load"))

    # Watching

    def _children(self) -> list[Child]:
        return [*self.workers.values(), *self._ranks(), *([self.fetcher] if self.fetcher else [])]

    def _ranks(self) -> list[Child]:
        return [child for ranks in self.engines for child in ranks.children.values()]

    def _engine_of(self, child: Child) -> Ranks | None:
        return next((ranks for ranks in self.engines if child in ranks.children.values()), None)

    def _wait(self, wakeup: socket.socket) -> None:
        """Block until a message, the end of a child, a signal or a planned start, for half a second at most."""
        now = time.monotonic()
        until = min([now + TICK_S, self.stop_by, *(moment for moment, _ in self.planned)])
        with selectors.DefaultSelector() as selector:
            selector.register(wakeup, selectors.EVENT_READ)
            for child in self._children():
                if not child.control.closed:
                    selector.register(child.control.fileno(), selectors.EVENT_READ)
            selector.select(max(0.0, until - now))
        with contextlib.suppress(BlockingIOError):
            for number in wakeup.recv(64):
                self._asked_to_stop(number)

    def _asked_to_stop(self, number: int) -> None:
        """Handle a signal that asks to stop.

        The first SIGINT or SIGTERM drains, the second stops at once. SIGHUP drains, however often it is sent, because a
        closed terminal may send it twice. SIGQUIT stops at once.
        """
        if number == signal.SIGHUP:
            self.signals = max(self.signals, 1)
        elif number in _SIGNALS:
            self.signals += 2 if number == signal.SIGQUIT else 1

    def _step(self) -> None:
        for child in self._children():
            dead = child.dead  # read before polling, so that no message before its end is missed
            for message in child.poll():
                self._hear(child, message)
            if dead or child.control.closed:
                self._bury(child)
        for ranks in self.engines:
            if (hung := ranks.hung()) is not None:
                self._bury(hung)
        self._start_planned()
        if self.signals and not self.draining:
            self._drain()

    def _hear(self, child: Child, message: object) -> None:
        ranks = self._engine_of(child)
        if isinstance(message, Progress):
            if ranks is None:
                self._show(message)
            elif child is ranks.children[min(ranks.children)]:
                self._progress(ranks, message)
        elif isinstance(message, ModelReady):
            _log.info("Successfully downloaded weights for %s", message.source["model_id"])  # TGI's log line
            self._model_is_here(message)
        elif isinstance(message, Drained):
            child.drained = True
        elif isinstance(message, Ready):
            child.ready = True
            if ranks is not None:
                ranks.info = message.info or ranks.info
                if ranks.ready:
                    self._engine_is_ready(ranks)

    def _progress(self, ranks: Ranks, progress: Progress) -> None:
        """Show the progress of the first engine that is not ready, unless others serve after its restart."""
        starting = [other for other in self.engines if not other.ready]
        if ranks is starting[0] and not (self.has_been_ready and len(starting) < len(self.engines)):
            self._show(progress)

    def _show(self, progress: Progress) -> None:
        if not self.has_been_ready:
            name = self.model.source["model_id"] if self.model else ""
            self.screen.progress(msgspec.structs.replace(progress, detail=progress.detail or name))
        percent = 100 * progress.done // progress.total if progress.total else -1
        if (progress.phase, percent) != (self.phase.name, self.phase.percent):
            self._set_phase(Phase(progress.phase, percent))

    def _engine_is_ready(self, ranks: Ranks) -> None:
        if ranks.generation:
            self.screen.line(f"{ranks.name.capitalize()} is ready again after {ranks.generation} restart(s).")
        if self.has_been_ready:
            self._set_phase(Phase("ready"))
        elif all(other.ready for other in self.engines):
            self.has_been_ready = True
            self._set_phase(Phase("ready"))
            self.screen.close()
            infos = group_info(self.engines)
            announce(infos, self.settings)
            for line in readiness(infos, self.settings, time.monotonic() - self.began):
                self.screen.line(line)

    def _set_phase(self, phase: Phase) -> None:
        self.phase = phase
        self._tell(list(self.workers.values()), phase)

    def _tell(self, children: list[Child], message: ToChild) -> None:
        for child in children:
            child.control.send(message)

    # Deaths

    def _bury(self, child: Child) -> None:
        """Remove a child that has ended, and plan its restart if it may have one."""
        if child not in self._children():
            return  # a rank that was killed together with another
        with contextlib.suppress(subprocess.TimeoutExpired):  # wait, so that its exit code can be reported
            child.process.wait(1.0)
        child.kill()
        if child is self.fetcher:
            self.fetcher = None
            if self.model is None and not self.draining:
                raise _failure(child, "DownloadError")
        elif (ranks := self._engine_of(child)) is not None:
            self._restart_engine(ranks, ranks.end(child))
        else:
            index = next(index for index, worker in self.workers.items() if worker is child)
            del self.workers[index]
            self._restart_worker(index, child)

    def _restart_worker(self, index: int, child: Child) -> None:
        starting = not self.has_been_ready or (not child.ready and index not in self.restarts)
        restarts = self.restarts.setdefault(index, Restarts(self.settings.max_engine_restarts))
        if (delay := self._delay(child, restarts, starting, "WebserverFailed")) is not None:
            _log.error("The %s has died (%s); it is started again in %g s", child.name, child.how_it_ended(), delay)
            self.planned.append((time.monotonic() + delay, index))

    def _restart_engine(self, ranks: Ranks, child: Child) -> None:
        """Plan the restart of an engine, of which `child` was the first to die. Others go on."""
        others = any(other.ready for other in self.engines)
        delay = self._delay(child, ranks.restarts, ranks.info is None, "ShardFailed", forever=others)
        if delay is None:
            return
        again = f"{'it' if ranks.alone else ranks.name} is started again"
        _log.error("The %s has died (%s); %s in %g s", child.name, child.how_it_ended(), again, delay)
        self.planned.append((time.monotonic() + delay, ranks))
        if not others:
            self._set_phase(Phase("restarting"))

    def _delay(
        self, child: Child, restarts: Restarts, starting: bool, variant: str, *, forever: bool = False
    ) -> float | None:
        """Record the death of a child and return the delay before its restart in seconds; None while draining.

        `starting`: True if it has never been ready. `forever`: True if too many deaths do not end the server. Raise
        ServerFailed if a restart would not help.
        """
        if self.draining:
            return None
        if child.failure is not None and child.failure.fatal and starting:
            raise _failure(child, variant)
        delay = restarts.delay(time.monotonic())
        if delay is None and not forever:
            raise _failure(child, variant)
        return MOST_DELAY_S if delay is None else delay

    def _start_planned(self) -> None:
        now = time.monotonic()
        due = [what for moment, what in self.planned if moment <= now]
        self.planned = [plan for plan in self.planned if plan[0] > now]
        for what in due:
            if isinstance(what, Ranks):
                what.restart(self.model)
            else:
                self._start_worker(what)

    # Stopping

    @property
    def draining(self) -> bool:
        """True once a signal has asked the server to stop."""
        return self.stop_by != float("inf")

    def _drain(self) -> None:
        """Let running requests finish; stop at once if the engine is not ready, because there are none."""
        self.planned.clear()
        self.screen.close()
        timeout = float(self.settings.graceful_termination_timeout) if self._serves() else 0.0
        self.stop_by = time.monotonic() + timeout + (STOP_S if timeout else 0.0)
        if timeout:
            self.screen.line(f"Stopping: running requests have {timeout:g} s to finish; a second signal ends them.")
            self._tell(list(self.workers.values()), Drain(timeout))
        else:
            self.screen.line("Stopping.")

    def _serves(self) -> bool:
        """Return True if there may be requests."""
        return any(ranks.info is not None and ranks.children for ranks in self.engines)

    def _stopped(self) -> bool:
        finished = all(worker.drained for worker in self.workers.values())
        return self.draining and (finished or self.signals > 1 or time.monotonic() >= self.stop_by)

    def _kill_all(self) -> None:
        """Stop every process; after `STOP_S` seconds, fewer after a second signal, kill the remaining ones."""
        deadline = time.monotonic() + (STOP_S if self.signals < 2 else 0.2)
        for children in (list(self.workers.values()), self._children()):  # workers first: the engine's clients
            for child in children:
                if child.ready:
                    child.stop()
                else:
                    child.kill()  # it has no requests, and reads no messages while it loads
            while time.monotonic() < deadline and not all(child.dead for child in children):
                time.sleep(0.02)
        for child in self._children():
            child.kill()


def _failure(child: Child, variant: str) -> ServerFailed:
    if child.failure is not None:
        which = f"{child.name.capitalize()}: " if " of engine " in child.name else ""
        return ServerFailed(child.failure.variant or variant, f"{which}{child.failure.message}")
    return ServerFailed(variant, f"The {child.name} has died: {child.how_it_ended()}. Its log is above.")


@contextlib.contextmanager
def _wakeup() -> Iterator[socket.socket]:
    """Yield a socket that receives the numbers of signals as bytes, within the block."""
    ours, signals = socket.socketpair()
    ours.setblocking(False)
    signals.setblocking(False)
    old_fd = signal.set_wakeup_fd(signals.fileno())
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # set by nohup
    numbers = [number for number in _SIGNALS if number != signal.SIGHUP or not ignored]
    old = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield ours
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_fd)
        ours.close()
        signals.close()


def serve(settings: Settings, environment: str = "") -> int:
    """Run a server until a signal stops it; return 0, or 1 after printing `Error: …` on stderr.

    `environment`: report of the runtime environment, logged first (`--env`); "" for none.
    """
    streams.install(lossy=True)
    raise_open_files()
    logs.set_up(settings.log_level, json=settings.json_output, colors=settings.log_colorize)
    not_understood = [f"`LOG_LEVEL`: {part!r} is not understood" for part in logs.parse_levels(settings.log_level)[1]]
    if environment:
        _log.info("Runtime environment:\n%s", environment)
    for warning in (*settings.warnings, *not_understood):
        _log.warning("%s", warning)
    _log.info("Options: %s", settings.shown())
    try:
        check_machine(settings)
        if settings.otlp_endpoint:
            need_opentelemetry()
        if settings.node_rank:
            return run_node(settings)
        with run_dir() as folder, listen(settings.hostname, settings.port) as listener:
            return Supervisor(settings, listener, folder, display(json=settings.json_output)).run()
    except StartError as error:
        print(f"Error: {error.variant}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except (OSError, RuntimeError, MemoryError) as error:
        if (why := shortage(error)) is None:
            raise
        print(f"Error: {StartError.variant}: {why}", file=sys.stderr, flush=True)
        return StartError.exit_code
