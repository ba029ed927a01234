"""Sizes of tiles of products with matrices of e4m3 codes: the fastest on an H200 for the matrices of an 8B model."""

from __future__ import annotations

from typing import NamedTuple

import triton

from tokenmill.backends.cuda.products.dense import FewShape

BLOCK = 128  # numbers of a block's side that share a scale; columns whose bytes are interleaved
WEIGHT_ONLY, WEIGHT_ONLY_BLOCKED = 16, 32  # rows up to which x stays in 16 bits; with scales of blocks
OURS, OURS_BLOCKED = 128, 64  # rows up to which a kernel of ours multiplies codes, unless it needs no scales
RAW_GATED = 512  # rows above which a gated product multiplies by its scales itself


class OneShape(NamedTuple):
    """Sizes for one row: outputs of a program, words of a round, rounds in flight, warps."""

    outputs: int
    words: int
    stages: int
    warps: int


def one_shape(outputs: int, columns: int, gated: bool) -> OneShape | None:
    """Return the sizes for one row on CUDA cores; None if rounds of whole blocks do not divide the columns."""
    if columns % BLOCK:
        return None
    shape = OneShape(4, 256, 3, 2) if gated else OneShape(4, 128, 4, 1)
    while columns // 4 % shape.words:
        shape = shape._replace(words=shape.words // 2)
    return shape


def weight_only_shape(rows: int, outputs: int, columns: int, gated: bool) -> FewShape:
    """Return the sizes for few rows in 16 bits."""
    if gated or outputs >= 1 << 16:
        return FewShape(32, BLOCK, 1, 4, 2) if rows <= 8 else FewShape(64, BLOCK, 1, 3, 4)
    if rows > 8 and columns > 2 * outputs and triton.cdiv(columns, BLOCK) % 8 == 0:
        return FewShape(64, BLOCK, 8, 3, 2)
    return FewShape(64, BLOCK, _splits(outputs, columns), 4, 4)


def codes_shape(rows: int, outputs: int, columns: int, gated: bool, blocked: bool) -> FewShape:
    """Return the sizes for rows of codes. `columns`: as stored."""
    splits = 1 if gated or rows > 64 else _splits(outputs, columns)
    if gated or blocked or columns % (2 * BLOCK):
        return FewShape(64, BLOCK, splits, 4, 8 if blocked and rows > 64 else 4)
    if rows > 2 * OURS:
        return FewShape(128, BLOCK, 1, 4, 8)
    if splits > 1 and columns > 2 * outputs:
        return FewShape(64, BLOCK, splits, 4, 4)
    splits = 2 if splits > 1 and (rows <= 32 or outputs <= columns) and columns % (4 * BLOCK) == 0 else 1
    return FewShape(64, 2 * BLOCK, splits, 3, 4, tma=rows > 64)


def _splits(outputs: int, columns: int) -> int:
    """Return the parts of the columns that make about two programs for each multiprocessor."""
    tiles, blocks, splits = triton.cdiv(outputs, 64), triton.cdiv(columns, BLOCK), 1
    while splits < 4 and tiles * splits < 250 and blocks % (2 * splits) == 0:
        splits *= 2
    return splits


def invariant_shape(rows: int, blocked: bool) -> FewShape:
    """Return batch-invariant sizes: never split, always summed in the same order."""
    if rows <= 64:
        return FewShape(64, BLOCK, 1, 4, 4)
    return FewShape(64 if blocked else 128, BLOCK, 1, 3, 8)
