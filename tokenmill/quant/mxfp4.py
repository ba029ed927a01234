"""Read MXFP4 weights of gpt-oss: four bits in blocks of 32 columns that share a power of two.

`NAME_blocks` (…, rows, blocks, 16 bytes) has the codes of adjacent columns in the low and high nibble of a byte, and
`NAME_scales` (…, rows, blocks) biased exponents. Rows are outputs, although transformers holds the same matrices
transposed. A tensor that is stored plain stays as it is.
"""

from __future__ import annotations

from tokenmill.errors import ModelError
from tokenmill.quant import none
from tokenmill.quant._beside import kind_of, misfit, powers_of_two
from tokenmill.quant._fp4 import MX, fp4
from tokenmill.quant._method import Matrix
from tokenmill.quant.base import Piece
from tokenmill.quant.coded import Coded
from tokenmill.weights.checkpoint import Checkpoint, Stored

_SCALE_KINDS = ("U8", "F8_E8M0")


def matrix(source: Checkpoint, name: str) -> Matrix | None:
    """Return how a weight is stored; see `base`."""
    if source.shape(f"{name}_blocks") is None:
        return None
    blocks, scales = _tensors(source, name)
    return Matrix((*blocks.shape[:-2], blocks.shape[-2] * MX), (blocks.name, scales.name))


def read(source: Checkpoint, piece: Piece) -> Coded:
    """Read a piece in MXFP4, or as stored if it is plain."""
    if source.shape(f"{piece.name}_blocks") is None:
        return none.read(source, piece)
    blocks, scales = (stored.at(piece.index) for stored in _tensors(source, piece.name))
    raw = blocks.data.reshape(blocks.shape[0], -1)[piece.rows]
    return fp4(raw, powers_of_two(scales.data[piece.rows]), MX).take(slice(None), piece.columns)


def _tensors(source: Checkpoint, name: str) -> tuple[Stored, Stored]:
    """Return the codes and scales. Raises ModelError if they do not fit each other."""
    blocks = source[f"{name}_blocks"]
    kind_of(blocks, ("U8",), "codes of MXFP4")
    if len(blocks.shape) < 3 or blocks.shape[-1] != MX // 2:
        raise misfit(blocks, f"(…, rows, blocks, {MX // 2})", "MXFP4")
    if source.shape(f"{name}_scales") is None:
        raise ModelError(f"{blocks.name!r} has no scales: {name + '_scales'!r} is missing. Download the model again.")
    scales = source[f"{name}_scales"]
    kind_of(scales, _SCALE_KINDS, "scales of MXFP4")
    if scales.shape != blocks.shape[:-1]:
        raise misfit(scales, blocks.shape[:-1], f"{blocks.name!r} of shape {tuple(blocks.shape)}")
    return blocks, scales
