"""Memory that kernels work on: aligned, zero, and not taken from the system before it is used."""

from __future__ import annotations

import mmap
import threading
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HUGE = 2 << 20  # bytes of a huge page
_MAPPED = 4 << 20  # arrays at least so large are mapped by themselves
_CHUNK = 32 << 20  # bytes that an arena takes from the system at a time


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


class Arena:
    """Room for arrays that last: small ones lie together, so that they are on huge pages, too. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: NDArray[np.uint8] = np.zeros(0, np.uint8)

    def zeros(self, shape: tuple[int, ...], dtype: Any = np.uint8) -> NDArray[Any]:
        """As the function of that name."""
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
    """A copy in whole vectors of 16, with zeros behind."""
    out: NDArray[np.float32] = zeros((-(-floats.size // 16) * 16,), np.float32)
    out[: floats.size] = floats.reshape(-1)
    return out
