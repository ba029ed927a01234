"""Tie a process to its parent: it ends when the parent ends, and leaves signals to the parent.

`python -m tokenmill.parent PID MODULE ARGUMENT…` runs a module in this way, set up before the module's imports.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when the thread that started it ends. Has no effect on other systems.

    `parent`: process id of the parent. If the parent has ended already, this process exits at once. None: no check.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def leave_signals_to_parent() -> None:
    """Ignore signals that ask to stop. The parent receives them too, and stops this process in order.

    A terminal sends SIGINT to a group of processes; systemd and batch systems send SIGTERM to all of a service or job.
    Children of this process have the default handlers.
    """
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
