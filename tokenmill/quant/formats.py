"""Formats of codes: the bits of a code, and the number that it stands for.

Codes of 4 bits may be packed in pairs, as in GGUF's Q4_0: 32 columns are 16 bytes, and byte k holds the code of column
k in its low nibble and that of column k + 16 in its high nibble. Any other code is an element of an array.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PACKED = 32  # columns of a group of packed nibbles

Floats = NDArray[np.float32]


class Format(NamedTuple):
    """The format of a code."""

    bits: int
    dtype: type[np.generic]  # of an element that holds one code
    table: Floats | None = None  # code -> number; None: the code is the number

    @property
    def integer(self) -> bool:
        """True if codes are integers."""
        return self.table is None and np.issubdtype(self.dtype, np.integer) and self.bits <= 8

    @property
    def integers(self) -> tuple[str, NDArray[np.int8]] | None:
        """Integer format that holds the numbers of the table, and the numbers in it; None if they are no integers."""
        if self.table is None or self.bits > 4 or not np.array_equal(self.table, np.rint(self.table)):
            return None
        least = next(name for name, size in (("i5", 16), ("i8", 128)) if np.abs(self.table).max() < size)
        return least, self.table.astype(np.int8)


def _e4m3() -> Floats:
    """Return the numbers of float8_e4m3fn, which has no infinities; 127 and 255 are NaN."""
    code = np.arange(256)
    exponent, fraction = (code >> 3 & 15).astype(np.float32), (code & 7).astype(np.float32)
    size = np.where(exponent > 0, np.exp2(exponent - 7) * (1 + fraction / 8), np.exp2(np.float32(-6)) * fraction / 8)
    size[code & 127 == 127] = np.nan
    return np.where(code < 128, size, -size).astype(np.float32)


def _e2m1() -> Floats:
    """Return the numbers of OCP's float4_e2m1, as in MXFP4 and NVFP4."""
    sizes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    return np.array([*sizes, *(-n for n in sizes)], np.float32)


_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
"""Sizes of bitsandbytes' FP4, by its code without the sign: the largest is 1"""

_IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
"""Levels of GGUF's IQ4 types, from ggml-common.h"""

_E5M2 = (np.arange(256, dtype=np.uint16) << np.uint16(8)).view(np.float16).astype(np.float32)
_NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""Quantiles of the normal distribution, from the paper on QLoRA, appendix E (arXiv:2305.14314)"""

FORMATS: dict[str, Format] = {
    "f32": Format(32, np.float32),
    "f64": Format(64, np.float64),
    "f16": Format(16, np.float16),
    "bf16": Format(16, np.uint16),  # numpy has no such type
    "u2": Format(2, np.uint8),  # an element for each code, as with i3
    "i3": Format(3, np.int8),  # −4…3
    "u4": Format(4, np.uint8),
    "u5": Format(5, np.int8),  # 0…31
    "i5": Format(5, np.int8),  # −16…15
    "i6": Format(6, np.int8),  # −32…31
    "i8": Format(8, np.int8),
    "e4m3": Format(8, np.uint8, _e4m3()),
    "e5m2": Format(8, np.uint8, _E5M2),
    "e2m1": Format(4, np.uint8, _e2m1()),
    "e2m1x2": Format(4, np.uint8, 2 * _e2m1()),  # as in GGUF's MXFP4, whose scales are halved for it
    "nf4": Format(4, np.uint8, _NF4),
    "fp4": Format(4, np.uint8, np.concatenate([_FP4, -_FP4])),  # bitsandbytes'
    "iq4": Format(4, np.uint8, _IQ4_NL),
}
"""Name -> format. Integers are named by sign and bits, floats by the bits of exponent and mantissa."""

FLOATS = ("f32", "f64", "f16", "bf16")
_OF_DTYPE = {np.dtype(FORMATS[name].dtype): name for name in FLOATS}


def float_format(dtype: np.dtype[Any]) -> str:
    """Return the format of unquantized numbers of a type; uint16 holds bfloat16."""
    return _OF_DTYPE[dtype]


def packed(codes: NDArray[Any], name: str) -> bool:
    """Return True if codes, as in `Coded.codes`, are packed nibbles."""
    return codes.ndim == 3 and FORMATS[name].bits == 4


def nibbles(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """Pack codes of 4 bits, uint8 (…, 32) -> (…, 16)."""
    half = PACKED // 2
    return np.asarray(codes[..., :half] | codes[..., half:] << np.uint8(4))


def decode(codes: NDArray[Any], name: str, out: Floats) -> None:
    """Write the numbers of codes into `out`, of the same shape, or (rows, groups, 32) if the codes are packed."""
    table = FORMATS[name].table
    if packed(codes, name):
        low, high = codes & 15, codes >> 4
        half = PACKED // 2
        out[..., :half], out[..., half:] = (low, high) if table is None else (table[low], table[high])
    elif table is not None:
        out[...] = table[codes]
    elif name == "bf16":
        np.left_shift(codes, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, codes, casting="same_kind")
