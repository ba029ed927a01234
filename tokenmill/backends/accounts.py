"""Sums and listings that kinds of backends share: bytes, dtype and forms of weights, kernels line by line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from tokenmill.program import ops
from tokenmill.program.cost import weights_of
from tokenmill.program.ops import Part, Weight
from tokenmill.program.value import Program
from tokenmill.quant._method import Find, finder, notes
from tokenmill.quant.base import Piece, Reader, check, load_parts
from tokenmill.quant.coded import Coded
from tokenmill.weights.checkpoint import Checkpoint

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number, by dtype of a computation."""
_ROWS = 128  # read of a matrix to find its form: whole blocks of rows that share a scale
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def stored_dtype(named: str | None, source: Checkpoint) -> str:
    """Return the dtype that config.json names, else that of the first tensor of floats."""
    if named is not None:
        return named
    kinds = (source[name].kind for name in source.names())
    return next((_FLOATS[kind] for kind in kinds if kind in _FLOATS), "bfloat16")


def dense_bytes(program: Program, source: Checkpoint, dtype: str) -> int:
    """Return the bytes of a program's weights in a computation's dtype; ModelError as `quant.base.check`."""
    check(weights_of(program.model), source)
    return sum(weight.size for weight in weights_of(program)) * ITEM_BYTES[dtype]


def listed(kernels: Mapping[str, Counter[str]], more: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return a line for each kind of operation with its kernels, and for each rule in `more`."""
    lines = {kind: _times(names) for kind, names in kernels.items()} | dict(more or {})
    width = max(map(len, lines), default=0)
    return tuple(f"{name.ljust(width)}  {text}" for name, text in lines.items())


def _times(kernels: Counter[str]) -> str:
    return ", ".join(f"{name} × {count}" if count > 1 else name for name, count in kernels.items())


Use = Literal["product", "table", "expert"]
"""Use of a matrix: by products alone, as an embedding table too, or as one of a layer's experts"""
Form = Callable[[Sequence[Coded], Use, str], str]
"""(parts of a matrix, its use, dtype of the computation) -> the form in which a backend multiplies with it"""
_PLAIN = {"f32": "float32", "f64": "float64", "f16": "float16", "bf16": "bfloat16"}


def forms_of_weights(program: Program, source: Checkpoint, read: Reader, form: Form, dtype: str) -> tuple[str, ...]:
    """Return a line for each form that matrices of products and experts are stored or made in, and run in.

    Last come notes of the method, on what is not quantized here.
    """
    found = Counter[tuple[str, str]]()
    for sample in samples(program, source, read):
        stored = ", ".join(dict.fromkeys(map(stored_form, sample.parts)))
        found[stored, form(sample.parts, sample.use, dtype)] += sample.alike
    lines = (f"{count} × {stored}: {runs}" for (stored, runs), count in found.most_common())
    return *lines, *notes(source)


class Sample(NamedTuple):
    """A few rows of one of several matrices that are alike."""

    parts: list[Coded]
    use: Use
    rows: int  # of the whole matrix
    alike: int  # number of such matrices


def samples(program: Program, source: Checkpoint, read: Reader) -> list[Sample]:
    """Return samples of the matrices of products and experts, one of each shape, use and storage."""
    known, find = dict[object, Sample](), finder(source)
    for weight, use, count in multiplied(program):
        storage = tuple(_storage(part, source, find) for part in weight.parts)
        key = replace(weight, parts=(), add=0.0), weight.rows, use, storage
        if key not in known:
            parts = load_parts(weight, source, lambda s, piece: read(s, _few_rows(piece)))
            known[key] = Sample(parts, use, weight.rows, 0)
        known[key] = known[key]._replace(alike=known[key].alike + count)
    return list(known.values())


def _storage(part: Part, source: Checkpoint, find: Find) -> tuple[object, ...]:
    """Return what parts have in common whose forms are the same: types and shapes of the tensors that hold them.

    With a tensor of the columns' groups, its numbers decide, too, so such parts have nothing in common.
    """
    matrix = find(part.name)
    names = (part.name,) if matrix is None else matrix.tensors
    if any(name.endswith("g_idx") for name in names):
        return names
    return tuple((source[name].kind, source.shape(name)) for name in names)


def multiplied(program: Program) -> list[tuple[Weight, Use, int]]:
    """Return the matrices of products, and the first expert's of each layer, with the number of experts."""
    tables = {op.table for op in program.ops if isinstance(op, ops.Embed)}
    products = dict.fromkeys(op.weight for op in program.ops if isinstance(op, ops.Linear))
    found: list[tuple[Weight, Use, int]] = [(w, "table" if w in tables else "product", 1) for w in products]
    for op in program.ops:
        if isinstance(op, ops.Experts):
            found += [(ws[0], "expert", len(ws)) for ws in op.weights().values() if ws[0].columns]
    return found


def _few_rows(piece: Piece) -> Piece:
    first, stop, step = piece.rows.indices(1 << 62)
    return replace(piece, rows=slice(first, min(stop, first + _ROWS * step), step))


def stored_form(matrix: Coded) -> str:
    """Return the format of a matrix's codes and what shares a scale, for users."""
    if matrix.dense:
        return _PLAIN[matrix.format]
    height, width = matrix.block
    shared = {(0, 0): "one scale", (1, 0): "a scale a row"}.get(matrix.block, f"blocks of {height} × {width}")
    parts = [matrix.format.removesuffix("x2"), f"groups of {width}" if height == 1 and width else shared]
    if matrix.low is not None:
        parts.append("minima")
    if matrix.zero is not None and matrix.zero.size > 1:
        parts.append("zero points")
    if matrix.order is not None:
        parts.append("act-order")
    return " ".join((parts[0], "with", ", ".join(parts[1:])))
