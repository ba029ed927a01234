"""Read NVIDIA's ModelOpt weights: FP8 with one scale for a tensor, or NVFP4.

The description is in hf_quant_config.json or config.json. NVFP4: `weight` has two codes a byte, `weight_scale` FP8
scales of 16 columns, which `weight_scale_2` multiplies. `input_scale` is that of activations.
"""

from __future__ import annotations

from typing import Any

import msgspec

from tokenmill.quant import _eight, _fp4, none
from tokenmill.quant._beside import FP8, Beside
from tokenmill.quant._method import Matrix
from tokenmill.quant._settings import misfits, settings
from tokenmill.quant.base import Piece
from tokenmill.quant.coded import Coded
from tokenmill.weights.checkpoint import Checkpoint

_ALGORITHMS = ("FP8", "NVFP4")
_WHOLE = "weight_scale_2"
_BESIDE = ("weight_scale", _WHOLE, "input_scale")


class Quantization(msgspec.Struct):
    """Content of hf_quant_config.json's `quantization`."""

    quant_algo: str | None = None


class Settings(msgspec.Struct):
    """Fields of the checkpoint's description that are read: of either file."""

    quant_algo: str | None = None
    quantization: Quantization | None = None
    producer: Any = None


def _algorithm(source: Checkpoint) -> str | None:
    given = settings(source, Settings)
    return given.quant_algo or (given.quantization.quant_algo if given.quantization else None)


def notes(source: Checkpoint) -> list[str]:
    """Return a note for NVFP4, whose activations are not quantized."""
    told = "the checkpoint's quantization of activations, float4, is not applied"
    return [told] if _algorithm(source) == "NVFP4" else []


def matrix(source: Checkpoint, name: str) -> Matrix | None:
    """Return how a weight is stored; see `base`."""
    algorithm = _algorithm(source)
    if algorithm not in _ALGORITHMS:
        cure = "Serve a checkpoint of the model that is stored in one of these ways."
        raise misfits(source, "quant_algo", algorithm, _ALGORITHMS, cure)
    tensors = Beside(source, name)
    if source.shape(name) is not None and source[name].kind == "U8":
        found: Matrix | None = _fp4.matrix(source, name, "weight", _WHOLE)
    else:
        found = _eight.matrix(source, name, None)
    return None if found is None else found._replace(tensors=(name, *tensors.names(*_BESIDE)))


def read(source: Checkpoint, piece: Piece) -> Coded:
    """Read a piece in its codes, or as stored if it is plain."""
    stored = piece.stored(source)
    if stored.kind == "U8" and piece.weight.columns:
        return _fp4.read(source, piece, "weight", _WHOLE, divides=False)
    return _eight.read(source, piece, None) if stored.kind in FP8 else none.dense(stored, piece)
