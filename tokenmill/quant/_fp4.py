"""Matrices of FP4 codes (e2m1) with scales of 16 or 32 columns: MXFP4 and NVFP4, which several methods store."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.quant._beside import Beside, grid_of, kind_of, misfit, nibble_codes, number, numbers
from tokenmill.quant._method import Matrix
from tokenmill.quant.base import Piece
from tokenmill.quant.coded import Coded
from tokenmill.weights.checkpoint import Checkpoint, Stored

MX, NV = 32, 16  # columns that share a scale


def fp4(pairs: NDArray[np.uint8], scale: NDArray[Any], block: int) -> Coded:
    """Return a matrix of FP4 codes (rows, columns / 2 bytes), low nibble first, and scales of `block` columns.

    The numbers of its format are doubled, so that they are integers, and the scales are halved for it.
    """
    halved = np.ascontiguousarray(scale * np.float32(0.5), np.float32)
    return Coded(nibble_codes(pairs), "e2m1x2", halved, (1, block))


def matrix(source: Checkpoint, name: str, codes: str, whole: str) -> Matrix:
    """Return how a matrix is stored whose codes are the tensor with the suffix `codes`.

    `whole`: suffix of the scale of the whole tensor, which NVFP4 has; MXFP4 is a matrix without it.
    """
    tensors = Beside(source, name)
    shape, _, _ = _parts(tensors, codes, whole)
    return Matrix(shape, tuple(tensors.names(codes, "weight_scale", whole)))


def read(source: Checkpoint, piece: Piece, codes: str, whole: str, *, divides: bool) -> Coded:
    """Read a piece; arguments as of `matrix`. `divides`: scales are divided by the whole tensor's, else multiplied."""
    tensors = Beside(source, piece.name)
    (rows, _), stored, block = _parts(tensors, codes, whole)
    scale = numbers(tensors.need("weight_scale")).reshape(rows, -1)[piece.rows]
    if block == NV:
        factor = np.float32(number(tensors.need(whole)))
        scale = scale / factor if divides else scale * factor
    return fp4(stored.data[piece.rows], scale, block).take(slice(None), piece.columns)


def _parts(tensors: Beside, codes: str, whole: str) -> tuple[tuple[int, int], Stored, int]:
    """Return the shape of a matrix, its codes, and the columns of a scale. Raises ModelError for a misfit."""
    stored, scale = tensors.need(codes), tensors.need("weight_scale")
    kind_of(stored, ("U8",), "codes of FP4")
    if len(stored.shape) != 2:
        raise misfit(stored, "(rows, columns / 2)", "FP4")
    shape = stored.shape[0], 2 * stored.shape[1]
    block = NV if tensors.names(whole) else MX
    kind_of(scale, ("F8_E4M3",) if block == NV else ("U8", "F8_E8M0"), f"a scale of {block} columns of FP4")
    if block == NV and tensors.need(whole).data.size // 4 != 1:
        raise misfit(tensors.need(whole), "a single number", "NVFP4's scale of a tensor")
    grid_of(scale, shape, (1, block))
    return shape, stored, block
