"""Columns of a stored matrix that one rank holds, with zeros in places that no column belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.program.share import Span
from tokenmill.quant import formats
from tokenmill.quant.coded import Coded, Levels, dense

_LEAST = 16  # columns that a block of scales may have after its division
_ALIGNED = 256


class Cut(NamedTuple):
    """Columns of a matrix that a rank holds.

    All ranks have the same `step`, by which all borders can be divided, and the same `padded`, True if a rank has
    zeros. They alone decide the form of the result, so it is the same for all ranks.
    """

    spans: tuple[Span, ...]
    step: int
    padded: bool


def zeros_like(matrix: Coded) -> Coded:
    """Return a matrix or vector of zeros in the same form."""

    def zeros(numbers: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if numbers is None else np.zeros(numbers.shape, numbers.dtype)

    codes = np.zeros(matrix.codes.shape, matrix.codes.dtype)
    if matrix.scale is None:
        return replace(matrix, codes=codes) if matrix.dense else dense(np.zeros(matrix.shape, np.float32))
    levels = matrix.levels
    if levels is not None:
        factors = np.zeros_like(levels.scale_factor), zeros(levels.low_factor)
        levels = Levels(np.zeros_like(levels.scale), factors[0], zeros(levels.low), factors[1])
    return replace(matrix, codes=codes, scale=zeros(matrix.scale), low=zeros(matrix.low), levels=levels)


def cut(matrix: Coded, of_rank: Cut) -> Coded:
    """Return the columns that a rank holds, side by side.

    Blocks of columns that are separated are divided. The result is dense if they would have less than 16 columns, or if
    the codes of the matrix are in another order than its columns.
    """
    if len(matrix.shape) == 1:
        return matrix
    divided = None if matrix.dense else _divided(matrix, of_rank)
    if divided is None:
        codes = matrix.codes if matrix.dense else matrix.floats()
        return dense(_joined(codes, of_rank.spans, 1))
    return _chosen(divided, of_rank.spans)


def _divided(matrix: Coded, of_rank: Cut) -> Coded | None:
    """Return a matrix whose blocks of columns lie between the borders; None if it cannot stay in codes."""
    if matrix.scale is None or matrix.order is not None:
        return None
    width = matrix.block[1]
    if not width and of_rank.padded and not _zero_is_zero(matrix):
        matrix, width = matrix.divided(gcd(_ALIGNED, of_rank.step)), gcd(_ALIGNED, of_rank.step)
    if width:
        fits = gcd(width, of_rank.step)
        if fits < min(_LEAST, width):
            return None
        matrix = matrix if fits == width else matrix.divided(fits)
    return matrix.unpacked() if of_rank.step % matrix.group else matrix


def _zero_is_zero(matrix: Coded) -> bool:
    """Return True if code 0 is the number 0, whatever the scale."""
    table = formats.FORMATS[matrix.format].table
    return matrix.zero is None and matrix.low is None and (table is None or table[0] == 0)


def _chosen(matrix: Coded, spans: Sequence[Span]) -> Coded:
    width = matrix.block[1]

    def of_blocks(numbers: NDArray[Any] | None) -> NDArray[Any] | None:
        return numbers if numbers is None or not width else _joined(numbers, spans, width)

    one_zero = matrix.zero is not None and matrix.zero.shape == (1, 1)
    return replace(
        matrix,
        codes=_joined(matrix.codes, spans, matrix.group),
        scale=of_blocks(matrix.scale),
        zero=matrix.zero if one_zero else of_blocks(matrix.zero),
        low=of_blocks(matrix.low),
        levels=None if matrix.levels is None else _levels(matrix.levels, spans, width),
    )


def _levels(levels: Levels, spans: Sequence[Span], width: int) -> Levels | None:
    """Return the terms of the scales; None if superblocks are separated."""
    each = width * levels.per
    if any(max(span.first, 0) % each or span.size % each for span in spans):
        return None

    def of(numbers: NDArray[Any] | None, width: int) -> NDArray[Any] | None:
        return None if numbers is None else _joined(numbers, spans, width)

    return Levels(
        _joined(levels.scale, spans, width), _joined(levels.scale_factor, spans, each), of(levels.low, width),
        of(levels.low_factor, each),
    )  # fmt: skip


def _joined(numbers: NDArray[Any], spans: Sequence[Span], width: int) -> NDArray[Any]:
    """Return the second axis' elements of spans side by side, and zeros. `width`: columns of an element."""
    parts = [
        np.zeros((len(numbers), span.size // width, *numbers.shape[2:]), numbers.dtype)
        if span.empty
        else numbers[:, span.first // width : (span.first + span.size) // width]
        for span in spans
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, 1)
