"""Read FP8 weights as transformers, DeepSeek, Qwen, Mistral and AutoFP8 store them, or make them while loading.

A weight is `code · scale`. The scales, `weight_scale_inv` or `weight_scale`, are of blocks of `weight_block_size`, of
single rows, or one for the tensor. With static activations, `activation_scale` or `input_scale` is their scale.

Made while loading: e4m3 with a scale for each row, so that the largest magnitude of a row becomes 448. Embedding tables
and output layers stay as stored.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenmill.quant import _eight, _made
from tokenmill.quant._beside import Block
from tokenmill.quant._made import Floats
from tokenmill.quant._method import Matrix
from tokenmill.quant._settings import described, misfits, settings
from tokenmill.quant.base import Piece
from tokenmill.quant.coded import Coded
from tokenmill.weights.checkpoint import Checkpoint

WHILE_LOADING = True

_MAX = 448.0  # of e4m3
_FORMATS = ("e4m3", "e5m2", "float8_e4m3fn", "float8_e5m2")
_SCHEMES = ("dynamic", "static")


class Settings(msgspec.Struct):
    """Fields of the checkpoint's description that are read."""

    weight_block_size: list[int] | None = None
    activation_scheme: str = "dynamic"
    fmt: str = "e4m3"


def matrix(source: Checkpoint, name: str) -> Matrix | None:
    """Return how a weight is stored; see `base`."""
    return _eight.matrix(source, name, _block(source))


def is_made(source: Checkpoint) -> bool:
    """Return True if FP8 weights are made while loading, False if they are stored."""
    return described(source) is None


def read(source: Checkpoint, piece: Piece) -> Coded:
    """Read a piece in FP8 with its scales, or make it if the checkpoint is not quantized."""
    if is_made(source):
        return _made.read_products(source, piece, by_rows)
    return _eight.read(source, piece, _block(source))


def _block(source: Checkpoint) -> Block | None:
    """Return the block of scales that config.json states. Raises ModelError for a field that is not supported."""
    given = settings(source, Settings)
    cure = "Serve a checkpoint of the model that is stored in one of these ways."
    if given.fmt not in _FORMATS:
        raise misfits(source, "fmt", given.fmt, _FORMATS[:2], cure)
    if given.activation_scheme not in _SCHEMES:
        raise misfits(source, "activation_scheme", given.activation_scheme, _SCHEMES, cure)
    block = given.weight_block_size
    if not block:
        return None
    if len(block) != 2 or min(block) < 1:
        raise misfits(source, "weight_block_size", block, ("[rows, columns]",), "Copy config.json again.")
    return block[0], block[1]


def by_rows(x: Floats) -> Coded:
    """Quantize x, (rows, columns), to e4m3 with a scale for each row."""
    scale = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-30)) / np.float32(_MAX)
    return Coded(to_e4m3(x / scale), "e4m3", scale, (1, 0))


def to_e4m3(x: Floats) -> NDArray[np.uint8]:
    """Return the codes of float8_e4m3fn nearest to numbers, ties to even. Beyond ± 448 they are those of ± 448."""
    size = np.minimum(np.abs(x), np.float32(_MAX))
    bits = size.view(np.uint32)
    normal = ((bits + np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)) - np.uint32(960)
    code = np.where(size < np.float32(2**-6), np.rint(size * np.float32(512)).astype(np.uint32), normal)
    return np.asarray(code | np.signbit(x).astype(np.uint32) << np.uint32(7)).astype(np.uint8)
