"""Lowering of operations of single architectures (`program/special.py`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.layout import Fields, Lowered, float_bits
from tokenmill.backends.cpu.memory import Memory
from tokenmill.program import special
from tokenmill.program.ops import Embed, Op
from tokenmill.program.value import Program, Value

_LANES = 16


def refused(op: Op) -> str:
    """Return why the kernels cannot run an operation of a single architecture; "" if they can, or for another one."""
    width = 0
    if isinstance(op, special.Sparsify | special.Beside):
        width = op.x.width
    elif isinstance(op, special.WithMagnitude):
        width = op.like.width
    elif isinstance(op, special.AddToOthers | special.CorrectStreams):
        width = op.y.width
    elif isinstance(op, special.MixStreams):
        width = op.x.width // round(op.factors.width**0.5)
    return f"its streams are of multiples of {_LANES} columns, not {width}" if width % _LANES else ""


def refused_ids(program: Program) -> str:
    """Return why ids that are replaced cannot be; "" if they can: only lookups of tables may read them."""
    for op in program.ops:
        if isinstance(op, special.Within):
            readers = [other for other in program.ops if op.out.buffer in {v.buffer for v in other.reads().values()}]
            if op.ids.buffer != program.inputs.ids.buffer or not all(isinstance(o, Embed) for o in readers):
                return "it replaces ids for lookups of tables only"
    return ""


def rows_within(program: Program, ids: Value) -> int:
    """Return the rows of a table beyond which ids count as 0; 0: none are replaced."""
    found = (op.rows for op in program.ops if isinstance(op, special.Within) and op.out.buffer == ids.buffer)
    return next(found, 0)


def scale_by_position(memory: Memory, op: special.ScaleByPosition) -> Lowered:
    """Return the row that scales by the position."""
    fields = {
        layout.POSITION_FACTORS: memory.growth(op),
        layout.LENGTH: op.length,
        layout.POSITION_OFFSET: op.offset,
    }
    return [("scale_by_position", fields)]


def xielu(memory: Memory, op: special.XIelu) -> Lowered:
    """Return the row of an activation whose slopes are constants here."""
    above, below = (float(np.logaddexp(0, memory.numbers(alpha)[0])) for alpha in (op.alpha_p, op.alpha_n))
    return [("xielu", {layout.FACTOR: float_bits(above) | float_bits(0.5 + below) << 32})]


def clip(memory: Memory, op: special.Clip) -> Lowered:
    """Return the row that bounds."""
    return [("clip", {layout.FACTOR: float_bits(op.limit)})]


def scale_by_weight(memory: Memory, op: special.ScaleByWeight) -> Lowered:
    """Return the row that scales: by one number, or by a row that all rows share."""
    if op.weight.rows == 1:
        return [("scale", {layout.FACTOR: float_bits(float(memory.numbers(op.weight)[0]))})]
    fields = {layout.Y: memory.vector(op.weight), layout.Y_STRIDE: 0, layout.ACT: layout.LINEAR}
    return [("gated_act", fields)]


def scale_by_expert(memory: Memory, op: special.ScaleByExpert) -> Lowered:
    """Return the row that scales the factors of experts."""
    factors, ids = memory.place(op.factors), memory.place(op.ids)
    fields = {
        layout.X: ids.address,
        layout.X_STRIDE: ids.stride,
        layout.WIDTH: op.ids.width,
        layout.FACTORS: factors.address,
        layout.FACTORS_STRIDE: factors.stride,
        layout.WEIGHT: memory.vector(op.weight),
    }
    return [("factors_by_expert", fields)]


def within(memory: Memory, op: special.Within) -> Lowered:
    """Return no row: the lookup of a table replaces the ids."""
    return []


def sparsify(memory: Memory, op: special.Sparsify) -> Lowered:
    """Return the row that leaves the largest columns."""
    fields = {layout.FACTOR: float_bits(op.deviations)}
    if op.moments is None:
        return [("sparsify", fields)]
    return [("sparsify_share", fields | _other(memory, op.moments) | {layout.SHARED_COLUMNS: op.columns})]


def _other(memory: Memory, value: Value) -> Fields:
    place = memory.place(value)
    return {layout.Y: place.address, layout.Y_STRIDE: place.stride}


def with_magnitude(memory: Memory, op: special.WithMagnitude) -> Lowered:
    """Return the row that scales parts."""
    fields = _other(memory, op.like) | {
        layout.WIDTH: op.like.width,
        layout.STREAMS: op.x.width // op.like.width,
        layout.FACTOR: float_bits(op.least),
    }
    return [("magnitude", fields)]


def beside(memory: Memory, op: special.Beside) -> Lowered:
    """Return a row that copies x, and one that copies y."""
    y, out = memory.place(op.y), memory.place(op.out)
    second = {
        layout.X: y.address,
        layout.X_STRIDE: y.stride,
        layout.WIDTH: op.y.width,
        layout.OUT: out.address + 4 * op.x.width,
        layout.ACT: layout.LINEAR,
    }
    return [("act", {layout.ACT: layout.LINEAR}), ("act", second)]


def _streams(memory: Memory, width: int, count: int, factors: Value) -> Fields:
    place = memory.place(factors)
    return {
        layout.WIDTH: width,
        layout.STREAMS: count,
        layout.FACTORS: place.address,
        layout.FACTORS_STRIDE: place.stride,
    }


def mix_streams(memory: Memory, op: special.MixStreams) -> Lowered:
    """Return the row that mixes streams."""
    count = round(op.factors.width**0.5)
    return [("mix_streams", _streams(memory, op.x.width // count, count, op.factors))]


def correct_streams(memory: Memory, op: special.CorrectStreams) -> Lowered:
    """Return the row that corrects streams."""
    fields = _streams(memory, op.y.width, op.factors.width, op.factors)
    return [("correct_streams", fields | _other(memory, op.y))]


def add_to_others(memory: Memory, op: special.AddToOthers) -> Lowered:
    """Return a row that copies the first stream, and one for each other stream."""
    x, out, width = memory.place(op.x), memory.place(op.out), op.y.width
    first: Fields = {layout.WIDTH: width, layout.ACT: layout.LINEAR}
    others: list[Fields] = [
        _other(memory, op.y)
        | {layout.WIDTH: width, layout.X: x.address + 4 * start, layout.OUT: out.address + 4 * start}
        for start in range(width, op.x.width, width)
    ]
    return [("act", first), *(("add", fields) for fields in others)]


KINDS: dict[type[Op], Callable[..., Lowered]] = {
    special.ScaleByPosition: scale_by_position,
    special.XIelu: xielu,
    special.Clip: clip,
    special.ScaleByWeight: scale_by_weight,
    special.ScaleByExpert: scale_by_expert,
    special.Within: within,
    special.Sparsify: sparsify,
    special.WithMagnitude: with_magnitude,
    special.Beside: beside,
    special.MixStreams: mix_streams,
    special.CorrectStreams: correct_streams,
    special.AddToOthers: add_to_others,
}
"""Functions of the lowering by kind"""
