"""Decode steps captured as CUDA graphs, one for each batch size of a list, which share one pool of memory.

The largest size and powers of two are captured before the first step, so that no step is padded to more than about
twice its rows; the other sizes in idle time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.shapes import Contexts, graph_sizes, variant_of, variants


class Graphs:
    """Captured decode steps by size. A device without graphs has none.

    `wanted`: sizes, all captured before the first step; None: `graph_sizes`; empty: none. `first`: sizes captured
    before the first step; `later`: sizes captured in idle time; the largest first. `coded`: the cache has 8-bit codes.
    """

    def __init__(self, device: Device, most: int, wanted: tuple[int, ...] | None, coded: bool = False) -> None:
        self._coded = coded
        sizes = graph_sizes(most) if wanted is None else sorted({min(size, most) for size in wanted}, reverse=True)
        sizes = sizes if device.real else []
        self.first = [s for s in sizes if wanted is not None or s == sizes[0] or s & (s - 1) == 0]
        self.later = [s for s in sizes if s not in self.first]
        self._next = [0] * (most + 1)  # rows -> the size that they are padded to
        self._captured: dict[tuple[int, Contexts], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if sizes else None

    def __len__(self) -> int:
        """Number of graphs once all are captured."""
        return sum(len(variants(size, self._coded)) for size in (*self.first, *self.later))

    def padded(self, rows: int) -> int:
        """Return the size that a step of so many rows is padded to; 0 without a graph for it."""
        return self._next[rows]

    def missing(self, sizes: list[int]) -> list[tuple[int, Contexts]]:
        """Return the variants of `sizes` not captured yet, in order: a size, and the kind of contexts."""
        wanted = [(size, contexts) for size in sizes for contexts in variants(size, self._coded)]
        return [variant for variant in wanted if variant not in self._captured]

    def capture(self, size: int, contexts: Contexts, run: Callable[[], None]) -> None:
        """Capture the launches of `run`, which must have run once before. The device must be idle.

        Steps use a size once all its variants are captured. A torch.OutOfMemoryError leaves the other graphs intact.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        self._captured[size, contexts] = graph
        self._update()

    def _update(self) -> None:
        ready = [s for s in (*self.first, *self.later) if not self.missing([s])]
        self._next = [min((s for s in ready if s >= rows > 0), default=0) for rows in range(len(self._next))]

    def replay(self, size: int, contexts: Contexts) -> None:
        """Launch a captured step."""
        self._captured[size, variant_of(size, contexts, self._coded)].replay()

    def give_up(self, size: int) -> None:
        """Capture no more sizes. `size`: not used, because a capture of it failed, on this rank or another."""
        self.later = [s for s in self.later if s != size and not self.missing([s])]
        self._update()

    def clear(self) -> None:
        """Drop the graphs. Idempotent."""
        self.first, self.later = [], []
        self._captured.clear()
        self._next = [0] * len(self._next)
