"""Decode steps as CUDA graphs, one for each batch size of a list, sharing one pool of memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.shapes import graph_sizes


class Graphs:
    """`wanted`: sizes to capture, None: a choice of its own, empty: none. On a device without graphs there are none."""

    def __init__(self, device: Device, most: int, wanted: tuple[int, ...] | None) -> None:
        sizes = graph_sizes(most) if wanted is None else sorted({min(size, most) for size in wanted}, reverse=True)
        self.sizes = sizes if device.real else []
        self._next = [0] * (most + 1)  # rows -> the size that they are padded to
        self._captured: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.sizes else None

    def padded(self, rows: int) -> int:
        """The size that a step of so many rows is run at; 0: there is no graph for it."""
        return self._next[rows]

    def capture(self, size: int, long: bool, run: Callable[[], None]) -> None:
        """Record what `run` launches; it must have run once before. `long`: of sequences that are. Nothing without
        graphs."""
        if size not in self.sizes:
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        self._captured[size, long] = graph
        self._next = [
            min((s for s, _ in self._captured if s >= rows > 0), default=0) for rows in range(len(self._next))
        ]

    def replay(self, size: int, long: bool) -> None:
        """Launch all that was recorded."""
        self._captured[size, long].replay()

    def clear(self) -> None:
        """Forget the graphs. Idempotent."""
        self._captured.clear()
        self._next = [0] * len(self._next)
