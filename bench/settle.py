"""Waits until a server has done what it puts off until nobody asks: figures of its first seconds are told as such."""

from __future__ import annotations

import contextlib
import time

import psutil

QUIET_S = 6.0
"""Without work for so long, it is settled. tokenmill begins three seconds after a request, with pauses of one."""

_MOST_S = 60.0
_LOOK_S = 0.5
_QUIET_SHARE = 0.02  # of one CPU: heartbeats


def settle(pid: int) -> float:
    """Wait until a process and its descendants are quiet, a minute at most. Returns the CPU seconds that they took."""
    began = time.monotonic()
    quiet_since, first = began, _cpu_s(pid)
    before = first
    while (now := time.monotonic()) - quiet_since < QUIET_S and now - began < _MOST_S:
        time.sleep(_LOOK_S)
        after = _cpu_s(pid)
        if after - before > _QUIET_SHARE * _LOOK_S:
            quiet_since = time.monotonic()
        before = after
    return before - first


def _cpu_s(pid: int) -> float:
    total = 0.0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
    return total
