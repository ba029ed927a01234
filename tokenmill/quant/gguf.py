"""Read GGUF's quantized types without quantizing them again.

Types with one scale per 32 columns keep their scales as views of the file. The K types (defined by llama.cpp's
ggml-quants.c) have superblocks of 256 columns whose scales are products, so they become float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tokenmill.quant import none
from tokenmill.quant.base import Coded, Levels, Piece
from tokenmill.quant.formats import nibbles
from tokenmill.weights.checkpoint import Checkpoint
from tokenmill.weights.gguf import BLOCKS

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_BLOCK, _HALF_BLOCK = (1, 32), (1, 16)
_EIGHT = np.full((1, 1), 8, np.uint8)


def read(source: Checkpoint, piece: Piece) -> Coded:
    """Read a piece in the file's own codes."""
    stored = piece.stored(source)
    unpack = UNPACK.get(stored.kind)
    if unpack is None or not piece.weight.columns:
        return none.dense(stored, piece)
    raw = stored.data[piece.rows]
    return unpack(raw.reshape(len(raw), -1, BLOCKS[stored.kind][1])).take(slice(None), piece.columns)


def _half(raw: Bytes) -> NDArray[np.float16]:
    """Reinterpret bytes as float16: (…, 2) -> (…)."""
    return np.ascontiguousarray(raw).view(np.float16)[..., 0]


def _q4_0(raw: Bytes) -> Coded:
    return Coded(raw[..., 2:], "u4", _half(raw[..., :2]), _BLOCK, zero=_EIGHT)


def _q4_1(raw: Bytes) -> Coded:
    return Coded(raw[..., 4:], "u4", _half(raw[..., :2]), _BLOCK, low=_half(raw[..., 2:4]))


def _q8_0(raw: Bytes) -> Coded:
    return Coded(raw[..., 2:].view(np.int8), "i8", _half(raw[..., :2]), _BLOCK)


def _five_bits(high: Bytes, low: Bytes) -> NDArray[np.int8]:
    """Combine fifth bits, (…, 4) bytes, and nibbles, (…, 16) bytes, to codes 0…31, (…, 32)."""
    bits = np.unpackbits(np.ascontiguousarray(high), axis=-1, bitorder="little")
    codes = np.concatenate([low & 15, low >> 4], -1) | bits << np.uint8(4)
    return np.asarray(codes).view(np.int8)


def _q5_0(raw: Bytes) -> Coded:
    return Coded(_five_bits(raw[..., 2:6], raw[..., 6:]) - np.int8(16), "i5", _half(raw[..., :2]), _BLOCK)


def _q5_1(raw: Bytes) -> Coded:
    codes = _five_bits(raw[..., 4:8], raw[..., 8:])
    return Coded(codes, "u5", _half(raw[..., :2]), _BLOCK, low=_half(raw[..., 2:4]))


def _scales(raw: Bytes) -> tuple[Floats, Floats, Levels]:
    """Unpack the scales and minima of superblocks.

    `raw`: (rows, superblocks, 16 bytes): factor of the scales, factor of the minima, 12 packed bytes. Returns the scale
    and the low of each block of 32 columns, (rows, 8 · superblocks), and their terms. Scales and minima have six bits.
    The low six bits of packed bytes 0…3 are the first four scales, those of bytes 4…7 the first four minima. Of the
    last four, the low nibbles are in bytes 8…11, and the high bits are the top two bits of bytes 0…7.
    """
    packed = raw[..., 4:16]
    a, b, c = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scale = np.concatenate([a & 63, c & 15 | (a >> 2) & 48], -1).view(np.int8)
    least = np.concatenate([b & 63, c >> 4 | (b >> 2) & 48], -1).view(np.int8)
    of_scale, of_low = _half(raw[..., :2]), -_half(raw[..., 2:4])
    rows = len(raw)
    levels = Levels(scale.reshape(rows, -1), of_scale, least.reshape(rows, -1), of_low)
    scales, lows = (
        (codes * factor.astype(np.float32)[..., None]).reshape(rows, -1)
        for codes, factor in ((scale, of_scale), (least, of_low))
    )
    return scales, lows, levels


def _q4_k(raw: Bytes) -> Coded:
    scale, low, levels = _scales(raw)
    q = raw[..., 16:].reshape(*raw.shape[:2], 4, 32)  # low nibbles hold 32 columns, high nibbles the next 32
    codes = np.stack([nibbles(q & 15), nibbles(q >> 4)], -2)  # (rows, superblocks, 4, 2, 16)
    return Coded(codes.reshape(len(raw), -1, 16), "u4", scale, _BLOCK, low=low, levels=levels)


def _q5_k(raw: Bytes) -> Coded:
    scale, low, levels = _scales(raw)
    fifth, q = raw[..., 16:48], raw[..., 48:].reshape(*raw.shape[:2], 4, 32)
    four = np.stack([q & 15, q >> 4], -2).reshape(*raw.shape[:2], 8, 32)
    bit = np.arange(8, dtype=np.uint8)[:, None]  # bit i of byte j belongs to column j of block i
    codes = four | ((fifth[..., None, :] >> bit) & 1) << np.uint8(4)
    codes = codes.view(np.int8).reshape(len(raw), -1, 32)
    return Coded(codes, "u5", scale, _BLOCK, low=low, levels=levels)


def _q6_k(raw: Bytes) -> Coded:
    low = raw[..., :128].reshape(*raw.shape[:2], 2, 1, 64)
    high = raw[..., 128:192].reshape(*raw.shape[:2], 2, 1, 32)
    four = np.concatenate([low & 15, low >> 4], -2).reshape(*raw.shape[:2], 2, 4, 32)
    pairs = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3  # two bits per column, four blocks per byte
    codes = (four | pairs << np.uint8(4)).view(np.int8) - np.int8(32)
    of_scale, factor = raw[..., 192:208].view(np.int8), _half(raw[..., 208:])
    scale = of_scale * factor.astype(np.float32)[..., None]
    rows = len(raw)
    levels = Levels(of_scale.reshape(rows, -1), factor)
    return Coded(codes.reshape(rows, -1, 16), "i6", scale.reshape(rows, -1), _HALF_BLOCK, levels=levels)


UNPACK: dict[str, Callable[[Bytes], Coded]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""GGUF type -> function from (rows, blocks or superblocks, bytes of one) to Coded"""
