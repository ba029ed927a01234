"""Orders of rows in which transformers and llama.cpp store the same matrices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import ModelError


def halves(data: NDArray[np.uint8], heads: int, name: str) -> NDArray[np.uint8]:
    """Reorder the rows of each head from adjacent pairs, as llama.cpp rotates them, to two halves."""
    rows, width = data.shape
    if rows % (heads * 2):
        raise ModelError(f"{name} has {rows} rows, which {heads} heads do not divide.")
    return data.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def by_head(data: NDArray[np.uint8], heads: int, kv: int, name: str) -> NDArray[np.uint8]:
    """Reorder the rows of all queries, keys and values to those of one key-value head after another."""
    rows, width = data.shape
    if rows % (heads + 2 * kv) or heads % kv:
        raise ModelError(f"{name} has {rows} rows, which {heads} heads and {kv} key-value heads do not divide.")
    size = rows // (heads + 2 * kv)
    parts = np.split(data, [heads * size, (heads + kv) * size])
    return np.concatenate([part.reshape(kv, -1, size, width) for part in parts], 1).reshape(rows, width)


def joined(first: NDArray[np.uint8], second: NDArray[np.uint8], rows: int, alternate: bool) -> NDArray[np.uint8]:
    """Join two stacks of `rows` rows each, (experts, bytes): all rows of the first one before, or row by row."""
    parts = [each.reshape(len(each), rows, -1) for each in (first, second)]
    both = np.stack(parts, 2) if alternate else np.concatenate(parts, 1)
    return both.reshape(len(first), -1)
