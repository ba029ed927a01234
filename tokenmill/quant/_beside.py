"""Tensors that belong to one quantized matrix: codes, scales and zeros, found by name and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import ModelError
from tokenmill.quant import none
from tokenmill.quant.formats import FORMATS
from tokenmill.weights.checkpoint import Checkpoint, Stored

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Block = tuple[int, int]

FLOATS = ("F32", "F16", "BF16", "F64")
FP8 = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
"""Type of a stored FP8 tensor -> format"""


def beside(name: str, suffix: str) -> str:
    """Return the name of another tensor of the module that the tensor `name` belongs to.

    A fused tensor of all experts is named without `.weight`; its other tensors are named after it, as
    `gate_up_proj_scale_inv` after `gate_up_proj`.
    """
    if name.endswith(".weight"):
        return name.removesuffix("weight") + suffix
    return f"{name}_{suffix.removeprefix('weight_')}"


@dataclass(frozen=True, slots=True)
class Beside:
    """Access to the tensors of the module that `name`, a weight as models name it, belongs to.

    `index`: the matrix of tensors that stack those of several modules; None: not stacked.
    """

    source: Checkpoint
    name: str
    index: int | None = None

    def names(self, *suffixes: str) -> list[str]:
        """Return the names of these tensors that exist."""
        every = (beside(self.name, suffix) for suffix in suffixes)
        return [name for name in every if self.source.shape(name) is not None]

    def find(self, *suffixes: str) -> Stored | None:
        """Return the first of these tensors that exists, or its part; None if none exists."""
        names = self.names(*suffixes)
        return _at(self.source[names[0]], self.index) if names else None

    def need(self, *suffixes: str) -> Stored:
        """Return the first of these tensors that exists. Raises ModelError if none exists."""
        found = self.find(*suffixes)
        if found is None:
            names = " or ".join(repr(beside(self.name, suffix)) for suffix in suffixes)
            raise ModelError(
                f"The quantized weight {self.name!r} has no tensor {names}. The checkpoint is incomplete, or its "
                "quantization_config in config.json is that of another one: download the model again."
            )
        return found


def _at(stored: Stored, index: int | None) -> Stored:
    if index is None or not stored.shape:
        return stored
    if len(stored.shape) > 1:
        return stored.at(index)
    return Stored(stored.name, stored.kind, (), stored.data[index : index + 1])  # a number for each module


def kind_of(stored: Stored, allowed: Sequence[str], role: str) -> str:
    """Return the type of a tensor. Raises ModelError if it is not one of `allowed`."""
    if stored.kind not in allowed:
        raise ModelError(
            f"{stored.name!r} is stored as {stored.kind}; {role} must be {' or '.join(allowed)}. Check "
            "quantization_config in config.json against the files."
        )
    return stored.kind


def misfit(stored: Stored, expected: object, why: str) -> ModelError:
    """Return the error for a tensor of another shape than the codes and config.json require."""
    return ModelError(
        f"{stored.name!r} has shape {tuple(stored.shape)}, but {why} requires {expected}. Check quantization_config in "
        "config.json against the files."
    )


def numbers(stored: Stored) -> Floats:
    """Return the numbers of a tensor of floats, FP8, or biased exponents of powers of two (E8M0), flat, as float32."""
    flat = stored.data.reshape(-1)
    if stored.kind in FP8:
        table = FORMATS[FP8[stored.kind]].table
        assert table is not None
        return table[flat]
    if stored.kind in ("U8", "F8_E8M0"):
        return powers_of_two(flat)
    return none.floats(Stored(stored.name, stored.kind, (prod(stored.shape),), flat)).reshape(-1)


def powers_of_two(exponents: Bytes) -> Floats:
    """Return 2^(exponent − 127), as OCP's E8M0 stores scales; 255 is NaN."""
    made = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127).astype(np.float32)
    made[exponents == 255] = np.nan
    return made


def number(stored: Stored) -> float:
    """Return the only number of a tensor. Raises ModelError if it has several."""
    if prod(stored.shape) != 1:
        raise misfit(stored, "a single number", "a scale of a whole tensor")
    return float(numbers(stored)[0])


def integers(stored: Stored, kind: type[np.generic]) -> NDArray[Any]:
    """Return a tensor of integers in its shape."""
    return np.ascontiguousarray(stored.data).view(kind).reshape(stored.shape)


def grid_of(stored: Stored, shape: tuple[int, ...], block: Block | None = None) -> tuple[tuple[int, int], Block]:
    """Return the shape of scales, (blocks of rows, blocks of columns), of a matrix of `shape`, and the block of each.

    `block`: as config.json states it, 0 for all; None if it does not: then there is one for the tensor or for each row.
    Raises ModelError if the number of scales does not fit.
    """
    rows, columns = shape
    count, given = prod(stored.shape), tuple(stored.shape)
    if block is not None:
        height, width = (size or whole for size, whole in zip(block, shape, strict=True))
        wanted = -(-rows // height), -(-columns // width)
        if given == wanted or (count == prod(wanted) and 1 in wanted and len(given) < 3):
            return wanted, block
        if count != 1:
            raise misfit(stored, wanted, f"a matrix of {rows} × {columns} in blocks of {height} × {width}")
    if count == 1:
        return (1, 1), (0, 0)
    if given in ((rows,), (rows, 1)):
        return (rows, 1), (1, 0)
    raise misfit(stored, f"(), ({rows},) or ({rows}, 1)", f"a matrix of {rows} × {columns} without blocks")


def scales(stored: Stored, shape: tuple[int, ...], block: Block | None = None) -> tuple[Floats, Block]:
    """Return scales and their block; arguments and errors as of `grid_of`."""
    grid, found = grid_of(stored, shape, block)
    return numbers(stored).reshape(grid), found


def halves(pairs: Bytes, *, high_first: bool = False) -> Bytes:
    """Rearrange nibbles of adjacent columns, (rows, columns / 2), as `formats.packed` has them: (rows, groups, 16).

    `high_first`: the high nibble of a byte is the first column; else the low one is. Columns: a multiple of 32.
    """
    eights = pairs.reshape(len(pairs), -1, 2, 8)
    a, b = eights[:, :, 0], eights[:, :, 1]
    out = np.empty((len(pairs), eights.shape[1], 16), np.uint8)
    first, second = (1, 0) if high_first else (0, 1)
    out[..., first::2], out[..., second::2] = (a & 15) | (b << np.uint8(4)), (a >> np.uint8(4)) | (b & np.uint8(0xF0))
    return out


def nibble_codes(pairs: Bytes, *, high_first: bool = False) -> Bytes:
    """Return codes of 4 bits from (rows, columns / 2): packed where columns are a multiple of 32, else one a byte."""
    if pairs.shape[1] % 16 == 0:
        return halves(pairs, high_first=high_first)
    out = np.empty((len(pairs), 2 * pairs.shape[1]), np.uint8)
    first, second = (1, 0) if high_first else (0, 1)
    out[:, first::2], out[:, second::2] = pairs & 15, pairs >> np.uint8(4)
    return out
