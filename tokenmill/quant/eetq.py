"""Make int8 weights with a scale for each output while loading, as EETQ does; activations are not quantized.

Embedding tables and output layers stay as stored.
"""

from __future__ import annotations

import numpy as np

from tokenmill.quant import _made
from tokenmill.quant._made import Floats
from tokenmill.quant.base import Piece
from tokenmill.quant.coded import Coded
from tokenmill.weights.checkpoint import Checkpoint

WHILE_LOADING = True


def read(source: Checkpoint, piece: Piece) -> Coded:
    """Read a piece of a checkpoint that is not quantized, and quantize it if it is the matrix of a product."""
    return _made.read_products(source, piece, by_rows)


def by_rows(x: Floats) -> Coded:
    """Quantize x, (rows, columns), to codes −127…127 with a float16 scale for each row."""
    scale, inverse = _made.rounded(np.abs(x).max(-1, keepdims=True) / np.float32(127))
    return Coded(np.clip(np.rint(x * inverse), -127, 127).astype(np.int8), "i8", scale, (1, 0))
