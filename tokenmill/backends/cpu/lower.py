"""Lowering of operations to rows of the step table: the kernel to call and the words of its columns.

`Lowering` writes the columns that all kinds of operations share. One function for each kind (`KINDS`) names the kernels
and returns the columns of that kind. A new kind of operation needs such a function and a kernel, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.cpu import (
    collectives,
    items,
    layout,
    lower_encoded,
    lower_latent,
    lower_special,
    lower_states,
    ordered,
)
from tokenmill.backends.cpu.division import Needed
from tokenmill.backends.cpu.forms import PAIRS
from tokenmill.backends.cpu.layout import ACTS, Fields, Lowered, float_bits
from tokenmill.backends.cpu.memory import AttentionShape, CosSinTable, Memory
from tokenmill.errors import Unsupported
from tokenmill.program import ops, recurrence
from tokenmill.program.ops import Op
from tokenmill.program.stage import Receive, Send
from tokenmill.program.value import Program, Value

Row = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table and the name of its kernel, whose address becomes the first word."""

    op: Op | None  # None: the backend added the row, not the program
    kernel: str
    row: Row


class Lowering:
    """The lowering of one program, after memory was assigned to its values and weights."""

    def __init__(self, program: Program, memory: Memory) -> None:
        self.program, self.memory = program, memory

    def lines(self) -> list[Line]:
        """Return all rows of the table. The addresses of kernels are not set yet."""
        meetings = self.memory.division.meetings
        lines = list[Line]()
        for i, op in enumerate(self.program.ops):
            lines += [meeting(op, meetings[i])] if i in meetings else []
            lines += self.lower(op)
        lines += [meeting(None)] if len(self.program.ops) in meetings else []
        return [*map(self._cos_sin, self.memory.all_cos_sin()), *lines]

    def lower(self, op: Op) -> list[Line]:
        """Return the rows of one operation. Raises Unsupported if its kind has no kernel."""
        kind = KINDS.get(type(op))
        if kind is None:
            raise Unsupported("operation", type(op).__name__, [k.__name__ for k in KINDS])
        common = self._common(op)
        return [Line(op, kernel, _row(common | fields)) for kernel, fields in kind(self, op)]

    def _common(self, op: Op) -> Fields:
        """Return the columns that all kinds share."""
        out = self.memory.result(op.out)
        fields = {
            layout.ROWS: int(op.out.spec.rows == "samples"),
            layout.OUT: out.address,
            layout.OUT_STRIDE: out.stride,
            layout.OUT_SCALES: out.scales,
            layout.PRIVATE_OUT: self.memory.copy_of_first_thread(op.out),
        }
        if op.out.buffer in self.memory.division.own:
            threads, ranks = self.memory.sizes.threads, self.memory.division.ranks
            fields |= {layout.OWN_FIRST: self.memory.rank * threads, layout.OWN_STEP: ranks * threads}
        x: Value | None = getattr(op, "x", None) or getattr(op, "q", None) or getattr(op, "gate", None)
        if x is None:
            return fields
        at = self.memory.place(x)
        private = self.memory.copy_of_first_thread(x)
        more = {layout.X: at.address, layout.X_STRIDE: at.stride, layout.X_SCALES: at.scales}
        return fields | more | {layout.WIDTH: x.width, layout.PRIVATE_X: private}

    def _cos_sin(self, cos_sin: CosSinTable) -> Line:
        moves = cos_sin.table.moves
        fields = {
            layout.OUT: cos_sin.rows.ctypes.data,
            layout.OUT_STRIDE: cos_sin.rows.strides[0],
            layout.ROPE_HALF: cos_sin.table.rotary_dim // 2,
            layout.FREQUENCIES: cos_sin.frequencies.ctypes.data,
            layout.FREQUENCY_STRIDE: cos_sin.frequencies.strides[0] if moves else 0,
            layout.MAGNITUDE: float_bits(cos_sin.table.magnitude()),
        }
        return Line(None, "cos_sin", _row(fields))


def meeting(op: Op | None, needed: Needed = "always") -> Line:
    """Return the row in which ranks wait for each other before the rows of `op`."""
    return Line(op, "meet", _row({layout.ALWAYS: int(needed == "always"), layout.ROWS: int(needed == "samples")}))


def _row(fields: Fields) -> Row:
    row: Row = np.zeros(layout.COLUMNS, np.int64)
    for column, word in fields.items():
        row[column] = word
    return row


def _embed(lower: Lowering, op: ops.Embed) -> Lowered:
    (table,) = lower.memory.panels(op.table)
    fields = {
        layout.WIDTH: op.out.width,
        layout.TABLE: table.address,
        layout.TABLE_PANEL_BYTES: table.panel_bytes,
        layout.TABLE_SCALE: 0 if op.scale == 1 else float_bits(op.scale),
        layout.BY_POSITION: int(op.ids.buffer == lower.program.inputs.positions.buffer),
        layout.ROWS_WITHIN: lower_special.rows_within(lower.program, op.ids),
    }
    if op.table.ranks > 1:
        fields |= {layout.FIRST_ID: lower.memory.rank * op.table.rows, layout.TABLE_ROWS: op.table.rows}
    return [(f"embed_{table.form}", fields)]


def _linear(lower: Lowering, op: ops.Linear) -> Lowered:
    """Return one row for each part of the weight that has a storage format of its own. They write side by side.

    A row that converts x to bfloat16 comes first if a part multiplies in bfloat16.
    """
    out = lower.memory.result(op.out)
    residual = lower.memory.place(op.residual) if op.residual else None
    bias = lower.memory.vector(op.bias, gated=op.gated)
    parts, stride = lower.memory.panels(op.weight), layout.narrow_stride(op.x.width)
    paired = any(part.form == PAIRS.name for part in parts)
    lowered: Lowered = [("narrow", {layout.OUT_STRIDE: stride})] if paired else []
    for part in parts:
        fields = {
            layout.OUT: out.address + part.start * (1 if out.scales else 4),
            layout.OUT_SCALES: out.scales and out.scales + part.start // 4,
            layout.WEIGHT: part.address,
            layout.PANEL_BYTES: part.panel_bytes,
            layout.PANELS: part.count,
            layout.BIAS: bias and bias + part.start * 4,
            layout.ACT: ACTS[op.act],
            layout.GATED: int(op.gated),
        }
        if part.form == PAIRS.name:
            fields |= {layout.X_STRIDE: stride}
        if residual is not None:
            fields |= {layout.RESIDUAL: residual.address + part.start * 4, layout.RESIDUAL_STRIDE: residual.stride}
        lowered.append((f"linear_{part.form}", fields))
    return lowered


def _norm(lower: Lowering, op: ops.Norm) -> Lowered:
    memory = lower.memory
    width = op.weight.rows if op.weight else op.head_dim or op.x.width
    without = op.center and op.bias is None  # the LayerNorm kernel always adds a bias
    fields = {
        layout.NORM_WEIGHT: memory.vector(op.weight) if op.weight else memory.constant(width, 1.0),
        layout.NORM_BIAS: memory.constant(width, 0.0) if without else memory.vector(op.bias),
        layout.NORM_STEP: 4 * op.head_dim if width > op.head_dim > 0 else 0,
        layout.NORM_EPS: float_bits(op.eps),
        layout.CENTER: int(op.center),
    }
    if op.head_dim:
        fields |= {layout.HEADS: op.x.width // op.head_dim, layout.WIDTH: op.head_dim}
    return [("norm", fields)]


def _add_norm(lower: Lowering, op: ops.AddNorm) -> Lowered:
    y, total = lower.memory.place(op.y), lower.memory.place(op.total)
    more = {
        layout.Y: y.address,
        layout.Y_STRIDE: y.stride,
        layout.TOTAL: total.address,
        layout.TOTAL_STRIDE: total.stride,
    }
    return [("add_norm", fields | more) for _, fields in _norm(lower, op)]


def _rope(lower: Lowering, op: ops.Rope) -> Lowered:
    heads = {layout.HEAD_DIM: op.head_dim, layout.HEADS: op.x.width // op.head_dim}
    return [("rope", lower.memory.cos_sin(op.rope).columns | heads)]


def _attention(lower: Lowering, op: ops.Attention) -> Lowered:
    heads = AttentionShape.of(op, lower.memory.sizes.kv_dtype)
    keys, values = lower.memory.place(op.k), lower.memory.place(op.v)
    fields = {
        layout.WIDTH: heads.count,
        layout.KEYS: keys.address,
        layout.KEY_STRIDE: keys.stride,
        layout.VALUES: values.address,
        layout.VALUE_STRIDE: values.stride,
        layout.ATTENTION_SCALE: float_bits(op.scale),
        layout.ATTENTION_CAP: float_bits(op.softcap) if op.softcap else 0,
        layout.WINDOW: op.window,
        layout.CHUNK: op.chunk,
        layout.HEAD_EPS: float_bits(op.eps),
        layout.Q_NORM: lower.memory.vector(op.q_norm),
        layout.K_NORM: lower.memory.vector(op.k_norm),
        layout.SLOPES: lower.memory.slopes(op.alibi, op.q.width // op.head_dim),
        layout.SINKS: lower.memory.vector(op.sinks),
    }
    if op.rope:
        fields |= lower.memory.cos_sin(op.rope).columns
    return [(f"write_{heads.name}", fields), (f"attend_{heads.name}", fields)]


def _gated_act(lower: Lowering, op: ops.GatedAct) -> Lowered:
    up = lower.memory.place(op.up)
    return [("gated_act", {layout.Y: up.address, layout.Y_STRIDE: up.stride, layout.ACT: ACTS[op.act]})]


def _act(lower: Lowering, op: ops.Act) -> Lowered:
    return [("act", {layout.ACT: ACTS[op.act]})]


def _add(lower: Lowering, op: ops.Add) -> Lowered:
    y = lower.memory.place(op.y)
    return [("add", {layout.Y: y.address, layout.Y_STRIDE: y.stride})]


def _soft_cap(lower: Lowering, op: ops.SoftCap) -> Lowered:
    return [("soft_cap", {layout.FACTOR: float_bits(op.cap)})]


def _scale(lower: Lowering, op: ops.Scale) -> Lowered:
    return [("scale", {layout.FACTOR: float_bits(op.factor)})]


def _take_rows(lower: Lowering, op: ops.TakeRows) -> Lowered:
    return [("take_rows", {})]


def _quantize(lower: Lowering, op: ops.Quantize) -> Lowered:
    return [("quantize_rows", {})]


def _in_memory(function: Callable[..., Lowered]) -> Callable[..., Lowered]:
    """Return a function of the lowering for one that needs its memory only."""
    return lambda lower, op: function(lower.memory, op)


KINDS: dict[type[Op], Callable[..., Lowered]] = {
    Receive: lambda _, __: [],  # the backend writes its values before a step, and sends them after it
    Send: lambda _, __: [],
    ops.Embed: _embed,
    ops.Linear: _linear,
    ops.Norm: _norm,
    ops.AddNorm: _add_norm,
    ops.Rope: _rope,
    ops.Attention: _attention,
    ops.GatedAct: _gated_act,
    ops.Act: _act,
    ops.Add: _add,
    ops.Scale: _scale,
    ops.SoftCap: _soft_cap,
    ops.TakeRows: _take_rows,
    ops.Quantize: _quantize,
    ordered.QuantizeOrdered: _in_memory(ordered.quantize_ordered),
    ops.Route: items.route,
    ops.Experts: items.experts,
    ops.LatentAttention: _in_memory(lower_latent.latent_attention),
    recurrence.CausalConv: _in_memory(lower_states.causal_conv),
    recurrence.StateSpace: _in_memory(lower_states.state_space),
    recurrence.DeltaRule: _in_memory(lower_states.delta_rule),
    recurrence.RgLru: _in_memory(lower_states.rg_lru),
    **{
        kind: _in_memory(function)
        for kind, function in (lower_special.KINDS | lower_encoded.KINDS | collectives.KINDS).items()
    },
}
"""The kinds of operations that this backend runs"""
