"""int8 made while loading: float weights in blocks of 32 columns with a float16 scale each.

A number is off by at most half of 1/127 of its block's largest: on normally distributed weights 0.5 % (root of the
mean square, relative), like GGUF's Q8_0. Norms and biases stay as they are.
"""

from __future__ import annotations

import numpy as np

from tokenmill.quant import _made
from tokenmill.quant._made import Floats
from tokenmill.quant.base import Blocks, Matrix, Piece
from tokenmill.weights.checkpoint import Checkpoint


def read(source: Checkpoint, piece: Piece) -> Matrix:
    """The piece, quantized if it is a matrix of whole blocks."""
    return _made.read(source, piece, blocks)


def blocks(x: Floats) -> Blocks:
    """(rows, blocks, 32) -> codes −127…127"""
    scale, inverse = _made.rounded(np.abs(x).max(-1) / np.float32(127))
    codes = np.clip(np.rint(x * inverse[..., None]), -127, 127).astype(np.int8)
    return Blocks(8, codes, scale)
