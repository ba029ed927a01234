"""The process that compiles grammars for `pool.py`: `python -m tokenmill.grammar.worker SOCKET_FD SETUP_FD LAZY`.

It may be killed at any time: by its own limits of CPU time and memory, or by the pool. It ends when the pool's end of
the socket is closed.

A lazy one makes its start, the better part of a second, in a thread that gets what time nobody else wants. Nobody may
take a priority back that was given up; so its jobs are done by a thread that was there before. Imports nothing large.
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
"""No more than the threads have that use the grammar later, so that what overflows a stack does it here."""


def main(fd: int, setup_fd: int, lazy: bool) -> None:
    """Serve until the pool is gone, on a thread with a small stack. `setup_fd`: a file that holds the Setup."""
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
    """Let this thread run when nobody else wants to, where the system can do that to one thread."""
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
