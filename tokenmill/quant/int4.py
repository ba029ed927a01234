"""Quantize float weights to int4 while loading, in blocks of 32 columns with a float16 scale and minimum each.

Codes are computed from the block's range. Scale and minimum are then fitted to the codes by least squares, which lowers
the relative root-mean-square error on normally distributed weights from 7.8 % to 7.5 %. Embedding tables, and output
layers tied to them, are quantized to int8: they lose most accuracy and take the smallest part of a step. Norms and
biases stay as stored.
"""

from __future__ import annotations

import numpy as np

from tokenmill.quant import _made, int8
from tokenmill.quant._made import Floats
from tokenmill.quant.base import Coded, Piece
from tokenmill.quant.formats import nibbles
from tokenmill.weights.checkpoint import Checkpoint

WHILE_LOADING = True


def read(source: Checkpoint, piece: Piece) -> Coded:
    """Read a piece, and quantize it if it is a matrix whose columns are whole blocks."""
    return _made.read(source, piece, int8.blocks if piece.weight.table else blocks)


def blocks(x: Floats) -> Coded:
    """Quantize x, (rows, blocks, 32), to codes 0…15."""
    low = x.min(-1)
    codes = _codes(x, low, (x.max(-1) - low) / np.float32(15))
    scale, low = _fitted(x, codes)
    stored, low16 = _made.rounded(scale)[0], np.clip(low, -65504, 65504).astype(np.float16)
    # Compute the codes again from the rounded scale and minimum, so that the codes compensate the rounding.
    codes = _codes(x, low16.astype(np.float32), stored.astype(np.float32))
    return Coded(nibbles(codes.astype(np.uint8)), "u4", stored, (1, _made.BLOCK), low=low16)


def _codes(x: Floats, low: Floats, scale: Floats) -> Floats:
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    codes: Floats = np.clip(np.rint((x - low[..., None]) * inverse[..., None]), 0, 15)
    return codes


def _fitted(x: Floats, codes: Floats) -> tuple[Floats, Floats]:
    """Return the scale and minimum that minimize the squared error for given codes."""
    mean_x, mean_code = x.mean(-1), codes.mean(-1)
    away = codes - mean_code[..., None]
    spread = np.square(away).sum(-1)
    scale = np.divide((away * x).sum(-1), spread, out=np.zeros_like(spread), where=spread > 0)
    return scale, mean_x - scale * mean_code
