"""Codes packed into words of 32 bits, as GPTQ, AWQ and Marlin store them, and checks of their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import ModelError, Unsupported
from tokenmill.quant import none
from tokenmill.quant.base import Coded
from tokenmill.quant.formats import PACKED, nibbles
from tokenmill.weights.checkpoint import Checkpoint

Words = NDArray[np.uint32]
Codes = NDArray[np.uint8]

INTEGERS = ("I32",)
FLOATS = ("F16", "BF16", "F32")

_FORMATS = {2: ("i3", 2), 3: ("i3", 4), 4: ("u4", 0), 8: ("i8", 128)}
"""Bits -> a format that holds the codes, and what is subtracted from them for it"""


def require(source: Checkpoint, name: str, kinds: Sequence[str], shape: tuple[int, ...], why: str) -> None:
    """Raise ModelError unless a tensor is there, of one of these types and of this shape. `why`: what demands it."""
    found = source.shape(name)
    if found is None:
        raise ModelError(
            f"The weights have no tensor {name!r}, which {why} needs with shape {shape}. Download the model again, or "
            "quantize it again."
        )
    if found != shape:
        raise ModelError(
            f"The tensor {name!r} has shape {found}; {why} needs {shape}. Correct the configuration, or download the "
            "model again."
        )
    kind = source[name].kind
    if kind not in kinds:
        raise Unsupported("type of weights", kind, kinds, f"It is what {name!r} is stored in; {why} needs another.")


def words(source: Checkpoint, name: str) -> Words:
    """Return a matrix of 32-bit integers as unsigned words, a view of the file."""
    stored = source[name]
    return np.ascontiguousarray(stored.data).view(np.uint32).reshape(stored.shape)


def floats(source: Checkpoint, name: str) -> NDArray[Any]:
    """Return a matrix of scales: float16 as stored, others as float32. ModelError if one is no finite number."""
    stored = source[name]
    if stored.kind == "F16":
        found: NDArray[Any] = np.ascontiguousarray(stored.data).view(np.float16).reshape(stored.shape)
    else:
        found = none.floats(stored).reshape(stored.shape)
    if not np.isfinite(found).all():
        raise ModelError(
            f"The tensor {name!r} has scales that are no finite numbers. Download or quantize the model again."
        )
    return found


def unpack(packed: Words, bits: int) -> Codes:
    """Unpack words along the last axis, (…, words) -> (…, codes). The first code is in the lowest bits of a word.

    Codes of three bits run on from word to word, 32 codes in three.
    """
    raw = np.ascontiguousarray(packed)
    if bits == 8:
        return raw.view(np.uint8)
    if bits == 3:
        bit = np.unpackbits(raw.view(np.uint8), axis=-1, bitorder="little").reshape(*raw.shape[:-1], -1, 3)
        return np.asarray(bit[..., 0] | bit[..., 1] << np.uint8(1) | bit[..., 2] << np.uint8(2))
    each, last = 8 // bits, np.uint8((1 << bits) - 1)
    codes = np.empty((*raw.shape[:-1], raw.shape[-1] * 4 * each), np.uint8)
    for place in range(each):
        codes[..., place::each] = raw.view(np.uint8) >> np.uint8(bits * place) & last
    return codes


def nibbles_of(packed: Words) -> Codes:
    """Return codes of 4 bits as `formats.nibbles` packs them: (words of inputs, outputs) -> (outputs, blocks, 16).

    Equals `nibbles` of the unpacked codes, transposed. Of a block of four words, byte 2 · b of the result has the codes
    2 · b and 2 · b + 16, which are in byte b of a word of the first two and of the last two.
    """
    blocks, outputs = packed.shape[0] // 4, packed.shape[1]
    out = np.empty((outputs, blocks, 2, 2), np.uint32)
    for start in range(0, outputs, _AT_ONCE):
        some = np.ascontiguousarray(packed[:, start : start + _AT_ONCE]).reshape(blocks, 4, -1)
        first, second = some[:, :2], some[:, 2:]
        even = (first & _LOW) | (second & _LOW) << _FOUR
        odd = (first >> _FOUR & _LOW) | (second & _HIGH)
        to = out[start : start + _AT_ONCE].transpose(1, 2, 3, 0)
        to[:, :, 0] = _apart(even & _HALF) | _apart(odd & _HALF) << _EIGHT
        to[:, :, 1] = _apart(even >> _SIXTEEN) | _apart(odd >> _SIXTEEN) << _EIGHT
    return out.view(np.uint8).reshape(outputs, blocks, PACKED // 2)


_AT_ONCE = 128  # outputs that are unpacked at a time, so that they fit a core's cache
_LOW, _HIGH, _HALF, _BYTES = (np.uint32(n) for n in (0x0F0F0F0F, 0xF0F0F0F0, 0xFFFF, 0x00FF00FF))
_FOUR, _EIGHT, _SIXTEEN = (np.uint32(n) for n in (4, 8, 16))


def _apart(pairs: Words) -> Words:
    """Move the two low bytes of words to the bytes 0 and 2."""
    return np.asarray((pairs | pairs << _EIGHT) & _BYTES)


def nibbles_of_rows(codes: Codes) -> Codes:
    """Return codes of 4 bits as `formats.nibbles` packs them: (inputs, outputs) -> (outputs, blocks, 16)."""
    blocks, outputs = codes.shape[0] // PACKED, codes.shape[1]
    out = np.empty((outputs, blocks, 4), np.uint32)
    for start in range(0, outputs, _AT_ONCE):
        some = codes[:, start : start + _AT_ONCE].reshape(blocks, 2, 4, 4, -1)
        pairs = (some[:, 0] | some[:, 1] << np.uint8(4)).astype(np.uint32)  # (blocks, words, bytes, outputs)
        word = pairs[:, :, 0] | pairs[:, :, 1] << _EIGHT | pairs[:, :, 2] << _SIXTEEN | pairs[:, :, 3] << np.uint32(24)
        out[start : start + _AT_ONCE] = word.transpose(2, 0, 1)
    return out.view(np.uint8).reshape(outputs, blocks, PACKED // 2)


def rows_of(packed: Words, order: Sequence[int] = range(8)) -> Codes:
    """Unpack words of eight codes of 4 bits along the rows: (words, columns) -> (8 · words, columns).

    `order`: the row of each code of a word among the eight.
    """
    codes = np.empty((len(packed), 8, packed.shape[1]), np.uint8)
    for place, row in enumerate(order):
        codes[:, row] = packed >> np.uint32(4 * place) & np.uint32(15)
    return codes.reshape(-1, packed.shape[1])


def coded(
    codes: Codes,
    bits: int,
    scale: NDArray[Any],
    zero: NDArray[np.int16],
    group: int,
    order: NDArray[np.intp] | None = None,
) -> Coded:
    """Return a matrix of unsigned codes, (rows, columns) or packed nibbles, with scales and zeros (rows, groups).

    `group`: number of columns of a group; 0: all. `order`: as in `Coded`.
    """
    name, less = _FORMATS[bits]
    if codes.ndim == 2 and bits == 4 and codes.shape[1] % PACKED == 0:
        codes = nibbles(codes.reshape(len(codes), -1, PACKED))
    found: NDArray[Any] = codes
    if less:
        found = (codes - np.uint8(less)).view(np.int8)
        zero = zero - np.int16(less)
    if zero.size and (zero == zero.flat[0]).all():
        zero = zero[:1, :1]
    return Coded(found, name, np.ascontiguousarray(scale), (1, group), zero=zero, order=order)


def groups_of(index: NDArray[np.integer[Any]], group: int) -> tuple[NDArray[np.intp] | None, NDArray[np.intp], int]:
    """Order the columns by group. `index`: the group of each column; `group`: the usual size of one.

    Returns the order of the columns (None: as they are), the group of each block of them, and the columns of a block:
    `group` if all groups have that size, else the largest power of two by which they can be divided.
    """
    columns = len(index)
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    sizes = [group, *(1 << n for n in range(group.bit_length(), -1, -1))]
    size = next(n for n in sizes if n and _uniform(ordered, n))
    moved = None if np.array_equal(order, np.arange(columns)) else order
    return moved, ordered[::size].astype(np.intp), 0 if size >= columns else size


def _uniform(ordered: NDArray[np.integer[Any]], size: int) -> bool:
    """Return True if no block of `size` columns, of which the last may be shorter, has columns of two groups."""
    starts = np.repeat(ordered[::size], size)[: len(ordered)]
    return bool((starts == ordered).all())


def packed(codes: Codes, bits: int) -> Words:
    """Pack codes of 4 or 8 bits along the last axis, as `unpack` reads them: (…, codes) -> (…, words)."""
    each = 32 // bits
    shifts = np.arange(each, dtype=np.uint32) * np.uint32(bits)
    words: Words = (codes.reshape(*codes.shape[:-1], -1, each).astype(np.uint32) << shifts).sum(-1, dtype=np.uint32)
    return words
