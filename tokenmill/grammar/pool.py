"""Compilation of grammars in separate processes with limits, so that no grammar can delay or harm other requests.

`CompilePool.submit` returns at once. A process prepares the grammar within its limits of CPU time, memory and clock
time, or is killed and replaced; then a thread of the pool finishes the grammar in the engine's process. Results,
including refusals, are cached by content up to a number of bytes. Equal grammars submitted at the same time are
compiled once.

Processes start lazily, at idle priority. If a grammar is submitted before a lazy start is over, a process with normal
priority is started instead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from typing import IO

import msgspec

from tokenmill.errors import GenerationError, GrammarError
from tokenmill.grammar.base import Backend, Grammar
from tokenmill.grammar.jobs import Job, Result, Setup
from tokenmill.wire.channel import Channel, ChannelError
from tokenmill.wire.messages import GrammarSpec

log = logging.getLogger(__name__)

_START_S = 60.0  # limit on a process's start, which does not count as a grammar's clock time
_REFUSAL_BYTES = 1024


class PoolLimits(msgspec.Struct, frozen=True):
    """Limits on the compilation of one grammar, and on the cache and processes of the pool."""

    cpu_s: float = 1.0
    clock_s: float = 1.8
    memory_bytes: int = 512 << 20
    source_bytes: int = 512 << 10
    cache_bytes: int = 256 << 20
    processes: int = 2


_Key = tuple[str, str]


class CompilePool:
    """A pool of compiling processes for one backend. `submit` may be called from any thread; close the pool when done.

    The processes make their own backends for the vocabulary of `backend`, which finishes the grammars that they
    prepare. `num_compiled`, `num_refused`, `num_killed`, `num_cached`: counters for metrics.

    awaited: a request waits for a grammar already, so one process starts at normal priority.
    """

    def __init__(self, backend: Backend, limits: PoolLimits | None = None, *, awaited: bool = False) -> None:
        self.limits = limits or PoolLimits()
        self.num_compiled = self.num_refused = self.num_killed = self.num_cached = 0
        self._backend = backend
        setup = Setup(backend.vocabulary, self.limits.cpu_s, self.limits.memory_bytes)
        self._setup = _as_file(msgspec.msgpack.encode(setup))
        self._lock = threading.Lock()
        self._closed = False
        self._cache = _Cache(self.limits.cache_bytes)
        self._running: dict[_Key, list[Future[Grammar]]] = {}
        self._jobs: queue.SimpleQueue[_Key | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, args=(i > 0 or not awaited,), name=f"grammar {i}", daemon=True)
            for i in range(self.limits.processes)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, spec: GrammarSpec) -> Future[Grammar]:
        """Begin to compile a grammar; never blocks. `spec.after` is ignored here and applied by the caller.

        The future fails with GrammarError, or with GenerationError if no process starts.
        """
        future: Future[Grammar] = Future()
        size = len(spec.source.encode())
        if size > self.limits.source_bytes:
            self.num_refused += 1
            future.set_exception(GrammarError(f"The grammar takes {size} bytes; at most {self.limits.source_bytes} "
                                              "are allowed."))  # fmt: skip
            return future
        key = (spec.kind, spec.source)
        with self._lock:
            cached = GenerationError("The server is stopping.") if self._closed else self._cache.get(key)
            if cached is None:
                waiting = self._running.setdefault(key, [])
                waiting.append(future)
                if len(waiting) == 1:
                    self._jobs.put(key)
                return future
            self.num_cached += 1
        _resolve(future, cached)
        return future

    def close(self) -> None:
        """End the processes and wait for them. Pending futures fail."""
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(self.limits.clock_s + 2)
        with self._lock:
            left, self._running = self._running, {}
        for waiting in left.values():
            for future in waiting:
                _resolve(future, GenerationError("The server is stopping."))
        self._setup.close()

    def _serve(self, lazy: bool) -> None:
        process: _Process | None = None
        while True:
            process, lazy = process or self._begin(lazy=lazy), True
            key = self._jobs.get()
            if key is None:
                break
            if process is not None and not process.started(0.0):  # it has ended, or is starved at idle priority
                process.end()
                process = None
            process = process or self._begin(lazy=False)
            result: Grammar | Exception
            if process is None:
                result = GenerationError("The server cannot compile grammars at the moment.")
            else:
                result = self._compile(process, key)
                process = None if process.ended else process
            self._finish(key, result)
        if process is not None:
            process.end()

    def _begin(self, *, lazy: bool) -> _Process | None:
        """Start a process; None if that fails. Returns at once if `lazy`, else when the process is ready."""
        why: object = f"it ended, or has not started after {_START_S:g} s"
        try:
            process = _Process(self._setup.fileno(), self.limits, lazy=lazy)
            if lazy or process.started(_START_S):
                return process
            process.end()
        except OSError as error:
            why = error
        if not lazy:  # a lazy start is tried once more when it is needed
            log.error("A process that compiles grammars does not start: %s", why)
        return None

    def _compile(self, process: _Process, key: _Key) -> Grammar | Exception:
        try:
            answer = process.run(Job(*key), self.limits.clock_s)
        except _Killed as killed:
            self.num_killed += 1
            log.warning("Compiling a grammar was ended: it %s", killed)
            return GrammarError(f"The grammar is too costly to compile: it {killed}.")
        if answer.error:
            return GrammarError(answer.error)
        try:
            return self._backend.finish(answer.prepared)
        except GrammarError as error:
            return error
        except Exception:  # an error of the library must not end this thread
            log.exception("A grammar that was prepared cannot be finished")
            return GenerationError("The grammar cannot be used: its compiler failed; the server's log says more.")

    def _finish(self, key: _Key, result: Grammar | Exception) -> None:
        with self._lock:
            if not isinstance(result, GenerationError):
                self._cache.put(key, result)
            waiting = self._running.pop(key, [])
            self.num_refused += isinstance(result, GrammarError)
            self.num_compiled += not isinstance(result, Exception)
        for future in waiting:
            _resolve(future, result)


def _as_file(content: bytes) -> IO[bytes]:
    """Return an unnamed file that holds `content`, inherited by the processes as a descriptor."""
    in_memory = hasattr(os, "memfd_create")  # Linux
    file: IO[bytes] = open(os.memfd_create("setup"), "w+b") if in_memory else tempfile.TemporaryFile()  # noqa: SIM115
    file.write(content)
    file.flush()
    return file


def _resolve(future: Future[Grammar], result: Grammar | Exception) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(result, Exception):
        future.set_exception(type(result)(str(result)))  # a new exception each, since a raised one collects tracebacks
    else:
        future.set_result(result)


class _Cache:
    """A cache that evicts the least recently used entries beyond a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._entries: OrderedDict[_Key, tuple[Grammar | Exception, int]] = OrderedDict()

    def get(self, key: _Key) -> Grammar | Exception | None:
        found = self._entries.get(key)
        if found is None:
            return None
        self._entries.move_to_end(key)
        return found[0]

    def put(self, key: _Key, value: Grammar | Exception) -> None:
        size = len(key[1]) + (_REFUSAL_BYTES if isinstance(value, Exception) else value.nbytes)
        if size > self._max_bytes:
            return
        self._entries[key] = (value, size)
        self._bytes += size
        while self._bytes > self._max_bytes:
            self._bytes -= self._entries.popitem(last=False)[1][1]


class _Killed(Exception):
    """The end of a process during a job; the message is the reason, to be put after "it"."""


class _Process:
    """A compiling process, used by one thread of the pool."""

    def __init__(self, setup_fd: int, limits: PoolLimits, *, lazy: bool) -> None:
        ours, theirs = socket.socketpair()
        self.ended, self._started, self._limits = False, False, limits
        with theirs:
            fds = theirs.fileno(), setup_fd
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tokenmill.grammar.worker", *map(str, fds), "lazy" if lazy else "now"],
                stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=fds, process_group=0,
            )  # fmt: skip
        self._channel: Channel[Result] = Channel(ours, Result)

    def started(self, timeout_s: float) -> bool:
        """Wait for the end of the start; return False after `timeout_s`, or if the process has ended."""
        if not self._started:
            self._channel.set_timeout(timeout_s)
            with contextlib.suppress(OSError, ChannelError):
                self._started = self._channel.receive() is not None
        return self._started and self._process.poll() is None

    def run(self, job: Job, clock_s: float) -> Result:
        """Run a job; blocks. Raises _Killed if the process has ended, by itself or because it took too long."""
        began = time.monotonic()
        try:
            self._channel.set_timeout(clock_s)
            self._channel.send(job)
            self._channel.set_timeout(max(clock_s - (time.monotonic() - began), 0.001))
            answer = self._channel.receive()
        except TimeoutError:
            self.end()
            raise _Killed(f"took longer than {clock_s:g} s") from None
        except (OSError, ChannelError):
            answer = None
        if answer is None:
            raise _Killed(self._how_it_ended())
        return answer

    def end(self) -> None:
        """Kill and wait. Idempotent."""
        self.ended = True
        self._channel.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()

    def _how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        code = self._process.returncode
        self.end()
        if code == -signal.SIGPROF:
            return f"took more than {self._limits.cpu_s:g} s of CPU time"
        if code == -signal.SIGSEGV:
            return "has too many levels or optional parts"
        return f"took more than {self._limits.memory_bytes >> 20} MB of memory"
