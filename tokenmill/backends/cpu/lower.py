"""From operations to rows of a step's table: which kernel, and what stands in its columns.

`Lowering` knows where values, weights and caches lie; a function a kind (`KINDS`) fills in the columns that are the
kind's own and names its kernels. Another kind of operation is another function here and a kernel; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.cpu import layout as t
from tokenmill.backends.cpu.forms import PAIRS
from tokenmill.backends.cpu.layout import ACTS, float_bits
from tokenmill.backends.cpu.memory import Heads, Memory, Turns
from tokenmill.errors import Unsupported
from tokenmill.program import ops
from tokenmill.program.ops import Op
from tokenmill.program.value import Program, Value

Row = NDArray[np.int64]
Fields = dict[int, int]
"""Column -> its word"""


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table and the kernel whose address becomes its first word."""

    op: Op | None  # None: not the program's
    kernel: str
    row: Row


class Lowering:
    """Lowers one program whose values and weights have their places."""

    def __init__(self, program: Program, memory: Memory) -> None:
        self.program, self.memory = program, memory

    def lines(self) -> list[Line]:
        """The whole table; kernels' addresses are still to be written."""
        lines = [line for op in self.program.ops for line in self.lower(op)]
        return [*map(self._turns, self.memory.all_turns()), *lines]

    def lower(self, op: Op) -> list[Line]:
        """Rows of one operation. Unsupported if there is no kernel for its kind."""
        kind = KINDS.get(type(op))
        if kind is None:
            raise Unsupported("operation", type(op).__name__, [k.__name__ for k in KINDS])
        common = self._common(op)
        return [Line(op, kernel, _row(common | fields)) for kernel, fields in kind(self, op)]

    def _common(self, op: Op) -> Fields:
        """The columns that every kind has."""
        out = self.memory.place(op.out)
        fields = {
            t.ROWS: int(op.out.spec.rows == "samples"),
            t.OUT: out.address,
            t.OUT_STRIDE: out.stride,
            t.OUT_SCALES: out.scales,
            t.PRIVATE_OUT: int(op.out.buffer in self.memory.private),
        }
        x: Value | None = getattr(op, "x", None) or getattr(op, "q", None) or getattr(op, "gate", None)
        if x is None:
            return fields
        at = self.memory.place(x)
        private = int(x.buffer in self.memory.private)
        more = {t.X: at.address, t.X_STRIDE: at.stride, t.X_SCALES: at.scales}
        return fields | more | {t.WIDTH: x.width, t.PRIVATE_X: private}

    def _turns(self, turns: Turns) -> Line:
        moves = turns.table.moves
        fields = {
            t.OUT: turns.rows.ctypes.data,
            t.OUT_STRIDE: turns.rows.strides[0],
            t.ROPE_HALF: turns.table.rotary_dim // 2,
            t.FREQUENCIES: turns.frequencies.ctypes.data,
            t.FREQUENCY_STRIDE: turns.frequencies.strides[0] if moves else 0,
            t.MAGNITUDE: float_bits(turns.table.magnitude()),
        }
        return Line(None, "turns", _row(fields))


def _row(fields: Fields) -> Row:
    row: Row = np.zeros(t.COLUMNS, np.int64)
    for column, word in fields.items():
        row[column] = word
    return row


Lowered = list[tuple[str, Fields]]
"""Kernels in the order in which they run, each with the columns of its own."""


def _embed(lower: Lowering, op: ops.Embed) -> Lowered:
    (table,) = lower.memory.panels(op.table)
    fields = {
        t.WIDTH: op.out.width,
        t.TABLE: table.address,
        t.TABLE_PANEL_BYTES: table.panel_bytes,
        t.TABLE_SCALE: 0 if op.scale == 1 else float_bits(op.scale),
        t.BY_POSITION: int(op.ids.buffer == lower.program.inputs.positions.buffer),
    }
    return [(f"embed_{table.form}", fields)]


def _linear(lower: Lowering, op: ops.Linear) -> Lowered:
    """A row for each part of the weight that is stored in a way of its own; they write side by side.

    In front of them one that makes x bfloat16 for those that are multiplied so.
    """
    out = lower.memory.place(op.out)
    residual = lower.memory.place(op.residual) if op.residual else None
    bias = lower.memory.vector(op.bias, gated=op.gated)
    parts, stride = lower.memory.panels(op.weight), t.narrow_stride(op.x.width)
    paired = any(part.form == PAIRS.name for part in parts)
    lowered: Lowered = [("narrow", {t.OUT_STRIDE: stride})] if paired else []
    for part in parts:
        fields = {
            t.OUT: out.address + part.start * (1 if out.scales else 4),
            t.OUT_SCALES: out.scales and out.scales + part.start // 4,
            t.WEIGHT: part.address,
            t.PANEL_BYTES: part.panel_bytes,
            t.PANELS: part.count,
            t.BIAS: bias and bias + part.start * 4,
            t.ACT: ACTS[op.act],
            t.GATED: int(op.gated),
        }
        if part.form == PAIRS.name:
            fields |= {t.X_STRIDE: stride}
        if residual is not None:
            fields |= {t.RESIDUAL: residual.address + part.start * 4, t.RESIDUAL_STRIDE: residual.stride}
        lowered.append((f"linear_{part.form}", fields))
    return lowered


def _norm(lower: Lowering, op: ops.Norm) -> Lowered:
    without = op.center and op.bias is None  # a LayerNorm's kernel always adds one
    fields = {
        t.NORM_WEIGHT: lower.memory.vector(op.weight),
        t.NORM_BIAS: lower.memory.no_bias(op.head_dim or op.x.width) if without else lower.memory.vector(op.bias),
        t.NORM_EPS: float_bits(op.eps),
        t.CENTER: int(op.center),
    }
    if op.head_dim:
        fields |= {t.HEADS: op.x.width // op.head_dim, t.WIDTH: op.head_dim}
    return [("norm", fields)]


def _add_norm(lower: Lowering, op: ops.AddNorm) -> Lowered:
    y, total = lower.memory.place(op.y), lower.memory.place(op.total)
    more = {t.Y: y.address, t.Y_STRIDE: y.stride, t.TOTAL: total.address, t.TOTAL_STRIDE: total.stride}
    return [("add_norm", fields | more) for _, fields in _norm(lower, op)]


def _rope(lower: Lowering, op: ops.Rope) -> Lowered:
    heads = {t.HEAD_DIM: op.head_dim, t.HEADS: op.x.width // op.head_dim}
    return [("rope", lower.memory.turns(op.rope).columns | heads)]


def _attention(lower: Lowering, op: ops.Attention) -> Lowered:
    heads = Heads.of(op, lower.memory.sizes.kv_dtype)
    keys, values = lower.memory.place(op.k), lower.memory.place(op.v)
    fields = {
        t.WIDTH: heads.count,
        t.HEAD_DIM: op.head_dim,
        t.GROUP: heads.group,
        t.KEYS: keys.address,
        t.KEY_STRIDE: keys.stride,
        t.VALUES: values.address,
        t.VALUE_STRIDE: values.stride,
        t.ATTENTION_SCALE: float_bits(op.scale),
        t.ATTENTION_CAP: float_bits(op.softcap) if op.softcap else 0,
        t.WINDOW: op.window,
        t.HEAD_EPS: float_bits(op.eps),
        t.Q_NORM: lower.memory.vector(op.q_norm),
        t.K_NORM: lower.memory.vector(op.k_norm),
        t.AT_ONCE: heads.at_once,
    }
    fields |= lower.memory.cache(op.layer)
    if op.rope:
        fields |= lower.memory.turns(op.rope).columns
    return [(f"write_{heads.name}", fields), (f"attend_{heads.name}", fields)]


def _gated_act(lower: Lowering, op: ops.GatedAct) -> Lowered:
    up = lower.memory.place(op.up)
    return [("gated_act", {t.Y: up.address, t.Y_STRIDE: up.stride, t.ACT: ACTS[op.act]})]


def _act(lower: Lowering, op: ops.Act) -> Lowered:
    return [("act", {t.ACT: ACTS[op.act]})]


def _add(lower: Lowering, op: ops.Add) -> Lowered:
    y = lower.memory.place(op.y)
    return [("add", {t.Y: y.address, t.Y_STRIDE: y.stride})]


def _soft_cap(lower: Lowering, op: ops.SoftCap) -> Lowered:
    return [("soft_cap", {t.CAP: float_bits(op.cap)})]


def _take_rows(lower: Lowering, op: ops.TakeRows) -> Lowered:
    return [("take_rows", {})]


def _quantize(lower: Lowering, op: ops.Quantize) -> Lowered:
    return [("quantize_rows", {})]


KINDS: dict[type[Op], Callable[..., Lowered]] = {
    ops.Embed: _embed,
    ops.Linear: _linear,
    ops.Norm: _norm,
    ops.AddNorm: _add_norm,
    ops.Rope: _rope,
    ops.Attention: _attention,
    ops.GatedAct: _gated_act,
    ops.Act: _act,
    ops.Add: _add,
    ops.SoftCap: _soft_cap,
    ops.TakeRows: _take_rows,
    ops.Quantize: _quantize,
}
"""What this backend runs."""

