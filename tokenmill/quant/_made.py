"""Functions shared by the methods that quantize while loading."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tokenmill.quant import none
from tokenmill.quant.base import Blocks, Dense, Matrix, Piece
from tokenmill.weights.checkpoint import Checkpoint

BLOCK = 32  # number of columns that share a scale
_CHUNK = 1 << 18  # numbers quantized at a time, so that they fit a core's cache

Floats = NDArray[np.float32]


def read(source: Checkpoint, piece: Piece, make: Callable[[Floats], Blocks]) -> Matrix:
    """Read a piece and quantize it with `make`, a function of (rows, blocks, 32).

    A vector, or a matrix whose columns are not whole blocks, stays as stored.
    """
    stored = none.read(source, piece)
    rows, columns = stored.shape if isinstance(stored, Dense) and len(stored.shape) == 2 else (0, 1)
    if not isinstance(stored, Dense) or columns % BLOCK:
        return stored
    step = max(1, _CHUNK // columns)
    parts = []
    for start in range(0, rows, step):
        some = stored.take(slice(start, start + step), slice(None)).floats()
        parts.append(make(some.reshape(len(some), -1, BLOCK)))
    lows = [p.low for p in parts if p.low is not None]
    return Blocks(
        parts[0].bits,
        np.concatenate([p.codes for p in parts]),
        np.concatenate([p.scale for p in parts]),
        np.concatenate(lows) if lows else None,
    )


def rounded(scale: Floats) -> tuple[NDArray[np.float16], Floats]:
    """Return the scales as stored, and the factors from numbers to codes: the reciprocals, or 0 where a scale is 0."""
    stored = np.minimum(scale, np.float32(65504)).astype(np.float16)
    wide = stored.astype(np.float32)
    return stored, np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide > 0)
