"""The device: fresh pinned buffers, copies that the host does not wait for, events.

On a "cpu" device, where Triton's interpreter runs the kernels (tests), everything happens at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNED = 16  # int32 numbers. Sections of a buffer are aligned, so that every kernel may load whole vectors.


class Device:
    """A torch device by name, made this thread's current one. `index`: of "cuda", among those that are visible."""

    def __init__(self, name: str, index: int = 0) -> None:
        self.torch = torch.device(f"cuda:{index}" if name == "cuda" else name)
        self.real = self.torch.type == "cuda"
        if self.real:
            torch.cuda.set_device(self.torch)
        # A kernel may begin while the one before it ends (programmatic dependent launch).
        self.copies_tiles = not self.real or torch.cuda.get_device_capability(self.torch) >= (9, 0)  # copy engine
        self.launches_ahead = self.real and torch.cuda.get_device_capability(self.torch) >= (9, 0)

    def send(self, array: NDArray[np.generic]) -> Tensor:
        """Return a copy on the device, made behind all earlier launches. The host does not wait."""
        host = torch.from_numpy(np.ascontiguousarray(array))
        return host.pin_memory().to(self.torch, non_blocking=True) if self.real else host.clone()

    def send_into(self, buffer: Tensor, sections: Sequence[NDArray[np.int32]]) -> list[Tensor]:
        """Copy the sections, each aligned, into `buffer` (n,) int32 by one copy, and return views of them."""
        sizes = [len(section) for section in sections]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // ALIGNED) * ALIGNED)
        host = torch.empty(starts[-1], dtype=torch.int32, pin_memory=self.real)
        for section, start, size in zip(sections, starts, sizes, strict=False):
            host.numpy()[start : start + size] = section
        buffer[: starts[-1]].copy_(host, non_blocking=True)
        return [buffer[start : start + size] for start, size in zip(starts, sizes, strict=False)]

    def fetch(self, tensor: Tensor) -> Tensor:
        """Return a copy in pinned memory, complete when a later mark has passed."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.real)
        return host.copy_(tensor, non_blocking=True)

    def mark(self) -> Mark:
        """Return a point behind all launches so far."""
        if not self.real:
            return Mark(None)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return Mark(event)

    def free_bytes(self) -> int:
        """Return the free bytes of a GPU's memory; 0 without a GPU."""
        return int(torch.cuda.mem_get_info(self.torch)[0]) if self.real else 0

    def finish(self) -> None:
        """Wait for all launches so far."""
        if self.real:
            torch.cuda.synchronize(self.torch)


class Mark:
    """A point in the device's queue."""

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self._event = event

    def wait(self) -> None:
        """Wait until the device has passed this point."""
        if self._event is not None:
            self._event.synchronize()
