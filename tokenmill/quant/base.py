"""Loading of a `Weight` as a stored matrix.

A quantization method is a file of this package, named as in `quant_method`, with these functions:

* `read(source, piece) -> Coded` reads a part of a matrix or vector.
* `matrix(source, name) -> Matrix | None`, if tensors have other names than weights: the shape of the weight `name` and
  the tensors that hold it, from headers alone; None if it is stored plain. It checks the method's configuration and the
  types and shapes of the tensors, and raises ModelError.
* `refuse()`, if no checkpoint of the method can be read: raises Unsupported.
* `notes(source) -> Iterable[str]`, if the programs that made the checkpoint quantize more than its weights.
* `names(source) -> tuple[str, ...]`, if `--quantize` may name the stored method otherwise than the file.

`WHILE_LOADING = True` marks a file that quantizes plain weights if `--quantize` names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import numpy as np

from tokenmill.errors import ModelError
from tokenmill.program.share import Span
from tokenmill.program.weight import Part, Weight
from tokenmill.quant._method import Find, Matrix, chosen, finder, stored_names
from tokenmill.quant._unread import cure_of_missing, unread
from tokenmill.quant.coded import Coded, Levels, dense, stack
from tokenmill.quant.cut import Cut, cut, zeros_like
from tokenmill.weights.checkpoint import Checkpoint, Stored, read_ahead
from tokenmill.wire.messages import Progress

__all__ = [
    "Coded", "Levels", "Matrix", "Piece", "Reader", "check", "dense", "for_each", "load", "load_parts", "loaded",
    "pieces_of", "reader_of", "stack", "stored_names",
]  # fmt: skip

T = TypeVar("T")
_ALIGNED = 256  # columns: of GGUF's superblocks, and a multiple of most methods' blocks


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of one checkpoint tensor that one rank loads.

    A method reads `rows` and `columns`. `loaded` makes of them what the rank holds, which may have zeros.
    """

    name: str
    rows: slice
    columns: slice
    weight: Weight
    index: int | None = None  # as in `Part`
    below: int = 0  # as in `Part`
    zero: bool = False  # all numbers are replaced by zeros
    cut: Cut | None = None  # columns that the rank holds of those that are read; None: all

    def stored(self, source: Checkpoint) -> Stored:
        """Return the tensor, or the matrix or vector of a stack, that the piece is a part of."""
        return source[self.name].at(self.index, self.below)


Reader = Callable[[Checkpoint, Piece], Coded]


def reader_of(source: Checkpoint, quantize: str = "") -> Reader:
    """Return the `read` function of the method that a checkpoint is stored in.

    `quantize`: a method to apply while loading, or the name of the stored one, as the user gives it; "" to keep the
    stored form. Raises Unsupported if the method has no file here, and ArgumentError if `quantize` contradicts what
    the checkpoint is.
    """
    read: Reader = chosen(source, quantize).read
    return read


def load(weight: Weight, source: Checkpoint, read: Reader, rank: int = 0) -> Coded:
    """Load the part of `weight` that `rank` holds, with the weight's parts stacked."""
    loaded = load_parts(weight, source, read, rank)
    if weight.columns:
        return stack(loaded)
    vector = np.concatenate([m.floats().reshape(-1) for m in loaded]) + np.float32(weight.add)
    if weight.shard == "row" and rank:  # the ranks' results are summed, so only rank 0 adds the bias
        vector[:] = 0
    return dense(vector)


def load_parts(weight: Weight, source: Checkpoint, read: Reader, rank: int = 0) -> list[Coded]:
    """Load the pieces of `weight` that `rank` holds, in order, and let the system read them from the disk meanwhile."""
    parts = [loaded(source, piece, read) for piece in pieces_of(weight, rank)]
    for each in parts:
        read_ahead(each.codes)
    return parts


def loaded(source: Checkpoint, piece: Piece, read: Reader) -> Coded:
    """Return what a rank holds of a piece: as `read` returns it, but cut, and with zeros in empty places."""
    found = read(source, piece)
    if piece.zero:
        found = zeros_like(found)
    return found if piece.cut is None else cut(found, piece.cut)


def pieces_of(weight: Weight, rank: int = 0) -> list[Piece]:
    """Return the pieces of `weight` that `rank` holds, in order.

    For places that hold zeros there are pieces, too, so that all ranks hold a weight in the same form.
    """
    columns, of_rank = _columns(weight, rank)
    return [
        Piece(part.name, rows, columns, weight, part.index, part.below, span.empty, of_rank)
        for part, span in _held(weight, rank)
        for rows in part.slices(max(span.first, 0), span.size)
    ]


def _held(weight: Weight, rank: int) -> list[tuple[Part, Span]]:
    """Return the rows of parts that a rank holds, in order."""
    if weight.shard == "part" and weight.ranks > 1:
        spans, parts = weight.axis(len(weight.parts)).spans(weight.ranks, rank), weight.parts
        found = [(i, span.empty) for span in spans for i in range(max(span.first, 0), max(span.first, 0) + span.size)]
        return [(parts[i], Span(-1 if empty else 0, parts[i].rows)) for i, empty in found]
    if weight.shard in ("column", "vocab") and weight.ranks > 1:
        axes = [(part, weight.axis(part.rows)) for part in weight.parts]
        return [(part, span) for part, axis in axes for span in axis.spans(weight.ranks, rank)]
    return [(part, Span(0, part.rows)) for part in weight.parts]


def _columns(weight: Weight, rank: int) -> tuple[slice, Cut | None]:
    """Return the columns that a rank reads, in whole blocks of scales, and which of them it holds."""
    if weight.shard != "row" or not weight.columns or weight.ranks == 1:
        return slice(None), None
    axis = weight.axis(weight.columns)
    spans = axis.spans(weight.ranks, rank)
    read = [span for span in spans if not span.empty] or [Span(0, min(_ALIGNED, weight.columns))]
    start = min(span.first for span in read) // _ALIGNED * _ALIGNED
    stop = min(-(-max(span.first + span.size for span in read) // _ALIGNED) * _ALIGNED, weight.columns)
    moved = tuple(span if span.empty else span._replace(first=span.first - start) for span in spans)
    return slice(start, stop), Cut(moved, axis.step(weight.ranks), axis.padded(weight.ranks))


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
    find = finder(source)
    sizes = [sum(_bytes(part, weight, source, find) // weight.ranks for part in weight.parts) for weight in wanted]
    done, made = 0, {}
    with ThreadPoolExecutor(threads) as pool:
        for weight, size, result in zip(wanted, sizes, pool.map(one, wanted), strict=True):
            made[weight], done = result, done + size
            if report is not None:
                report(Progress("load", done, sum(sizes)))
    return made


def _bytes(part: Part, weight: Weight, source: Checkpoint, find: Find) -> int:
    """Return the bytes of a part in the checkpoint."""
    matrix = find(part.name) if weight.columns else None
    names, shape = ((part.name,), source.shape(part.name) or ()) if matrix is None else (matrix.tensors, matrix.shape)
    return sum(map(source.nbytes, names)) * part.rows * max(1, weight.columns) // max(1, prod(shape))


def check(weights: Iterable[Weight], source: Checkpoint) -> None:
    """Check the tensors that a program names against the checkpoint's headers.

    Raises ModelError with the first tensor that is missing, has another shape, or belongs to a layer of the program but
    is not read by it.
    """
    weights, wanted, stacked = list(weights), dict[str, int](), dict[str, int]()
    find = finder(source)
    below = {part.name: part.below for weight in weights for part in weight.parts if part.below}
    for part in (part for weight in weights for part in weight.parts):
        wanted[part.name] = max(wanted.get(part.name, 0), part.end)
        if part.index is not None:
            stacked[part.name] = max(stacked.get(part.name, 0), part.index + 1)
    for weight in weights:
        for part in weight.parts:
            matrix = find(part.name) if weight.columns else None
            outputs_first = matrix is not None or source.format == "gguf" or not weight.transposed
            shape = (wanted[part.name], weight.columns) if weight.columns else (wanted[part.name],)
            expected = _stacked(
                shape if outputs_first else shape[::-1], stacked.get(part.name), below.get(part.name, 0)
            )
            _check(weight, part.name, expected, source, matrix)
    unread(weights, source)


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _stacked(each: tuple[int, ...], stacked: int | None, below: int) -> tuple[int, ...]:
    """Return the shape of a tensor that stacks matrices or vectors of the shape `each`, or holds one."""
    if below:
        return below * each[0], *each[1:]
    return each if stacked is None else (stacked, *each)


def _check(weight: Weight, name: str, expected: tuple[int, ...], source: Checkpoint, matrix: Matrix | None) -> None:
    found = source.shape(name) if matrix is None else matrix.shape
    if found is None:
        cure = cure_of_missing(name, source)
        raise ModelError(
            f"The weights have no tensor {name!r}, which config.json's model needs with shape {expected}.{cure}"
        )
    by_head = (expected[-1] // weight.unit, weight.unit)  # of a vector
    # A convolution's weight is (columns, 1, kernel).
    if _without_ones(found) != _without_ones(expected) and (weight.columns or tuple(found) != by_head):
        form = f" by {matrix.form}" if matrix is not None and matrix.form else ""
        stored = f", stored in {matrix.tensors[0]!r}," if matrix is not None else ""
        raise ModelError(f"The tensor {name!r}{stored} has shape {tuple(found)}{form}; config.json says {expected}.")
