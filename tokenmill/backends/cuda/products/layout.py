"""Codes and scales laid out for the kernels of `kernels/coded.py`. By torch, on any device, once, while loading.

Codes lie in elements of 16 bits, 4 codes of 4 bits or 2 of 8, which belong to as many slices of `depth` columns:
element (row, block, c) holds the codes of columns block · slices · depth + j · depth + c for slices j = 0 … Slice j of
a tile of elements is then an operand of a product of that depth, with nothing moved between threads. Rows lie in groups
of ROWS whose elements of a block are adjacent, (rows / ROWS, blocks, ROWS, depth). With `together` = 1 they lie row by
row: a matrix (rows, columns) of 8 bits is then row-major, but for the order of the columns inside a block.

Columns are padded to whole blocks with codes 0, which meet zeros of x; rows to a multiple of ROWS.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenmill.backends.cuda.products.forms import ROWS, Form


def pack4(codes: Tensor, depth: int, together: int = ROWS, paired: bool = False) -> Tensor:
    """Return the elements, int16, of codes 0 … 15 (rows, columns), uint8.

    `paired`, for codes that are looked up in a table: the 32 bits of elements 2c and 2c + 1 hold the codes of columns
    2c and 2c + 1 of slice 0, then those of slice 1, and so on.
    """
    n, blocks, s = _sliced(codes, depth, 4, together)
    if paired:
        even, odd = s[..., 0::2], s[..., 1::2]
        byte = even | (odd << 4)
        low, high = byte[:, :, 0] | (byte[:, :, 1] << 8), byte[:, :, 2] | (byte[:, :, 3] << 8)
        tiles = torch.stack((low, high), -1).flatten(-2)
    else:
        tiles = s[:, :, 0] | (s[:, :, 1] << 4) | (s[:, :, 2] << 8) | (s[:, :, 3] << 12)
    return _grouped(tiles, n, blocks, depth, together)


def pack8(codes: Tensor, depth: int, together: int = ROWS) -> Tensor:
    """Return the elements, int16, of codes of 8 bits (rows, columns): int8, uint8 or float8."""
    n, blocks, s = _sliced(codes.view(torch.uint8), depth, 2, together)
    return _grouped(s[:, :, 0] | (s[:, :, 1] << 8), n, blocks, depth, together)


def _sliced(codes: Tensor, depth: int, slices: int, together: int) -> tuple[int, int, Tensor]:
    """Return the numbers of padded rows and of blocks, and the codes (rows, blocks, slices, depth) as int16."""
    codes = pad(codes, (0, -codes.shape[1] % (slices * depth), 0, -codes.shape[0] % together))
    n, blocks = codes.shape[0], codes.shape[1] // (slices * depth)
    return n, blocks, codes.view(n, blocks, slices, depth).to(torch.int16)


def _grouped(tiles: Tensor, n: int, blocks: int, depth: int, together: int) -> Tensor:
    return tiles.view(n // together, together, blocks, depth).transpose(1, 2).contiguous()


def spread(numbers: Tensor, form: Form, columns: int, width: int) -> Tensor:
    """Return the numbers of groups of `width` columns, (rows, groups), for each group of the form: (rows, groups).

    `width` is a multiple of the form's group; 0: a number for all columns.
    """
    count = -(-columns // form.block) * (form.block // form.group)
    at = torch.arange(count, device=numbers.device) * form.group // (width or columns)
    return numbers[:, at.clamp(max=numbers.shape[1] - 1)]


def scale_factor(scale: Tensor, low: Tensor | None = None) -> float:
    """Return a power of two that brings scales up to 64, and numbers added to products up to 8192.

    Scales divided by it are float16 without loss, or with that of rounding to 11 bits; products with any code are, too.
    1 for scales that are not finite, whose products are not finite either.
    """
    most = float(scale.abs().max()) / 64
    if low is not None:
        most = max(most, float(low.abs().max()) / 8192)
    return 2.0 ** math.ceil(math.log2(most)) if 0 < most < math.inf else 1.0


def pack_words(form: Form, scale: Tensor, zero: Tensor | None = None, low: Tensor | None = None,
               half: bool = False) -> Tensor:  # fmt: skip
    """Return the words (blocks, words, rows), int32, of numbers (rows, groups) as `spread` returns them.

    scale: two float16 a word, the first group's in the low half; float32 if a block is one group. zero: a word a group,
    a float16 below, and above it the zero point as a 16-bit float of the computation (`half`: float16), plus 128 (1024)
    for codes of 4 bits, which kernels read as 128 (1024) + code. low: a word a group, two float16.
    """
    scale = pad(scale, (0, 0, 0, -scale.shape[0] % ROWS))
    groups = form.block // form.group
    if form.meta == "scale":
        words = scale.float().view(torch.int32) if groups == 1 else _pairs(scale)
    else:
        above = zero if form.meta == "zero" else low
        assert above is not None
        above = pad(above.float(), (0, 0, 0, len(scale) - len(above)))
        if form.meta == "zero" and form.slices == 4:
            above = above + (1024 if half else 128)
        dtype = torch.bfloat16 if form.meta == "zero" and not half else torch.float16
        words = _bits(scale.half()) | (_bits(above.to(dtype)) << 16)
    return words.view(len(scale), -1, form.words).permute(1, 2, 0).contiguous()


def _pairs(scale: Tensor) -> Tensor:
    bits = _bits(scale.half())
    return bits[:, 0::2] | (bits[:, 1::2] << 16)


def _bits(numbers: Tensor) -> Tensor:
    """Return the bits of 16-bit floats as int32 0 … 65535."""
    return numbers.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
