"""Read unquantized weights, float32, float16 or bfloat16, as stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import Unsupported
from tokenmill.quant import base
from tokenmill.quant.base import Coded, Piece
from tokenmill.weights.checkpoint import Checkpoint, Stored

_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64}


def read(source: Checkpoint, piece: Piece) -> Coded:
    """Read a piece as a view of the file."""
    return dense(piece.stored(source), piece)


def dense(stored: Stored, piece: Piece) -> Coded:
    """Return the piece of a stored float tensor. Raises Unsupported for another type."""
    rows = _rows(stored)
    if not piece.weight.columns:
        return base.dense(rows.reshape(-1)[piece.rows])
    return base.dense(rows.T if piece.weight.transposed else rows).take(piece.rows, piece.columns)


def floats(stored: Stored) -> NDArray[np.float32]:
    """Return the numbers of a stored float tensor, (rows, columns). Raises Unsupported for another type."""
    return base.dense(_rows(stored)).floats()


def _rows(stored: Stored) -> NDArray[Any]:
    """Return the elements, without the dimensions of size 1 that `base.check` accepts."""
    if stored.kind not in _TYPES:
        raise Unsupported(
            "type of weights", stored.kind, _TYPES,
            f"It is what {stored.name!r} is stored in. If the weights are quantized, config.json lacks their "
            "quantization_config, or has that of another checkpoint: copy it from where they are from.",
        )  # fmt: skip
    rows = np.ascontiguousarray(stored.data).view(_TYPES[stored.kind])
    return rows.reshape(len(rows), -1)
