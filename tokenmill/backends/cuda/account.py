"""Where a GPU's memory goes besides the KV cache: counted before the cache gets the rest, and told in one line."""

from __future__ import annotations

import logging
from dataclasses import dataclass

_NODE_BYTES = 16 << 10  # of a captured launch; drivers differ, and this is more than most take
_LIBRARY_BYTES = 512 << 20  # of cuBLAS' workspaces, the code of kernels and their stacks
_GIB = float(1 << 30)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Account:
    """Bytes. What is taken: `weights`; `step`, all that a step finds in its place; `sampler`.

    What is not taken yet: `passing`, what a step takes for a while, `graphs`, and what `libraries` take.
    """

    weights: int
    step: int
    sampler: int
    passing: int
    graphs: int
    libraries: int

    @property
    def to_come(self) -> int:
        """Bytes to leave free beside the cache."""
        return self.passing + self.graphs + self.libraries

    def tell(self, cache_bytes: int, tokens: int, taken: int, free: int) -> None:
        """In the log. `tokens`: that the cache holds; `taken`: bytes that graphs and libraries have taken by now;
        `free`: those of the device that are left.
        """
        parts = (self.weights, self.step, self.sampler, taken, cache_bytes)
        _log.info(
            "GPU memory: weights %.1f GiB, step %.1f, sampler %.1f, graphs and libraries %.1f, KV cache %.1f GiB "
            "(%s tokens), free %.1f, of which %.1f are kept for more graphs and what a step takes for a while.",
            *(part / _GIB for part in parts), f"{tokens:,}", free / _GIB, max(0, self.to_come - taken) / _GIB,
        )  # fmt: skip


def graph_bytes(graphs: int, launches: int) -> int:
    """Of so many graphs of so many launches each."""
    return graphs * launches * _NODE_BYTES


def library_bytes(real: bool) -> int:
    """Of a GPU's libraries."""
    return _LIBRARY_BYTES if real else 0
