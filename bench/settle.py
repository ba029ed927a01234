"""Wait until a server has finished its deferred idle work, which would otherwise disturb a measurement."""

from __future__ import annotations

import contextlib
import time

import psutil

QUIET_S = 6.0
"""Idle time after which a server counts as settled. tokenmill's idle work begins 3 s after a request, 1 s apart."""

_MOST_S = 60.0
_LOOK_S = 0.5
_QUIET_SHARE = 0.02  # of one CPU, for heartbeats


def settle(pid: int) -> float:
    """Wait until a process and its descendants are idle, at most a minute; return the CPU seconds that they used."""
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
