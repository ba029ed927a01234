"""Worker threads that execute a step together with the caller.

Each is a Python thread that runs the compiled `serve` (`step.py`) without the global interpreter lock and sleeps on a
semaphore between steps. Threads are not pinned to cores: a pinned thread would delay every step while another process
uses its core. The affinity of the process applies to them.
"""

from __future__ import annotations

import ctypes
import sys
import threading

import numpy as np

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.cache import Code
from tokenmill.backends.cpu.scratch import zeros

_SEMAPHORE_BYTES = 64  # an upper bound of every system's sizeof(sem_t)
_MANY_CPUS = 4  # with more CPUs than this, one is reserved for HTTP and the rest of the engine


def default_threads(cpus: int, ranks: int = 1) -> int:
    """Return the default number of compute threads of each rank. `cpus`: CPUs that all ranks together may use."""
    return max(1, (cpus - 1 if cpus > _MANY_CPUS else cpus) // ranks)


class Semaphores:
    """One semaphore for each worker: POSIX semaphores, on macOS dispatch semaphores."""

    def __init__(self, count: int) -> None:
        self._libc = ctypes.CDLL(None)
        self._apple = sys.platform == "darwin"
        names = ("dispatch_semaphore_wait", "dispatch_semaphore_signal") if self._apple else ("sem_wait", "sem_post")
        wait, self._post = (getattr(self._libc, name) for name in names)
        self.wait_address = _address(wait)
        self.yield_address = _address(self._libc.sched_yield)
        self._post.argtypes = [ctypes.c_void_p]
        self._memory = zeros((count, _SEMAPHORE_BYTES))
        self.addresses = [self._make(row.ctypes.data) for row in self._memory]

    def _make(self, place: int) -> int:
        if self._apple:
            create = self._libc.dispatch_semaphore_create
            create.restype, create.argtypes = ctypes.c_void_p, [ctypes.c_long]
            return int(create(0))
        self._libc.sem_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
        self._libc.sem_init(place, 0, 0)
        return place

    def post(self, i: int) -> None:
        """Wake worker i."""
        self._post(self.addresses[i])


class WorkerThreads:
    """The compute threads of a backend: the caller as thread 0, and `threads` - 1 workers.

    `context`: words of `layout.py`; this class writes those about threads, barrier and steps. One caller at a time.
    """

    def __init__(self, code: Code, context: np.ndarray[tuple[int], np.dtype[np.int64]], threads: int) -> None:
        self._walk, serve = code.function("walk"), code.function("serve")
        self._context, self._code = context, code
        self._barrier = zeros((16,), np.int64)
        self._semaphores = Semaphores(threads - 1)
        context[[layout.THREADS, layout.BARRIER, layout.GENERATION, layout.STOP]] = (
            threads,
            self._barrier.ctypes.data,
            0,
            0,
        )
        context[[layout.WAIT, layout.YIELD]] = self._semaphores.wait_address, self._semaphores.yield_address
        self._threads = [
            threading.Thread(target=serve, args=(i + 1, 0, context.ctypes.data, at), name=f"cpu-{i + 1}", daemon=True)
            for i, at in enumerate(self._semaphores.addresses)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, first: int, last: int) -> None:
        """Execute the table rows at addresses [first, last) with all threads. Blocks until all threads are done."""
        context = self._context
        context[layout.FIRST_ROW], context[layout.LAST_ROW] = first, last
        self._wake()
        context[layout.BARRIER_BASE] = self._walk(0, 0, context.ctypes.data, 0)

    def close(self) -> None:
        """Stop the workers. Idempotent."""
        if not self._context[layout.STOP]:
            self._context[layout.STOP] = 1
            self._wake()
            for thread in self._threads:
                thread.join()

    def _wake(self) -> None:
        self._context[layout.GENERATION] += 1
        for i in range(len(self._threads)):
            self._semaphores.post(i)


def _address(function: object) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    if address is None:
        raise RuntimeError("a function of the C library has no address")
    return address
