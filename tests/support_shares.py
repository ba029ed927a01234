"""The part of an array that a rank holds, by the definition of an axis: the oracle of sharded loading."""

from __future__ import annotations

import numpy as np

from tokenmill.program.share import Axis


def held(numbers: np.ndarray, axis: Axis, ranks: int, rank: int, dim: int) -> np.ndarray:
    """Return the elements of dimension `dim` that a rank holds, with zeros where it holds none."""
    parts = []
    for first, size in axis.spans(ranks, rank):
        found = numbers.take(range(max(first, 0), max(first, 0) + size), dim, mode="clip")
        parts.append(found * (first >= 0))
    return np.concatenate(parts, dim)
