"""Read GGUF's quantized types without quantizing them again.

Types with one scale per 32 columns keep their scales as views of the file. The K types and IQ4_XS (defined by
llama.cpp's ggml-quants.c) have superblocks of 256 columns whose scales are products, so they become float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from tokenmill.quant import _iq, none
from tokenmill.quant.base import Coded, Levels, Piece
from tokenmill.quant.formats import nibbles
from tokenmill.weights.checkpoint import Checkpoint, Stored
from tokenmill.weights.gguf_header import BLOCKS

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_BLOCK, _HALF_BLOCK, _SUPERBLOCK = (1, 32), (1, 16), (1, 256)
_EIGHT = np.full((1, 1), 8, np.uint8)


def read(source: Checkpoint, piece: Piece) -> Coded:
    """Read a piece in the file's own codes. Rows are outputs in every matrix, whatever transformers' file has."""
    stored = piece.stored(source)
    if stored.numbers is not None:
        computed = np.ascontiguousarray(stored.numbers([_floats(part) for part in stored.parts]), np.float32)
        stored = replace(stored, data=computed.reshape(stored.shape[0], -1).view(np.uint8), numbers=None)
    unpack = UNPACK.get(stored.kind)
    if unpack is None or not piece.weight.columns:
        return none.dense(stored, replace(piece, weight=replace(piece.weight, transposed=False)))
    raw = stored.data[piece.rows]
    return unpack(raw.reshape(len(raw), -1, BLOCKS[stored.kind][1])).take(slice(None), piece.columns)


def _floats(stored: Stored) -> Floats:
    """Return the numbers of a tensor."""
    rows = np.ascontiguousarray(stored.data).reshape(prod(stored.shape[:-1]), -1)
    unpack = UNPACK.get(stored.kind)
    if unpack is None:
        return none.floats(replace(stored, data=rows)).reshape(stored.shape)
    return unpack(rows.reshape(len(rows), -1, BLOCKS[stored.kind][1])).floats().reshape(stored.shape)


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


def _iq4_nl(raw: Bytes) -> Coded:
    return Coded(raw[..., 2:], "iq4", _half(raw[..., :2]), _BLOCK)


def _mxfp4(raw: Bytes) -> Coded:
    """Unpack OCP's MXFP4. A scale is a biased exponent; the numbers of the table are doubled, so 2^(exponent − 128)."""
    exponent = raw[..., 0].astype(np.uint32)
    bits = np.where(exponent < 2, np.uint32(0x200000) << exponent, (exponent - np.uint32(1)) << np.uint32(23))
    return Coded(raw[..., 1:], "e2m1x2", np.asarray(bits, np.uint32).view(np.float32), _BLOCK)


def _two_bits(raw: Bytes) -> Bytes:
    """Unpack codes of two bits, (…, 32 · n) bytes -> (…, 128 · n): bits 2 · i of 32 bytes are the i-th 32 columns."""
    shift = np.array([0, 2, 4, 6], np.uint8)[:, None]
    codes: Bytes = (raw.reshape(*raw.shape[:2], -1, 1, 32) >> shift) & np.uint8(3)
    return codes.reshape(*raw.shape[:2], -1)


def _tq2_0(raw: Bytes) -> Coded:
    codes = _two_bits(raw[..., :64]).view(np.int8) - np.int8(1)
    return Coded(codes.reshape(len(raw), -1, 32), "i3", _half(raw[..., 64:]), _SUPERBLOCK)


def _tq1_0(raw: Bytes) -> Coded:
    """Unpack ternary digits: five of a byte of 32 and then of 16, four of the last four bytes.

    A byte is the fraction 0.d1d2d3… in base 3, scaled to 256, so three times it overflows to the first digit.
    """
    digits = []
    for part, count in ((raw[..., :32], 5), (raw[..., 32:48], 5), (raw[..., 48:52], 4)):
        power = (3 ** np.arange(count)).astype(np.uint8)[:, None]
        shifted = part[..., None, :] * power  # the digits before are lost beyond the eighth bit
        digits.append(((shifted.astype(np.uint16) * 3) >> 8).reshape(*raw.shape[:2], -1))
    codes = np.concatenate(digits, -1).astype(np.int8) - np.int8(1)
    return Coded(codes.reshape(len(raw), -1, 32), "i3", _half(raw[..., 52:]), _SUPERBLOCK)


def _products(codes: NDArray[np.int8], factor: NDArray[np.float16]) -> Floats:
    """Return scales from their codes, (rows, superblocks, blocks), and a factor for each superblock: (rows, blocks)."""
    made: Floats = (codes * factor.astype(np.float32)[..., None]).reshape(len(codes), -1)
    return made


def _q2_k(raw: Bytes) -> Coded:
    scale, least = ((raw[..., :16] & 15).view(np.int8), (raw[..., :16] >> 4).view(np.int8))
    of_scale, of_low, rows = _half(raw[..., 80:82]), -_half(raw[..., 82:84]), len(raw)
    levels = Levels(scale.reshape(rows, -1), of_scale, least.reshape(rows, -1), of_low)
    codes = _two_bits(raw[..., 16:80]).reshape(rows, -1, 16)
    return Coded(codes, "u2", _products(scale, of_scale), _HALF_BLOCK, low=_products(least, of_low), levels=levels)


def _q3_k(raw: Bytes) -> Coded:
    """Unpack codes −4…3: two bits, and a high bit whose absence subtracts four.

    The low nibbles of eight bytes are the low four bits of the first eight scales, the high nibbles those of the rest.
    The bits 2 · i of four more bytes are the high two bits of scales 4 · i to 4 · i + 3. 32 is subtracted.
    """
    rows, packed, factor = len(raw), raw[..., 96:108], _half(raw[..., 108:])
    low = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], -1)
    high = (packed[..., None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    scale = (low | high.reshape(low.shape) << np.uint8(4)).view(np.int8) - np.int8(32)
    third = (raw[..., None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    codes = (_two_bits(raw[..., 32:96]) | third.reshape(*raw.shape[:2], -1) << np.uint8(2)).view(np.int8) - np.int8(4)
    levels = Levels(scale.reshape(rows, -1), factor)
    return Coded(codes.reshape(rows, -1, 16), "i3", _products(scale, factor), _HALF_BLOCK, levels=levels)


def _iq4_xs(raw: Bytes) -> Coded:
    """Unpack scales of six bits: nibbles in four bytes, and above them two bits each of a number of 16 bits."""
    rows, factor = len(raw), _half(raw[..., :2])
    low = np.stack([raw[..., 4:8] & 15, raw[..., 4:8] >> 4], -1).reshape(*raw.shape[:2], 8)
    shift = np.array([0, 2, 4, 6], np.uint8)
    high = ((raw[..., 2:4, None] >> shift) & 3).reshape(low.shape)
    scale = (low | high << np.uint8(4)).view(np.int8) - np.int8(32)
    levels = Levels(scale.reshape(rows, -1), factor)
    return Coded(raw[..., 8:].reshape(rows, -1, 16), "iq4", _products(scale, factor), _BLOCK, levels=levels)


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
    return _products(scale, of_scale), _products(least, of_low), levels


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
    rows = len(raw)
    levels = Levels(of_scale.reshape(rows, -1), factor)
    return Coded(codes.reshape(rows, -1, 16), "i6", _products(of_scale, factor), _HALF_BLOCK, levels=levels)


UNPACK: dict[str, Callable[[Bytes], Coded]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "MXFP4": _mxfp4,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    **_iq.UNPACK,
}
"""GGUF type -> function from (rows, blocks or superblocks, bytes of one) to Coded"""
