"""Functions shared by the methods that quantize while loading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tokenmill.program.ops import Weight
from tokenmill.quant import none
from tokenmill.quant.base import Coded, Piece, stack
from tokenmill.weights.checkpoint import Checkpoint

BLOCK = 32  # number of columns that share a scale
_CHUNK = 1 << 18  # numbers quantized at a time, so that they fit a core's cache

Floats = NDArray[np.float32]


def read(source: Checkpoint, piece: Piece, make: Callable[[Floats], Coded], block: int = BLOCK) -> Coded:
    """Read a piece and quantize it with `make`, a function of (rows, blocks, columns of a block).

    `block`: columns of a block; 0: `make` takes (rows, columns). A vector, an `exact` matrix, or one whose columns are
    not whole blocks, of 32 if `block` is 0, stays as stored.
    """
    if not piece.weight.columns or piece.weight.exact or piece.weight.columns % (block or BLOCK):
        return none.read(source, piece)
    if not block:  # a scale is that of a whole row, whatever columns of it a rank holds
        return _made(none.read(source, replace(piece, columns=slice(None))), make, 0).take(slice(None), piece.columns)
    return _made(none.read(source, piece), make, block)


def _made(stored: Coded, make: Callable[[Floats], Coded], block: int) -> Coded:
    rows, columns = stored.shape
    step = max(1, _CHUNK // columns)
    parts = []
    for start in range(0, rows, step):
        some = stored.take(slice(start, start + step), slice(None)).floats()
        parts.append(make(some.reshape(len(some), -1, block) if block else some))
    return stack(parts)


def read_products(source: Checkpoint, piece: Piece, make: Callable[[Floats], Coded], block: int = 0) -> Coded:
    """Read a piece as `read` does, but leave embedding tables and output layers as stored.

    They lose most accuracy, and the libraries whose names these methods have leave them, too.
    """
    return read(source, piece, make, block) if quantizes(piece.weight) else none.read(source, piece)


def quantizes(weight: Weight) -> bool:
    """Return True if `read_products` quantizes a weight, whole blocks of columns provided."""
    return weight.columns > 0 and not (weight.exact or weight.table or weight.shard == "vocab")


def rounded(scale: Floats) -> tuple[NDArray[np.float16], Floats]:
    """Return the scales as stored, and the factors from numbers to codes: the reciprocals, or 0 where a scale is 0."""
    stored = np.minimum(scale, np.float32(65504)).astype(np.float16)
    wide = stored.astype(np.float32)
    return stored, np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide > 0)
