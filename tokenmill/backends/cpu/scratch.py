"""Allocation of kernel memory: aligned zeros that the system commits on first use."""

from __future__ import annotations

import mmap
import threading
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HUGE = 2 << 20  # bytes of a huge page
_MAPPED = 4 << 20  # bytes from which an array gets its own mapping
_CHUNK = 32 << 20  # bytes that an arena allocates at a time


def zeros(shape: tuple[int, ...], dtype: Any = np.uint8) -> NDArray[Any]:
    """Allocate a 64-byte aligned array of zeros. Large arrays use huge pages, committed when first written to."""
    size = prod(shape) * np.dtype(dtype).itemsize
    if size < _MAPPED:
        array, align = np.zeros(size + 64, np.uint8), 64
    else:
        # Private, because most systems give no huge pages to shared mappings, which are mmap's default.
        mapped = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapped.madvise(mmap.MADV_HUGEPAGE)
        array, align = np.frombuffer(mapped, np.uint8), _HUGE
    start = -array.ctypes.data % align
    view: NDArray[Any] = array[start : start + size].view(dtype).reshape(shape)
    return view


class Arena:
    """A thread-safe allocator of long-lived arrays. Small ones are placed together, so that they use huge pages too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: NDArray[np.uint8] = np.zeros(0, np.uint8)

    def zeros(self, shape: tuple[int, ...], dtype: Any = np.uint8) -> NDArray[Any]:
        """Allocate like `scratch.zeros`."""
        size = prod(shape) * np.dtype(dtype).itemsize
        if size >= _MAPPED:
            return zeros(shape, dtype)
        with self._lock:
            if size > len(self._free):
                self._free = zeros((_CHUNK,))
            own, self._free = self._free[:size], self._free[-(-size // 64) * 64 :]
        view: NDArray[Any] = own.view(dtype).reshape(shape)
        return view


def padded(floats: NDArray[np.float32]) -> NDArray[np.float32]:
    """Copy a vector and pad it with zeros to a multiple of 16."""
    out: NDArray[np.float32] = zeros((-(-floats.size // 16) * 16,), np.float32)
    out[: floats.size] = floats.reshape(-1)
    return out
