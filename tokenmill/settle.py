"""What a process does once, when its start is over and its work begins."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def settle() -> None:
    """Let later garbage collections pass over what the start made, and give back what the start needed and freed."""
    gc.collect()
    gc.freeze()
    with contextlib.suppress(AttributeError, OSError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)
