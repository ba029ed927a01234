"""Integers of 2 to 8 bits packed into words of 32 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD = 32


def words(count: int, bits: int) -> tuple[int, ...]:
    """Return the number of words of a row of `count` integers, in each way that rows are packed.

    Words hold as many whole integers as fit, from the lowest bits on; or the integers are one stream of bits. Both are
    the same unless `bits` is 3, 5, 6 or 7.
    """
    return tuple(dict.fromkeys((-(-count // (WORD // bits)), -(-count * bits // WORD))))


def unpacked(packed: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    """Return unsigned integers, (rows, count), of words, int32 (rows, words). The number of words tells the packing."""
    rows, whole = len(packed), WORD // bits
    packed = np.ascontiguousarray(packed).view(np.uint32)
    if packed.shape[1] == -(-count // whole):
        shifts = np.arange(whole, dtype=np.uint32) * np.uint32(bits)
        fields = (packed[..., None] >> shifts) & np.uint32((1 << bits) - 1)
        return np.asarray(fields.astype(np.uint8).reshape(rows, -1)[:, :count])
    stream = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little", count=count * bits)
    fields = np.packbits(stream.reshape(rows, count, bits), axis=2, bitorder="little")
    return np.asarray(fields.reshape(rows, count))
