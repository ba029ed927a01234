"""Read checkpoints in the layout of the Marlin kernel (github.com/IST-DASLab/marlin): codes of 4 bits, no zero points.

A matrix is `B` (inputs / 16, words of 16 rows of outputs) and `s` (groups, outputs), or one row of scales. Codes lie in
tiles of 16 × 16, four of which are permuted together in the order in which the threads of a warp multiply them; scales
are permuted by 64 outputs, or by 32 if there is one group. The permutation is undone here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenmill.quant import none
from tokenmill.quant._packed import FLOATS, INTEGERS, Codes, coded, floats, require, unpack, words
from tokenmill.quant._settings import described, misfits, settings
from tokenmill.quant.base import Coded, Matrix, Piece
from tokenmill.weights.checkpoint import Checkpoint

_TILE, _EACH, _ZERO = 16, 8, 8
_GROUPS = (-1, 128)
_CURE = "Serve a GPTQ or AWQ checkpoint of the model."


class Names(NamedTuple):
    """Names of a matrix's tensors."""

    codes: str
    scales: str
    others: tuple[str, ...] = ()


MARLIN, AWQ = Names("B", "s", ("workspace",)), Names("qweight", "scales")


class Marlin(msgspec.Struct, frozen=True):
    """Fields of the configuration."""

    bits: int = 4
    group_size: int = -1


def matrix(source: Checkpoint, name: str) -> Matrix | None:
    """Find a matrix; see `base`. ModelError if the configuration or a tensor does not fit."""
    module = name.removesuffix(".weight")
    group, place = _group(source)
    if module == name or source.shape(f"{module}.{MARLIN.codes}") is None:
        return None
    return found(source, module, group, f"Marlin's layout with `group_size` {group or -1} of {place}", MARLIN)


def read(source: Checkpoint, piece: Piece) -> Coded:
    """Read a part of a matrix; other tensors as stored."""
    module = piece.name.removesuffix(".weight")
    if not piece.weight.columns or module == piece.name or source.shape(f"{module}.{MARLIN.codes}") is None:
        return none.read(source, piece)
    return part(source, piece, module, _group(source)[0], MARLIN)


def found(source: Checkpoint, module: str, group: int, form: str, names: Names) -> Matrix:
    """Return a module's matrix. ModelError if a tensor does not fit. `group`: inputs of a group; 0: all."""
    codes = f"{module}.{names.codes}"
    packed = source.shape(codes) or ()
    tiles = packed[0] if packed else 0
    require(source, codes, INTEGERS, (tiles, packed[-1] // 128 * 128 if packed else 0), form)
    inputs, outputs = tiles * _TILE, packed[-1] * _EACH // _TILE
    require(source, f"{module}.{names.scales}", FLOATS, (-(-inputs // group) if group else 1, outputs), form)
    others = [f"{module}.{other}" for other in names.others if source.shape(f"{module}.{other}") is not None]
    return Matrix((outputs, inputs), (codes, f"{module}.{names.scales}", *others), form)


def part(source: Checkpoint, piece: Piece, module: str, group: int, names: Names) -> Coded:
    """Return a part of a module's matrix."""
    codes = _codes(words(source, f"{module}.{names.codes}"))
    scales = _scales(floats(source, f"{module}.{names.scales}"), group > 0)
    zero = np.full((1, 1), _ZERO, np.int16)
    return coded(codes[piece.rows], 4, scales[piece.rows], zero, group).take(slice(None), piece.columns)


def _group(source: Checkpoint) -> tuple[int, str]:
    """Return the inputs of a group, 0 for all, and where the configuration stands."""
    given, described_as = settings(source, Marlin), described(source)
    if given.bits != 4:
        raise misfits(source, "bits", given.bits, (4,), _CURE)
    if given.group_size not in _GROUPS:
        raise misfits(source, "group_size", given.group_size, _GROUPS, _CURE)
    return max(given.group_size, 0), described_as.place if described_as is not None else ""


def _order() -> NDArray[np.intp]:
    """Return, for each of the 1024 codes of four tiles as stored, its place among them row by row.

    Thread t of a warp holds, of each tile, rows 2 · (t % 4), the next one, and both eight rows below, in column t // 4
    and eight columns to the right. A word has the codes of even places first.
    """
    thread, tile, right, row = np.ogrid[:32, :4, :2, :4]
    rows = 2 * (thread % 4) + row % 2 + 8 * (row // 2)
    places = 256 * tile + _TILE * rows + thread // 4 + 8 * right
    words: NDArray[np.intp] = places.reshape(-1, _EACH)
    return words[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)


def _codes(packed: NDArray[np.uint32]) -> Codes:
    """Undo the permutation of codes: (inputs / 16, words) -> (outputs, inputs)."""
    stored = unpack(packed, 4).reshape(-1, 1024)
    codes = np.empty_like(stored)
    codes[:, _order()] = stored
    tiles = codes.reshape(len(packed), -1, _TILE, _TILE)  # of 16 inputs, 16 outputs
    return np.ascontiguousarray(tiles.transpose(1, 3, 0, 2)).reshape(tiles.shape[1] * _TILE, -1)


def _scales(stored: NDArray[Any], grouped: bool) -> NDArray[Any]:
    """Undo the permutation of scales: (groups, outputs) -> (outputs, groups)."""
    if grouped:
        order = np.arange(64).reshape(8, 8).T.reshape(-1)
    else:
        order = np.concatenate([2 * i + np.array([0, 1, 8, 9, 16, 17, 24, 25]) for i in range(4)])
    scales = np.empty((stored.size // len(order), len(order)), stored.dtype)
    scales[:, order] = stored.reshape(scales.shape)
    return scales.reshape(stored.shape).T
