"""Tune memory management once, after the start-up of a process."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def freeze_gc() -> None:
    """Exempt all existing objects from garbage collection, and return freed memory to the system (glibc only)."""
    gc.collect()
    gc.freeze()
    with contextlib.suppress(AttributeError, OSError):  # malloc_trim exists in glibc only
        ctypes.CDLL(None).malloc_trim(0)
