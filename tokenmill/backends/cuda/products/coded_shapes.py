"""Sizes of tiles of products with packed codes, and the number of rows from which a matrix is better unpacked.

Measured on an H200 with the matrices of an 8B model; where two sizes lie within 3 %, the one that serves more matrices.
"""

from __future__ import annotations

from typing import NamedTuple

from tokenmill.backends.cuda.products.forms import Form

MOST = 128  # rows of a tile
_PROGRAMS, _LEAST_PROGRAMS = 640, 132  # programs that splitting makes at most, and that a GPU needs to be busy


class CodedShape(NamedTuple):
    """Sizes: rows and outputs of a tile, columns of a slice at a time, splits, rounds in flight, warps.

    `operand`: scales multiply the weights, not the sums.
    """

    rows: int
    outputs: int
    depth: int
    splits: int
    stages: int
    warps: int
    operand: bool


def crossover(form: Form, outputs: int) -> int:
    """Return the rows up to which codes are unpacked in the product's loop.

    A matrix of a vocabulary's outputs is never unpacked: it would take a gigabyte, for few rows.
    """
    if outputs >= 1 << 16:
        return 1 << 30
    if form.slices == 2:
        return 192
    return 128 if form.kind == "table" else 256


def coded_shape(rows: int, outputs: int, columns: int, gated: bool, form: Form) -> CodedShape:
    """Return the sizes for a matrix (outputs, columns), or two of them if `gated`."""
    tile = next((tile for tile in (8, 16, 32, 64) if rows <= tile), MOST)
    if rows > MOST or (rows > 64 and form.slices == 2):
        return _many(rows, outputs, form)
    if tile <= 16:
        shape = _small(tile, outputs > columns, gated, form)
    else:
        shape = _large(tile, gated, form)
    return shape if gated else shape._replace(splits=_splits(outputs, columns, shape))


def _small(tile: int, wide: bool, gated: bool, form: Form) -> CodedShape:
    """Return the sizes for up to 16 rows. `wide`: more outputs than columns."""
    outputs = 32 if gated else 64
    if form.depth < 64:  # Rounds are shorter, so more are in flight.
        spread = wide and not gated and form.kind == "e2m1"
        return CodedShape(tile, outputs, form.depth, 1, 6 if spread else 4, 4 if spread else 2, False)
    if form.slices == 2:
        one = tile == 8
        return CodedShape(tile, 32 if one else 64, form.depth, 1, 4 if one or not gated else 3, 2 if one else 4, False)
    return CodedShape(tile, outputs, form.depth, 1, 3, 4 if wide and not gated else 2, False)


def _large(tile: int, gated: bool, form: Form) -> CodedShape:
    """Return the sizes for 17 to 128 rows."""
    depth, four, stages = form.depth, form.slices == 4, 3 if form.depth == 64 else 5
    if tile == 32:
        return CodedShape(32, 64, depth, 1, stages, 4, False)
    if tile == 64:
        if gated and form.kind == "table":  # which needs most registers
            return CodedShape(64, 64, min(depth, 32), 1, 4, 4, True)
        if gated:
            return CodedShape(64, 64, depth, 1, (2 if four else 3) if depth == 64 else 4, 4, four)
        return CodedShape(64, 64, depth, 1, stages if four else stages + 1, 4, four)
    return CodedShape(MOST, 64, min(depth, 32), 1, 3, 4, True)


def _many(rows: int, outputs: int, form: Form) -> CodedShape:
    """Return the sizes for more rows, or of codes of 8 bits for more than 64."""
    tiles = -(-outputs // 64) * -(-rows // MOST)
    if form.slices == 2:
        return CodedShape(64, 64, form.depth, 1, 3 if form.depth == 64 else 5, 4, False)
    if tiles < 2 * _LEAST_PROGRAMS:
        return CodedShape(64, 64, min(form.depth, 32), 1, 4, 4, True)
    return CodedShape(MOST, 64, min(form.depth, 32), 1, 3, 4, True)


def _splits(outputs: int, columns: int, shape: CodedShape) -> int:
    """Return the number of programs that share a tile: as many as the device has use for, with enough columns each."""
    tiles, splits = -(-outputs // shape.outputs), 1
    while splits < (8 if shape.rows <= 32 else 4) and 2 * splits * tiles <= _PROGRAMS:
        enough = 512 if splits * tiles < _LEAST_PROGRAMS else 1024
        if columns < 2 * splits * enough:
            break
        splits *= 2
    return splits


def invariant_shape(rows: int, form: Form) -> CodedShape:
    """Return batch-invariant sizes: sums in the same order for any number of rows."""
    tile = 16 if rows <= 16 else 64 if rows <= 64 else MOST
    return CodedShape(tile, 64, min(form.depth, 32), 1, 3, 4, True)
