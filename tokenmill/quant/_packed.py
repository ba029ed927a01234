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
    """Return a matrix of floats: float16 as stored, others as float32."""
    stored = source[name]
    if stored.kind == "F16":
        return np.ascontiguousarray(stored.data).view(np.float16).reshape(stored.shape)
    return none.floats(stored).reshape(stored.shape)


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
    each = 8 // bits
    shifts = np.arange(each, dtype=np.uint8) * np.uint8(bits)
    codes = raw.view(np.uint8)[..., None] >> shifts & np.uint8((1 << bits) - 1)
    return np.asarray(codes.reshape(*raw.shape[:-1], -1))


def nibbles_of(packed: Words) -> Codes:
    """Return codes of 4 bits as `formats.nibbles` packs them: (rows, words) -> (rows, words // 4, 16).

    Equals `nibbles` of the unpacked codes. Byte b of four words has the codes of columns 2 · b and 2 · b + 1.
    """
    raw = np.ascontiguousarray(packed).view(np.uint8).reshape(len(packed), -1, PACKED // 2)
    first, second = raw[..., : PACKED // 4], raw[..., PACKED // 4 :]
    out = np.empty_like(raw)
    out[..., 0::2] = first & 15 | second << np.uint8(4)
    out[..., 1::2] = first >> np.uint8(4) | second & 240
    return out


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
