"""The process that compiles grammars for `pool.py`: `python -m tokenmill.grammar.worker SOCKET_FD`.

It may be killed at any time: by its own limits of CPU time and memory, or by the pool. It ends when the pool's end of
the socket is closed.
"""

from __future__ import annotations

import gc
import resource
import signal
import socket
import sys
import threading

import msgspec

from tokenmill.errors import GrammarError
from tokenmill.grammar.base import Backend, Vocabulary, new_backend
from tokenmill.parent import die_with_parent, leave_signals_to_parent
from tokenmill.wire.channel import Channel

STACK_BYTES = 2 << 20
"""No more than the threads have that use the grammar later, so that what overflows a stack does it here."""


class Setup(msgspec.Struct, frozen=True, array_like=True, tag="setup"):
    """The first message: for whom to compile, within which limits."""

    backend: str
    vocabulary: Vocabulary
    cpu_s: float  # one job
    memory_bytes: int  # beyond what the process has after its start


class Job(msgspec.Struct, frozen=True, array_like=True, tag="job"):
    """One grammar to prepare."""

    kind: str
    source: str


class Result(msgspec.Struct, frozen=True, array_like=True, tag="result"):
    """What became of a job, or of the setup: prepared, or why not."""

    prepared: bytes = b""
    error: str = ""


def main(fd: int) -> None:
    """Serve until the pool is gone, on a thread with a small stack."""
    die_with_parent()
    leave_signals_to_parent()
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve, args=(fd,))
    thread.start()
    thread.join()


def _serve(fd: int) -> None:
    channel: Channel[Setup | Job] = Channel(socket.socket(fileno=fd), Setup | Job)
    setup = channel.receive()
    if not isinstance(setup, Setup):
        return
    backend = new_backend(setup.backend, setup.vocabulary)
    gc.freeze()
    _limit_memory(setup.memory_bytes)
    channel.send(Result())
    while (job := channel.receive()) is not None:
        assert isinstance(job, Job)
        signal.setitimer(signal.ITIMER_PROF, setup.cpu_s)  # counts this process's CPU time; SIGPROF ends it
        result = _run(backend, job)
        signal.setitimer(signal.ITIMER_PROF, 0)
        channel.send(result)


def _run(backend: Backend, job: Job) -> Result:
    try:
        return Result(backend.prepare(job.kind, job.source))
    except GrammarError as error:
        return Result(error=str(error))
    except (MemoryError, RecursionError) as error:
        return Result(error=f"The grammar is too large to compile ({type(error).__name__}).")
    except Exception as error:  # noqa: BLE001 - a library's failure is the grammar's, and the process goes on
        return Result(error=f"The grammar cannot be compiled: its compiler failed ({type(error).__name__}).")


def _limit_memory(extra: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":  # elsewhere address space is not counted so
        return
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, size + extra))


if __name__ == "__main__":
    main(int(sys.argv[1]))
