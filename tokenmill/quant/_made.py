"""What the methods that quantize while loading share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tokenmill.quant import none
from tokenmill.quant.base import Blocks, Dense, Matrix, Piece
from tokenmill.weights.checkpoint import Checkpoint

BLOCK = 32  # columns that share a scale
_CHUNK = 1 << 18  # numbers quantized at a time: what a core's cache holds

Floats = NDArray[np.float32]


def read(source: Checkpoint, piece: Piece, make: Callable[[Floats], Blocks]) -> Matrix:
    """The piece through `make`, which gets (rows, blocks, 32); as stored if it is a vector or has no whole blocks."""
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
    """Scales as they will be stored, and what to multiply numbers with to get codes: 0 where the scale is."""
    stored = np.minimum(scale, np.float32(65504)).astype(np.float16)
    wide = stored.astype(np.float32)
    return stored, np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide > 0)
