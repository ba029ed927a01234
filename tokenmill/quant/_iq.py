"""Read GGUF's IQ1, IQ2 and IQ3 types, whose codes are indexes of rows of grids (defined by llama.cpp's ggml-quants.c).

A superblock has 256 columns. The numbers of a grid with their signs become codes of 8 bits, so nothing is rounded; the
scales, which belong to 32 or 16 columns, are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.quant.base import Coded

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_GRIDS = "iq_grids.txt"
_OCTETS = np.arange(8, dtype=np.uint8)
_NIBBLES = np.array([0, 4], np.uint8)


@cache
def _grid(name: str) -> NDArray[np.int8]:
    """Return a grid, (rows, numbers of a row)."""
    lines = files(__package__).joinpath(_GRIDS).read_text().split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{name} "))
    _, width, bits, numbers = lines[start].split(" ")
    rows = []
    for line in lines[start + 1 :]:
        if " " in line or not line:
            break
        rows.append(line)
    packed = np.frombuffer(bytes.fromhex("".join(rows)), np.uint8)[:, None]
    codes = packed >> np.arange(0, 8, int(bits), dtype=np.uint8) & np.uint8((1 << int(bits)) - 1)
    found: NDArray[np.int8] = np.array(numbers.split(","), np.int8)[codes].reshape(-1, int(width))
    return found


def _half(raw: Bytes) -> Floats:
    """Return float16 numbers as float32: (…, 2) -> (…, 1)."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _signed(codes: NDArray[np.int8], signs: Bytes) -> NDArray[np.int8]:
    """Return codes, (…, 8 · n), negative where the bit of `signs`, (…, n), is set."""
    negative = (signs[..., None] >> _OCTETS) & np.uint8(1)
    return np.where(negative.reshape(codes.shape) > 0, -codes, codes)


def _even(signs: NDArray[Any]) -> Bytes:
    """Return seven signs with an eighth one that makes the number of negative ones even."""
    low = (signs & 127).astype(np.uint8)
    odd = np.bitwise_xor.reduce((low[..., None] >> _OCTETS) & np.uint8(1), -1)
    return np.asarray(low | odd << np.uint8(7))


def _coded(raw: Bytes, codes: NDArray[np.int8], scale: Floats, block: int) -> Coded:
    rows = len(raw)
    return Coded(codes.reshape(rows, -1), "i8", np.ascontiguousarray(scale.reshape(rows, -1)), (1, block))


def _words(raw: Bytes, kind: type[np.unsignedinteger[Any]]) -> NDArray[Any]:
    found: NDArray[Any] = np.ascontiguousarray(raw).view(kind)
    return found


def _iq2_xxs(raw: Bytes) -> Coded:
    """Per 32 columns: four indexes of a byte; then four times seven signs, and the scale in the top four bits."""
    words = _words(raw[..., 2:], np.uint32).reshape(*raw.shape[:2], 8, 2)
    indexes, rest = np.ascontiguousarray(words[..., 0]).view(np.uint8).reshape(*raw.shape[:2], 8, 4), words[..., 1]
    signs = _even(rest[..., None] >> np.array([0, 7, 14, 21], np.uint32))
    codes = _signed(_grid("IQ2_XXS")[indexes].reshape(*raw.shape[:2], 8, 32), signs)
    return _coded(raw, codes, _half(raw[..., :2]) * (np.float32(0.5) + (rest >> 28)) * np.float32(0.25), 32)


def _by_nibble(raw: Bytes) -> Bytes:
    """Return the nibbles of bytes, the low one first."""
    return ((raw[..., None] >> _NIBBLES) & np.uint8(15)).reshape(*raw.shape[:-1], -1)


def _iq2_xs(raw: Bytes) -> Coded:
    """Per eight columns: an index of nine bits and seven signs. A scale of four bits for 16 columns."""
    words, scales = _words(raw[..., 2:66], np.uint16), _by_nibble(raw[..., 66:])
    codes = _signed(_grid("IQ2_XS")[words & 511].reshape(*raw.shape[:2], 256), _even(words >> 9))
    return _coded(raw, codes, _half(raw[..., :2]) * (np.float32(0.5) + scales) * np.float32(0.25), 16)


def _iq2_s(raw: Bytes) -> Coded:
    """Per eight columns: an index of ten bits, whose high two are elsewhere, and eight signs."""
    low, signs, scales = raw[..., 2:34], raw[..., 34:66], _by_nibble(raw[..., 74:])
    high = (raw[..., 66:74, None] >> np.array([0, 2, 4, 6], np.uint8)) & np.uint8(3)
    indexes = low.astype(np.uint16) | high.reshape(low.shape).astype(np.uint16) << np.uint16(8)
    codes = _signed(_grid("IQ2_S")[indexes].reshape(*raw.shape[:2], 256), signs)
    return _coded(raw, codes, _half(raw[..., :2]) * (np.float32(0.5) + scales) * np.float32(0.25), 16)


def _iq3_xxs(raw: Bytes) -> Coded:
    """Per 32 columns: eight indexes of a byte; elsewhere four times seven signs, and the scale in the top four bits."""
    rest = _words(raw[..., 66:], np.uint32)
    signs = _even(rest[..., None] >> np.array([0, 7, 14, 21], np.uint32))
    codes = _signed(_grid("IQ3_XXS")[raw[..., 2:66]].reshape(*raw.shape[:2], 8, 32), signs)
    return _coded(raw, codes, _half(raw[..., :2]) * (np.float32(0.5) + (rest >> 28)) * np.float32(0.5), 32)


def _iq3_s(raw: Bytes) -> Coded:
    """Per four columns: an index of nine bits, whose high one is elsewhere; eight signs per eight columns."""
    low, signs, scales = raw[..., 2:66], raw[..., 74:106], _by_nibble(raw[..., 106:])
    high = ((raw[..., 66:74, None] >> _OCTETS) & np.uint8(1)).reshape(low.shape)
    indexes = low.astype(np.uint16) | high.astype(np.uint16) << np.uint16(8)
    codes = _signed(_grid("IQ3_S")[indexes].reshape(*raw.shape[:2], 256), signs)
    return _coded(raw, codes, _half(raw[..., :2]) * (1 + 2 * scales.astype(np.float32)), 32)


def _shifted(indexes: NDArray[Any], negative: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Return eight times the numbers of the grid of IQ1, moved by an eighth: (…) -> (…, 8)."""
    step = np.where(negative, np.int8(-1), np.int8(1))
    return np.asarray(_grid("IQ1_S")[indexes] * np.int8(8) + step[..., None])


def _iq1_s(raw: Bytes) -> Coded:
    """Per eight columns: an index of eleven bits. Per 32: a scale of three bits, and the sign of the move."""
    low, words = raw[..., 2:34], _words(raw[..., 34:], np.uint16)
    high = (words[..., None] >> np.array([0, 3, 6, 9], np.uint16)) & np.uint16(7)
    indexes = low.astype(np.uint16) | high.reshape(low.shape) << np.uint16(8)
    codes = _shifted(indexes, np.repeat(words & 0x8000 > 0, 4, -1))
    scale = _half(raw[..., :2]) * (2 * ((words >> 12) & 7).astype(np.float32) + 1)
    return _coded(raw, codes, scale / np.float32(8), 32)


def _iq1_m(raw: Bytes) -> Coded:
    """As IQ1_S, with a scale for 16 columns and a move for eight. The factor is in the top four bits of four words."""
    low, words = raw[..., :32], _words(raw[..., 48:], np.uint16)
    nibbles = _by_nibble(raw[..., 32:48])
    indexes = low.astype(np.uint16) | (nibbles & np.uint8(7)).astype(np.uint16) << np.uint16(8)
    pieces = (words & np.uint16(0xF000)) >> np.array([12, 8, 4, 0], np.uint16)
    factor = np.bitwise_or.reduce(pieces, -1).astype(np.uint16).view(np.float16).astype(np.float32)[..., None]
    scales = ((words[..., None] >> np.array([0, 3, 6, 9], np.uint16)) & np.uint16(7)).reshape(*raw.shape[:2], 16)
    codes = _shifted(indexes, nibbles & np.uint8(8) > 0)
    return _coded(raw, codes, factor * (2 * scales.astype(np.float32) + 1) / np.float32(8), 16)


UNPACK: dict[str, Callable[[Bytes], Coded]] = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}
"""GGUF type -> function from (rows, superblocks, bytes of one) to Coded"""
