"""Make bitsandbytes' NF4 weights while loading: four bits, with a scale for each 64 columns.

Embedding tables and output layers stay as stored, as does a matrix whose columns are not whole blocks.
"""

from __future__ import annotations

from functools import partial

from tokenmill.quant import _made
from tokenmill.quant.base import Piece
from tokenmill.quant.bitsandbytes import four_bit_blocks
from tokenmill.quant.coded import Coded
from tokenmill.weights.checkpoint import Checkpoint

WHILE_LOADING = True

_BLOCK = 64


def read(source: Checkpoint, piece: Piece) -> Coded:
    """Read a piece of a checkpoint that is not quantized, and quantize it if it is the matrix of a product."""
    return _made.read_products(source, piece, partial(four_bit_blocks, name="nf4"), _BLOCK)
