"""Stored matrices, and loading a `Weight` into one.

A quantization method is a file of this package with the function `read(source, piece) -> Matrix`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenmill import plugins
from tokenmill.errors import ModelError, Unsupported
from tokenmill.program.ops import Part, Weight
from tokenmill.quant._unread import cure_of_missing, unread
from tokenmill.weights.checkpoint import Checkpoint
from tokenmill.wire.messages import Progress

T = TypeVar("T")

_CHUNK = 1 << 17  # elements converted at a time, so that they fit a core's cache


@dataclass(frozen=True, slots=True)
class Dense:
    """Unquantized matrix or vector: float32, float16, float64, or uint16 holding bfloat16."""

    array: NDArray[Any]  # (rows, columns) or a vector

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape: (rows, columns), or (elements,) for a vector."""
        return self.array.shape

    def fill(self, out: NDArray[np.float32]) -> None:
        """Write the numbers as float32 into `out`, of the same shape."""
        if self.array.dtype == np.uint16:
            np.left_shift(self.array, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
        else:
            np.copyto(out, self.array, casting="same_kind")

    def floats(self) -> NDArray[np.float32]:
        """Return the numbers as a new float32 array."""
        return _filled(self)

    def take(self, rows: slice, columns: slice) -> Dense:
        """Return a part of the matrix, without a copy. `columns` is ignored for a vector."""
        return Dense(self.array[rows, columns] if self.array.ndim == 2 else self.array[rows])


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
class Blocks:
    """Quantized matrix in blocks of columns that share a scale: number = scale · (code − offset) + low.

    4 bits: blocks of 32, codes 0…15, code k in byte k % 16, the first 16 codes in the low nibbles. 5, 6 and 8 bits: one
    int8 per code, blocks of 32 or 16. Codes of 5 bits are 0…31 with a low, else −16…15; codes of 6 bits are −32…31.
    Scales are float16 as stored. Where the format stores a scale as a product, they are float32, and `levels` holds the
    product's terms.
    """

    bits: int  # 4, 5, 6 or 8
    codes: NDArray[Any]  # uint8 (rows, blocks, 16) or int8 (rows, blocks, block)
    scale: NDArray[Any]  # (rows, blocks)
    low: NDArray[Any] | None = None  # (rows, blocks)
    offset: int = 0
    levels: Levels | None = None

    @property
    def block(self) -> int:
        """Number of columns of a block."""
        return int(self.codes.shape[2]) * (2 if self.bits == 4 else 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape: (rows, columns)."""
        return self.codes.shape[0], self.codes.shape[1] * self.block

    def fill(self, out: NDArray[np.float32]) -> None:
        """Write the numbers as float32 into `out`, of the same shape."""
        rows, columns = self.shape
        step = max(1, _CHUNK // max(1, columns))
        for start in range(0, rows, step):
            some = slice(start, start + step)
            self._fill(out[some].reshape(-1, self.codes.shape[1], self.block), some)

    def _fill(self, out: NDArray[np.float32], rows: slice) -> None:
        codes, scale = self.codes[rows], self.scale[rows].astype(np.float32)[..., None]
        if self.bits == 4:
            out[..., :16], out[..., 16:] = codes & 15, codes >> 4
            if self.offset:
                out -= np.float32(self.offset)
            out *= scale
        else:
            np.multiply(codes if not self.offset else codes - np.int16(self.offset), scale, out=out)
        if self.low is not None:
            out += self.low[rows].astype(np.float32)[..., None]

    def floats(self) -> NDArray[np.float32]:
        """Return the numbers as a new float32 array."""
        return _filled(self)

    def take(self, rows: slice, columns: slice) -> Matrix:
        """Return a part of the matrix; Dense if `columns` cuts a block."""
        start, stop, _ = columns.indices(self.shape[1])
        if start % self.block or stop % self.block:
            return Dense(self._part(rows, slice(None)).floats()[:, columns])
        return self._part(rows, slice(start // self.block, stop // self.block))

    def _part(self, rows: slice, blocks: slice) -> Blocks:
        at = rows, blocks
        low = None if self.low is None else self.low[at]
        levels = None if self.levels is None else self.levels.take(rows, blocks)
        return Blocks(self.bits, self.codes[at], self.scale[at], low, self.offset, levels)


Matrix = Dense | Blocks


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of one checkpoint tensor that one rank loads."""

    name: str
    rows: slice
    columns: slice
    weight: Weight


Reader = Callable[[Checkpoint, Piece], Matrix]


def reader_of(source: Checkpoint, quantize: str = "") -> Reader:
    """Return the `read` function of the method that a checkpoint is stored in.

    `quantize`: a method to apply while loading, as the user names it; "" to keep the stored form. Raises Unsupported if
    the method has no file here, or if the checkpoint is already quantized in another way.
    """
    stored = source.config.get("quantization_config")
    method = "gguf" if source.format == "gguf" else "none"
    if stored is not None:
        method = str(stored.get("quant_method") if isinstance(stored, dict) else stored)
    if quantize and method in ("none", quantize):
        method = quantize
    elif quantize:
        raise Unsupported("quantization", quantize, (method,), f"The checkpoint is already stored as {method!r}.")
    read: Reader = plugins.find("quant", method).read
    return read


def load(weight: Weight, source: Checkpoint, read: Reader, rank: int = 0) -> Matrix:
    """Load the part of `weight` that `rank` holds, with the weight's parts stacked."""
    loaded = [read(source, piece_of(weight, part, rank)) for part in weight.parts]
    if weight.columns:
        return stack(loaded)
    vector = np.concatenate([m.floats().reshape(-1) for m in loaded]) + np.float32(weight.add)
    if weight.shard == "row" and rank:  # the ranks' results are summed, so only rank 0 adds the bias
        vector[:] = 0
    return Dense(vector)


def piece_of(weight: Weight, part: Part, rank: int) -> Piece:
    """Return the piece of `part` that `rank` holds."""
    n, start, columns = weight.local(part), part.start, slice(None)
    if weight.shard in ("column", "vocab"):
        start += rank * part.rows // weight.ranks // n * n  # with fewer heads than ranks, ranks share a head
    if weight.shard == "row" and weight.columns:
        width = weight.columns // weight.ranks
        columns = slice(rank * width, (rank + 1) * width)
    return Piece(part.name, slice(start, start + n), columns, weight)


def stack(parts: list[Matrix]) -> Matrix:
    """Stack matrices along the rows. The result keeps the stored form if all have the same one, else it is float32."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Blocks):
        alike = [p for p in parts if isinstance(p, Blocks) and _layout(p) == _layout(first)]
        if len(alike) == len(parts):
            return Blocks(
                first.bits,
                np.concatenate([p.codes for p in alike]),
                np.concatenate([p.scale for p in alike]),
                _joined([p.low for p in alike]),
                first.offset,
                _stack_levels([p.levels for p in alike]),
            )
    dense = [p.array for p in parts if isinstance(p, Dense)]
    if len(dense) == len(parts) and all(a.dtype == dense[0].dtype for a in dense):
        return Dense(np.concatenate(dense))
    return Dense(np.concatenate([p.floats() for p in parts]))


def _joined(parts: list[NDArray[Any] | None]) -> NDArray[Any] | None:
    found = [p for p in parts if p is not None]
    return np.concatenate(found) if len(found) == len(parts) else None


def _stack_levels(parts: list[Levels | None]) -> Levels | None:
    found = [p for p in parts if p is not None]
    if len(found) != len(parts):
        return None
    return Levels(
        np.concatenate([p.scale for p in found]),
        np.concatenate([p.scale_factor for p in found]),
        _joined([p.low for p in found]),
        _joined([p.low_factor for p in found]),
    )


def for_each(
    wanted: Sequence[Weight],
    source: Checkpoint,
    one: Callable[[Weight], T],
    threads: int,
    report: Callable[[Progress], None] | None,
) -> dict[Weight, T]:
    """Call `one` for every weight, `threads` at a time; numpy releases the interpreter lock meanwhile.

    `report`: called from this thread with the bytes of the checkpoint read so far; None for no reports.
    """
    sizes = [sum(source.nbytes(part.name) // weight.ranks for part in weight.parts) for weight in wanted]
    done, made = 0, {}
    with ThreadPoolExecutor(threads) as pool:
        for weight, size, result in zip(wanted, sizes, pool.map(one, wanted), strict=True):
            made[weight], done = result, done + size
            if report is not None:
                report(Progress("load", done, sum(sizes)))
    return made


def check(weights: Iterable[Weight], source: Checkpoint) -> None:
    """Check the tensors that a program names against the checkpoint's headers.

    Raises ModelError with the first tensor that is missing, has another shape, or belongs to a layer of the program but
    is not read by it.
    """
    weights, wanted = list(weights), dict[str, int]()
    for weight in weights:
        for part in weight.parts:
            wanted[part.name] = max(wanted.get(part.name, 0), part.start + part.rows)
    for weight in weights:
        for part in weight.parts:
            _check(weight, part.name, wanted[part.name], source)
    unread(wanted.keys(), source)


def _check(weight: Weight, name: str, rows: int, source: Checkpoint) -> None:
    found = source.shape(name)
    expected = (rows, weight.columns) if weight.columns else (rows,)
    if weight.transposed:
        expected = expected[::-1]
    if found is None:
        cure = cure_of_missing(name, source)
        raise ModelError(
            f"The weights have no tensor {name!r}, which config.json's model needs with shape {expected}.{cure}"
        )
    if tuple(found) != expected:
        raise ModelError(f"The tensor {name!r} has shape {tuple(found)}; config.json says {expected}.")


def _layout(m: Blocks) -> tuple[Any, ...]:
    return m.bits, m.block, m.scale.dtype, m.low is None, m.offset


def _filled(matrix: Matrix) -> NDArray[np.float32]:
    out = np.empty(matrix.shape, np.float32)
    matrix.fill(out)
    return out
