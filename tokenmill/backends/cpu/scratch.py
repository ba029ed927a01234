"""Memory that kernels work on: aligned, zero, and not taken from the system before it is used."""

from __future__ import annotations

import mmap
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HUGE = 2 << 20  # bytes of a huge page
_MAPPED = 4 << 20  # arrays at least so large are mapped by themselves


def zeros(shape: tuple[int, ...], dtype: Any = np.uint8) -> NDArray[Any]:
    """64-byte aligned zeros. Large ones lie on huge pages, each of which is made when it is first written to."""
    size = prod(shape) * np.dtype(dtype).itemsize
    if size < _MAPPED:
        array, align = np.zeros(size + 64, np.uint8), 64
    else:
        # private: what is shared, as is mmap's default, gets no huge pages from most systems
        mapped = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapped.madvise(mmap.MADV_HUGEPAGE)
        array, align = np.frombuffer(mapped, np.uint8), _HUGE
    start = -array.ctypes.data % align
    view: NDArray[Any] = array[start : start + size].view(dtype).reshape(shape)
    return view


def touch(array: NDArray[Any]) -> None:
    """Have the system make all of an array's pages now."""
    array.reshape(-1).view(np.uint8)[:: mmap.PAGESIZE] = 0


def padded(floats: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy in whole vectors of 16, with zeros behind."""
    out: NDArray[np.float32] = zeros((-(-floats.size // 16) * 16,), np.float32)
    out[: floats.size] = floats.reshape(-1)
    return out
