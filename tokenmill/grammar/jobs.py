"""Jobs of the processes that compile grammars for `pool.py`: the messages, and the loop that serves them."""

from __future__ import annotations

import gc
import resource
import signal
import socket
import sys

import msgspec

from tokenmill.errors import GrammarError
from tokenmill.grammar.base import Backend, Vocabulary
from tokenmill.wire.channel import Channel


class Setup(msgspec.Struct, frozen=True, array_like=True):
    """The vocabulary to compile for, and the limits of one job."""

    vocabulary: Vocabulary
    cpu_s: float  # one job
    memory_bytes: int  # beyond what the process has after its start


class Job(msgspec.Struct, frozen=True, array_like=True):
    """A request to prepare one grammar."""

    kind: str
    source: str


class Result(msgspec.Struct, frozen=True, array_like=True):
    """Outcome of a job, or of the start: the prepared grammar, or an error."""

    prepared: bytes = b""
    error: str = ""


class Compiler:
    """A compiling process's own backend, and the limits of its jobs.

    setup: an encoded Setup. Building takes most of a second for a large vocabulary.
    """

    def __init__(self, setup: bytes) -> None:
        from tokenmill.grammar.llguidance import LLGuidance

        self._setup = msgspec.msgpack.decode(setup, type=Setup)
        self._backend: Backend = LLGuidance(self._setup.vocabulary)

    def serve(self, fd: int) -> None:
        """Tell the pool, on the socket, that the start is over, then answer its jobs until the other end is closed."""
        channel: Channel[Job] = Channel(socket.socket(fileno=fd), Job)
        gc.freeze()
        _limit_memory(self._setup.memory_bytes)
        channel.send(Result())
        while (job := channel.receive()) is not None:
            signal.setitimer(signal.ITIMER_PROF, self._setup.cpu_s)  # counts this process's CPU time; SIGPROF ends it
            result = _run(self._backend, job)
            signal.setitimer(signal.ITIMER_PROF, 0)
            channel.send(result)


def _run(backend: Backend, job: Job) -> Result:
    try:
        return Result(backend.prepare(job.kind, job.source))
    except GrammarError as error:
        return Result(error=str(error))
    except (MemoryError, RecursionError) as error:
        return Result(error=f"The grammar is too large to compile ({type(error).__name__}).")
    except Exception as error:  # noqa: BLE001 - a failure of the library fails this grammar only
        return Result(error=f"The grammar cannot be compiled: its compiler failed ({type(error).__name__}).")


def _limit_memory(extra: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":  # other systems count address space differently
        return
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, size + extra))
