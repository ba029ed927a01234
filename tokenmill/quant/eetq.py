"""Make int8 weights with a scale for each output while loading, as EETQ does; activations are not quantized.

Embedding tables and output layers stay as stored.
"""

from __future__ import annotations

from tokenmill.quant import _made
from tokenmill.quant.base import Piece
from tokenmill.quant.bitsandbytes import int8_rows
from tokenmill.quant.coded import Coded
from tokenmill.weights.checkpoint import Checkpoint

WHILE_LOADING = True


def read(source: Checkpoint, piece: Piece) -> Coded:
    """Read a piece of a checkpoint that is not quantized, and quantize it if it is the matrix of a product."""
    return _made.read_products(source, piece, int8_rows)
