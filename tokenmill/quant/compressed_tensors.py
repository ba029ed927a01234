"""Read weights as compressed-tensors stores them (llm-compressor, Neural Magic, Red Hat), several formats in a model.

The tensors of a module show its format:

* `weight_packed` of I32: integers of 2 to 8 bits in words, with `weight_shape`. `weight_zero_point` is packed along the
  rows. `weight_g_idx` has each column's group, where the columns were reordered (act-order).
* `weight_packed` of U8: FP4. With `weight_global_scale` (NVFP4) the scales of 16 columns are divided by it; else
  (MXFP4) they are powers of two of 32 columns.
* `weight` of I8 or FP8, with `weight_scale`, and `weight_zero_point`.

The rest is in `config_groups`. Activations that a group quantizes have `input_scale` if theirs is static.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import ModelError
from tokenmill.quant import _bits, _eight, _fp4, none
from tokenmill.quant._beside import (
    FLOATS,
    FP8,
    Beside,
    beside,
    grid_of,
    integers,
    kind_of,
    misfit,
    nibble_codes,
    number,
    numbers,
    scales,
)
from tokenmill.quant._groups import Arguments, group_of, groups_of
from tokenmill.quant._method import Matrix
from tokenmill.quant.base import Piece
from tokenmill.quant.coded import Coded
from tokenmill.quant.formats import FORMATS
from tokenmill.weights.checkpoint import Checkpoint, Stored

_PACKED, _GLOBAL = "weight_packed", "weight_global_scale"
_BESIDE = (
    "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", _GLOBAL, "input_scale", "input_zero_point",
    "input_global_scale", "output_scale", "output_zero_point",
)  # fmt: skip
_OF_BITS = {2: "u2", 3: "i3", 4: "u4", 5: "i5", 6: "i6", 7: "i8", 8: "i8"}
_SPARSE = ("bitmask", "compressed", "weight_packed_24")


def matrix(source: Checkpoint, name: str) -> Matrix | None:
    """Return how a weight is stored; see `base`."""
    groups_of(source)  # its errors come before those of tensors
    tensors = Beside(source, name)
    if tensors.names(_PACKED):
        if source[tensors.names(_PACKED)[0]].kind == "U8":
            found = _fp4.matrix(source, name, _PACKED, _GLOBAL)
        else:
            arguments = _arguments(source, name, "int")
            found = Matrix(_Packed(tensors, arguments).shape, ())
        return found._replace(tensors=tuple(tensors.names(_PACKED, *_BESIDE)))
    shape = source.shape(name)
    if shape is None or source[name].kind not in (*FP8, "I8"):
        _refuse_sparse(source, name)
        return None
    if source[name].kind in FP8:
        eight = _eight.matrix(source, name, _arguments(source, name, "float").block)
        return None if eight is None else eight._replace(tensors=(name, *tensors.names(*_BESIDE)))
    if len(shape) != 2:
        raise misfit(source[name], "(rows, columns)", "a matrix of int8 codes")
    _integer_parts(tensors, shape, _arguments(source, name, "int"))
    return Matrix(shape, (name, *tensors.names(*_BESIDE)))


def read(source: Checkpoint, piece: Piece) -> Coded:
    """Read a piece in its codes, or as stored if it is plain."""
    tensors = Beside(source, piece.name)
    if tensors.names(_PACKED):
        if tensors.need(_PACKED).kind == "U8":
            return _fp4.read(source, piece, _PACKED, _GLOBAL, divides=True)
        packed = _Packed(tensors, _arguments(source, piece.name, "int"))
        return packed.read(piece.rows).take(slice(None), piece.columns)
    stored = piece.stored(source)
    if stored.kind in FP8:
        return _eight.read(source, piece, _arguments(source, piece.name, "float").block)
    if stored.kind != "I8":
        return none.dense(stored, piece)
    scale, zero = _integer_parts(tensors, stored.shape, _arguments(source, piece.name, "int"))
    found, block = scales(scale, stored.shape, _arguments(source, piece.name, "int").block)
    zeros = None if zero is None else integers(zero, np.int8).reshape(found.shape)
    static = tensors.find("input_scale")
    whole = Coded(stored.data.view(np.int8), "i8", found, block, zero=zeros)
    return replace(whole, input_scale=None if static is None else number(static)).take(piece.rows, piece.columns)


def notes(source: Checkpoint) -> list[str]:
    """Return the kinds of activations that the checkpoint's programs quantize, other than FP8 beside FP8 weights."""
    found = dict.fromkeys(
        f"{group.input_activations.type}{group.input_activations.num_bits}"
        for group in groups_of(source).values()
        if group.input_activations is not None and (group.weights is None or not group.weights.is_fp8)
    )
    return [f"the checkpoint's quantization of activations, {kind}, is not applied" for kind in found]


def _arguments(source: Checkpoint, name: str, kind: str) -> Arguments:
    """Return how the weights of the group are quantized. Raises ModelError if config.json says it otherwise."""
    weights = group_of(source, name).weights
    assert weights is not None
    if weights.type != kind:
        raise ModelError(
            f"{name!r} is stored as {kind}, but config.json's config_groups says {weights.type}. Copy config.json from "
            "the model's repository again."
        )
    return weights


def _integer_parts(tensors: Beside, shape: tuple[int, ...], arguments: Arguments) -> tuple[Stored, Stored | None]:
    """Return scales and zero points of an int8 matrix. Raises ModelError if they do not fit."""
    scale, zero = tensors.need("weight_scale"), tensors.find("weight_zero_point")
    kind_of(scale, FLOATS, "scales")
    grid, _ = grid_of(scale, shape, arguments.block)
    if zero is not None:
        kind_of(zero, ("I8",), "zero points of int8 codes")
        if prod(zero.shape) != prod(grid):
            raise misfit(zero, grid, f"scales of shape {tuple(scale.shape)}")
    return scale, zero


def _refuse_sparse(source: Checkpoint, name: str) -> None:
    found = [beside(name, suffix) for suffix in _SPARSE if source.shape(beside(name, suffix)) is not None]
    if found:
        raise ModelError(
            f"{found[0]!r} is of a weight with 2:4 sparsity, which is not supported. Serve a checkpoint of the model "
            "without sparsity."
        )


class _Packed:
    """Integers in words, of one module."""

    def __init__(self, tensors: Beside, arguments: Arguments) -> None:
        self._tensors, self._bits = tensors, arguments.num_bits
        self._codes, self._scale = tensors.need(_PACKED), tensors.need("weight_scale")
        kind_of(self._codes, ("I32",), "words of packed integers")
        kind_of(self._scale, FLOATS, "scales")
        stored = tensors.need("weight_shape")
        sizes = integers(stored, np.int32 if kind_of(stored, ("I64", "I32"), "a shape") == "I32" else np.int64)
        if sizes.shape != (2,) or len(self._codes.shape) != 2:
            raise misfit(stored, (2,), f"{self._codes.name!r} of shape {tuple(self._codes.shape)}")
        self.shape = int(sizes[0]), int(sizes[1])
        rows, columns = self.shape
        if self._codes.shape not in [(rows, n) for n in _bits.words(columns, self._bits)]:
            needed = (rows, _bits.words(columns, self._bits)[0])
            raise misfit(self._codes, needed, f"a matrix of {rows} × {columns} with {self._bits} bits (num_bits)")
        self._grid, self._block = grid_of(self._scale, self.shape, arguments.block)
        self._check_zeros()
        if (order := tensors.find("weight_g_idx")) is not None:
            kind_of(order, ("I32", "I64"), "groups of columns")
            if order.shape != (columns,):
                raise misfit(order, (columns,), f"{columns} columns")

    def _check_zeros(self) -> None:
        zero = self._tensors.find("weight_zero_point")
        if zero is None:
            return
        kind_of(zero, ("I32", "I8"), "zero points")
        rows, columns = self._grid
        packed = [(n, columns) for n in _bits.words(rows, self._bits)]
        if zero.shape not in ([self._grid, (columns,)] if zero.kind == "I8" else packed):
            raise misfit(zero, packed[0] if zero.kind == "I32" else self._grid, f"{rows} × {columns} scales")

    def read(self, rows: slice) -> Coded:
        """Return rows of the matrix."""
        columns, kind = self.shape[1], _OF_BITS[self._bits]
        words = integers(self._codes, np.int32)[rows]
        scale, zero = numbers(self._scale).reshape(self._grid), self._zeros()
        if self._grid[0] > 1:
            scale, zero = scale[rows], zero if zero.shape == (1, 1) else zero[rows]
        order = self._order()
        if order is None and self._bits == 4 and columns % 32 == 0:
            return Coded(nibble_codes(words.view(np.uint8)), kind, scale, self._block, zero=zero)
        codes = _bits.unpacked(words, self._bits, columns)
        if order is not None:
            codes = codes[:, order]
        if kind.startswith("i"):
            codes = (codes.astype(np.int16) - (1 << self._bits - 1)).astype(np.int8)
        return Coded(codes.astype(FORMATS[kind].dtype), kind, scale, self._block, zero=zero, order=order)

    def _zeros(self) -> NDArray[np.int16]:
        """Return the zero points of the format's codes, (1, 1) if all are the same."""
        zero, half = self._tensors.find("weight_zero_point"), 1 << self._bits - 1
        unsigned = _OF_BITS[self._bits].startswith("u")
        if zero is None:
            return np.full((1, 1), half if unsigned else 0, np.int16)
        if zero.kind == "I8":
            signed = integers(zero, np.int8).reshape(self._grid).astype(np.int16)
        else:
            packed = integers(zero, np.int32).T
            signed = _bits.unpacked(packed, self._bits, self._grid[0]).T.astype(np.int16) - half
        return signed + np.int16(half) if unsigned else signed

    def _order(self) -> NDArray[np.intp] | None:
        """Return the columns sorted by group, if they are stored in another order; None if they lie by group."""
        stored = self._tensors.find("weight_g_idx")
        if stored is None:
            return None
        groups = integers(stored, np.int32 if stored.kind == "I32" else np.int64).reshape(-1)
        size = self._block[1]
        if not size or (groups < 0).any() or np.array_equal(groups, np.arange(groups.size) // size):
            return None  # -1: not set
        if not np.array_equal(np.bincount(groups, minlength=self._grid[1]), np.full(self._grid[1], size)):
            raise misfit(stored, f"{size} columns in each of {self._grid[1]} groups", "group_size in config.json")
        return np.argsort(groups, kind="stable")
