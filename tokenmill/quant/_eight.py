"""Matrices of FP8 codes with scales of blocks, rows or the tensor, which several methods store."""

from __future__ import annotations

from dataclasses import replace

from tokenmill.errors import ModelError
from tokenmill.quant import none
from tokenmill.quant._beside import FLOATS, FP8, Beside, Block, grid_of, kind_of, number, scales
from tokenmill.quant._method import Matrix
from tokenmill.quant.base import Piece
from tokenmill.quant.coded import Coded
from tokenmill.weights.checkpoint import Checkpoint, Stored

SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
"""Suffixes of scales: of transformers and DeepSeek, of other programs, of DeepSeek V4, of Mistral"""
INPUT_SCALES = ("activation_scale", "input_scale", "qscale_act")
_BOUND = "input_scale_ub"  # of activations, in some files of fbgemm: the same as in config.json
_SCALE_KINDS = (*FLOATS, "F8_E8M0", "U8")


def matrix(source: Checkpoint, name: str, block: Block | None, *, turned: bool = False) -> Matrix | None:
    """Return how a matrix of FP8 codes is stored; None if the tensor `name` is missing or has no FP8 codes.

    `block`: of the scales, None: they are of rows or of the tensor. `turned`: it is stored (…, columns, rows).
    """
    shape = source.shape(name)
    if shape is None or source[name].kind not in FP8:
        return None
    if len(shape) not in (2, 3):
        raise ModelError(f"{name!r} has shape {shape}; a matrix of FP8 codes has two axes, a stack of them three.")
    tensors = Beside(source, name, 0 if len(shape) == 3 else None)
    outer = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
    grid_of(_scale(tensors, turned), outer[-2:], block)
    return Matrix(outer, (name, *tensors.names(*SCALES, *INPUT_SCALES, _BOUND)))


def read(source: Checkpoint, piece: Piece, block: Block | None, *, turned: bool = False) -> Coded:
    """Read a piece of a matrix of FP8 codes; arguments as of `matrix`. A tensor of floats stays as it is."""
    stored = piece.stored(source)
    if stored.kind not in FP8:
        return none.dense(stored, piece)
    tensors = Beside(source, piece.name, piece.index)
    static = tensors.find(*INPUT_SCALES)
    codes = stored.data.T if turned else stored.data
    scale, found = scales(_scale(tensors, turned), codes.shape, block)
    whole = Coded(codes, FP8[stored.kind], scale, found)
    return replace(whole, input_scale=None if static is None else number(static)).take(piece.rows, piece.columns)


def _scale(tensors: Beside, turned: bool) -> Stored:
    stored = tensors.need(*SCALES)
    kind_of(stored, _SCALE_KINDS, "scales")
    if turned and len(stored.shape) == 2 and stored.shape[0] == 1:  # a row, as the matrix is stored
        return replace(stored, shape=(stored.shape[1], 1), data=stored.data.reshape(stored.shape[1], -1))
    return stored
