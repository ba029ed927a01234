"""Stored matrices: codes, and the scales and zeros that make numbers of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.quant import formats

_CHUNK = 1 << 17  # elements converted at a time, so that they fit a core's cache
_LEAST = 16  # columns that a block may have after its division


@dataclass(frozen=True, slots=True)
class Levels:
    """Quantized scales and minima of GGUF's K types: int8 codes, times a float16 factor per 256 columns."""

    scale: NDArray[np.int8]  # (rows, blocks)
    scale_factor: NDArray[np.float16]  # (rows, columns // 256)
    low: NDArray[np.int8] | None = None
    low_factor: NDArray[np.float16] | None = None

    @property
    def per(self) -> int:
        """Number of blocks that share a factor."""
        return int(self.scale.shape[1] // self.scale_factor.shape[1])

    def take(self, rows: slice, blocks: slice) -> Levels | None:
        """Return a part of it; None if `blocks` separates blocks that share a factor."""
        start, stop, _ = blocks.indices(self.scale.shape[1])
        if start % self.per or stop % self.per:
            return None
        at, of = (rows, blocks), (rows, slice(start // self.per, stop // self.per))
        low = None if self.low is None else self.low[at]
        low_factor = None if self.low_factor is None else self.low_factor[of]
        return Levels(self.scale[at], self.scale_factor[of], low, low_factor)


@dataclass(frozen=True, slots=True)
class Coded:
    """Matrix or vector in its stored form: number = scale · (number of the code − zero) + low.

    `codes`: (rows, columns), or (elements,) for a vector, with a code per element; or (rows, groups, n) where the codes
    of a row are not adjacent in memory or are packed nibbles (`formats.packed`). A vector has no scale.

    `scale`, `zero` and `low` have a number for each block of `block` = (rows, columns), where 0 means all: (1, 32) in
    GGUF, (1, 128) in GPTQ and AWQ, (128, 128) or (0, 0), one for the tensor, in FP8, (1, 0) for a scale per row.
    Their shape is (blocks of rows, blocks of columns); the last ones may be incomplete.
    """

    codes: NDArray[Any]
    format: str  # a name of `formats.FORMATS`
    scale: NDArray[Any] | None = None  # float16 as stored, or float32; None: 1
    block: tuple[int, int] = (0, 0)
    zero: NDArray[Any] | None = None  # subtracted from the codes; (1, 1) if all blocks have the same
    low: NDArray[Any] | None = None  # added at the end
    levels: Levels | None = None  # terms of `scale` and `low`, where the file stores products
    order: NDArray[np.intp] | None = None  # (columns,): the matrix's column at each place of a row of codes (act-order)
    input_scale: float | None = None  # scale of the activations, if they are quantized with a constant one

    def __post_init__(self) -> None:
        """Assert that there is a scale for each block."""
        assert self.scale is None or self.scale.shape == self._blocks(), (self.scale.shape, self._blocks())

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape: (rows, columns), or (elements,) for a vector."""
        if self.codes.ndim < 3:
            return self.codes.shape
        return self.codes.shape[0], self.codes.shape[1] * self.group

    @property
    def group(self) -> int:
        """Number of columns whose codes cannot be separated."""
        if self.codes.ndim < 3:
            return 1
        return formats.PACKED if formats.packed(self.codes, self.format) else int(self.codes.shape[2])

    @property
    def dense(self) -> bool:
        """True if the matrix is not quantized: `codes` are its numbers, uint16 holding bfloat16."""
        return self.scale is None and self.format in formats.FLOATS

    def fill(self, out: NDArray[np.float32]) -> None:
        """Write the numbers as float32 into `out`, of the same shape."""
        columns = self.shape[1] if len(self.shape) == 2 else 1
        step = max(1, _CHUNK // max(1, columns))
        stored = out if self.order is None else np.empty_like(out)
        for start in range(0, len(out), step):
            some = slice(start, min(start + step, len(out)))
            self._fill(stored[some], some)
        if self.order is not None:
            out[:, self.order] = stored

    def floats(self) -> NDArray[np.float32]:
        """Return the numbers as a new float32 array."""
        out = np.empty(self.shape, np.float32)
        self.fill(out)
        return out

    def _fill(self, out: NDArray[np.float32], rows: slice) -> None:
        codes = self.codes[rows]
        formats.decode(codes, self.format, out.reshape(*codes.shape[:2], -1) if codes.ndim == 3 else out)
        if self.scale is None:
            return
        blocks = out.reshape(len(out), -1, 1 if self._ragged else self.block[1] or self.shape[1])
        if self.zero is not None:
            blocks -= self._spread(self.zero, rows)
        blocks *= self._spread(self.scale, rows)
        if self.low is not None:
            blocks += self._spread(self.low, rows)

    @property
    def _ragged(self) -> bool:
        """True if the last block of columns is incomplete."""
        return self.block[1] > 0 and self.shape[1] % self.block[1] > 0

    @property
    def _one_zero(self) -> bool:
        return self.zero is not None and self.zero.shape == (1, 1)

    def _spread(self, numbers: NDArray[Any], rows: slice) -> NDArray[np.float32]:
        """Return numbers of blocks so that they can be broadcast to (rows, blocks or columns, columns of a block)."""
        found = numbers
        if self.block[0] == 1 and len(numbers) > 1:
            found = numbers[rows]
        elif self.block[0] > 1 and len(numbers) > 1:
            found = numbers[np.arange(rows.start, rows.stop) // self.block[0]]
        if self._ragged and found.shape[1] > 1:
            found = np.repeat(found, self.block[1], 1)[:, : self.shape[1]]
        return found.astype(np.float32, copy=False)[..., None]

    def _blocks(self) -> tuple[int, ...]:
        """Number of blocks of rows and of columns."""
        return tuple(-(-size // each) if each else 1 for size, each in zip(self.shape, self.block, strict=True))

    def take(self, rows: slice, columns: slice) -> Coded:
        """Return a part of the matrix, without a copy where that is possible. `columns` is ignored for a vector.

        Where `columns` separates what shares a scale, blocks are divided; where it separates packed codes, they are
        unpacked. With an `order`, or if a block would have less than 16 columns, the part is dense.
        """
        if self.codes.ndim == 1:
            return replace(self, codes=self.codes[rows])
        if rows.step not in (None, 1) and not self.dense:
            return dense(self.floats()[rows, columns])
        start, stop, _ = columns.indices(self.shape[1])
        if (start, stop) == (0, self.shape[1]):
            return self._part(rows, start, stop)
        shared = gcd(self.block[1], start, stop if stop < self.shape[1] else start)
        if self.order is not None or (0 < shared < min(_LEAST, self.block[1])):
            return dense(self.take(rows, slice(None)).floats()[:, columns])
        whole = self.divided(shared) if self._separates(self.block[1], start, stop) else self
        if whole._separates(whole.group, start, stop):
            whole = whole.unpacked()
        return whole._part(rows, start, stop)

    def _separates(self, width: int, start: int, stop: int) -> bool:
        """Return True if columns from `start` to `stop` contain a part of some `width` columns; 0: all of a row."""
        return width > 0 and (start % width > 0 or (stop % width > 0 and stop < self.shape[1]))

    def unpacked(self) -> Coded:
        """Return the same with a code an element."""
        codes = self.codes
        if formats.packed(codes, self.format):
            codes = np.concatenate([codes & 15, codes >> np.uint8(4)], -1)
        return replace(self, codes=codes.reshape(len(codes), -1), levels=None)

    def divided(self, width: int) -> Coded:
        """Return the same with scales of blocks of `width` columns, by which the present ones can be divided."""
        blocks = -(-self.shape[1] // width)
        times = self.block[1] // width or blocks

        def repeated(numbers: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if numbers is None else np.repeat(numbers, times, 1)[:, :blocks]

        zero = self.zero if self._one_zero else repeated(self.zero)
        block = self.block[0], width
        return replace(self, scale=repeated(self.scale), zero=zero, low=repeated(self.low), block=block, levels=None)

    def _part(self, rows: slice, start: int, stop: int) -> Coded:
        first, last, _ = rows.indices(self.shape[0])
        height, width = self.block
        if height > 1 and (first % height or (last % height and last < self.shape[0])):
            return self.by_rows()._part(rows, start, stop)
        high = slice(first // height, -(-last // height)) if height else slice(None)
        wide = slice(start // width, -(-stop // width)) if width else slice(None)

        def of_blocks(numbers: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if numbers is None else numbers[high, wide]

        return replace(
            self,
            codes=self.codes[rows, start // self.group : -(-stop // self.group)],
            scale=of_blocks(self.scale),
            zero=self.zero if self._one_zero else of_blocks(self.zero),
            low=of_blocks(self.low),
            levels=None if self.levels is None else self.levels.take(rows, wide),
        )

    def layout(self) -> tuple[Any, ...]:
        """Return what matrices have in common whose codes and scales can be stacked."""
        numbers = (None if a is None else a.dtype for a in (self.scale, self.low))
        order = None if self.order is None else self.order.tobytes()
        given = self.zero is None, self.input_scale is None
        return self.format, self.codes.shape[1:], *numbers, *given, self.block, order

    def by_rows(self) -> Coded:
        """Return the same with scales of single rows."""
        rows, (height, width) = self.shape[0], self.block
        if self.scale is None or height == 1:
            return self

        def repeated(numbers: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if numbers is None else np.repeat(numbers, height or rows, 0)[:rows]

        zero = self.zero if self._one_zero else repeated(self.zero)
        return replace(self, scale=repeated(self.scale), zero=zero, low=repeated(self.low), block=(1, width))


def dense(array: NDArray[Any]) -> Coded:
    """Return an unquantized matrix or vector: float32, float16, float64, or uint16 holding bfloat16."""
    return Coded(array, formats.float_format(array.dtype))


def stack(parts: Sequence[Coded]) -> Coded:
    """Stack matrices along the rows. The result keeps the stored form if all have the same one, else it is float32."""
    if len(parts) == 1:
        return parts[0]
    if any(p.scale is not None and (p.block[0] == 0 or p.shape[0] % p.block[0]) for p in parts):
        parts = [p.by_rows() for p in parts]  # else a block of rows would belong to two parts
    first = parts[0]
    if any(p.layout() != first.layout() for p in parts):
        return dense(np.concatenate([p.floats() for p in parts]))
    found = [p.levels for p in parts if p.levels is not None]
    scales = [p.input_scale for p in parts if p.input_scale is not None]
    return replace(
        first,
        codes=np.concatenate([p.codes for p in parts]),
        scale=_joined([p.scale for p in parts]),
        zero=_joined_zeros(parts),
        low=_joined([p.low for p in parts]),
        levels=_stack_levels(found) if len(found) == len(parts) else None,
        input_scale=max(scales, default=None),
    )


def _joined(parts: list[NDArray[Any] | None]) -> NDArray[Any] | None:
    found = [p for p in parts if p is not None]
    return np.concatenate(found) if len(found) == len(parts) else None


def _joined_zeros(parts: Sequence[Coded]) -> NDArray[Any] | None:
    zeros = [p.zero for p in parts if p.zero is not None]
    if not zeros or (all(zero.shape == (1, 1) for zero in zeros) and len({float(zero[0, 0]) for zero in zeros}) == 1):
        return zeros[0] if zeros else None
    shapes = [p.scale.shape for p in parts if p.scale is not None]
    return np.concatenate([np.broadcast_to(zero, shape) for zero, shape in zip(zeros, shapes, strict=True)])


def _stack_levels(parts: list[Levels]) -> Levels:
    return Levels(
        np.concatenate([p.scale for p in parts]),
        np.concatenate([p.scale_factor for p in parts]),
        _joined([p.low for p in parts]),
        _joined([p.low_factor for p in parts]),
    )
