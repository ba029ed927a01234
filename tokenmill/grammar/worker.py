"""The process that compiles grammars for `pool.py`: `python -m tokenmill.grammar.worker SOCKET_FD SETUP_FD LAZY`.

It may be killed at any time, by its own limits of CPU time and memory or by the pool. It ends when the pool's end of
the socket is closed.

A lazy process starts up, which takes most of a second, in a thread at idle priority. A thread cannot raise its priority
again, so another thread, created before, serves the jobs. Imports nothing large.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from typing import TYPE_CHECKING

from tokenmill.parent import die_with_parent, leave_signals_to_parent

if TYPE_CHECKING:
    from tokenmill.grammar.jobs import Compiler

STACK_BYTES = 2 << 20
"""At most the stack of the threads that use the grammar later, so that a grammar overflows the stack here first."""


def main(fd: int, setup_fd: int, lazy: bool) -> None:
    """Serve until the pool closes the socket, on a thread with a small stack. `setup_fd`: a file with the Setup."""
    die_with_parent()
    leave_signals_to_parent()
    threading.stack_size(STACK_BYTES)
    made: queue.SimpleQueue[Compiler | None] = queue.SimpleQueue()
    thread = threading.Thread(target=_serve, args=(made, fd))
    thread.start()
    try:
        if lazy:
            give_way()
        made.put(_compiler(setup_fd))
    finally:
        made.put(None)
    thread.join()


def give_way() -> None:
    """Give this thread idle priority, where the system supports that for one thread."""
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # 0: the calling thread


def _compiler(setup_fd: int) -> Compiler:
    from tokenmill.grammar.jobs import Compiler

    return Compiler(os.pread(setup_fd, os.fstat(setup_fd).st_size, 0))


def _serve(made: queue.SimpleQueue[Compiler | None], fd: int) -> None:
    compiler = made.get()
    if compiler is not None:
        compiler.serve(fd)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "lazy")
