"""Account of a GPU's memory besides the KV cache: counted before the cache gets the rest, and logged in one line."""

from __future__ import annotations

import logging
from dataclasses import dataclass

_NODE_BYTES = 16 << 10  # of a captured launch. Drivers differ; this is more than most need.
_LIBRARY_BYTES = 512 << 20  # workspaces of cuBLAS, code and stacks of kernels
_GIB = float(1 << 30)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Account:
    """Bytes. Taken already: `weights`; `step`, the lasting memory of steps; `states`, those of
    all sequences; `sampler`.

    Not taken yet: `passing`, the temporary memory of a step; `graphs`; `libraries`.
    """

    weights: int
    step: int
    sampler: int
    passing: int
    graphs: int
    libraries: int
    states: int = 0

    @property
    def to_come(self) -> int:
        """Bytes to leave free beside the cache."""
        return self.passing + self.graphs + self.libraries

    def log(self, cache_bytes: int, capacity: str, taken: int, free: int) -> None:
        """Log the account.

        `capacity`: of the cache, with its unit. `taken`: bytes that graphs and libraries have taken by now. `free`:
        bytes of the device that are left.
        """
        parts = (self.weights, self.step, self.sampler, taken, cache_bytes)
        states = f" states {self.states / _GIB:.1f}," if self.states else ""
        _log.info(
            f"GPU memory: weights %.1f GiB, step %.1f,{states} sampler %.1f, graphs and libraries %.1f, "
            "KV cache %.1f GiB (%s), free %.1f, of which %.1f are kept for more graphs and what a step takes for a "
            "while.",
            *(part / _GIB for part in parts), capacity, free / _GIB, max(0, self.to_come - taken) / _GIB,
        )  # fmt: skip


def graph_bytes(graphs: int, launches: int) -> int:
    """Return the bytes of so many graphs of so many launches each."""
    return graphs * launches * _NODE_BYTES


def library_bytes(real: bool) -> int:
    """Return the bytes that libraries take on a GPU; 0 without one."""
    return _LIBRARY_BYTES if real else 0
