"""Lowering of the operations that keep a state for each slot: convolutions, scans, the delta rule, RG-LRU.

Their kernels are in `recurrence.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.layout import Fields, Lowered, float_bits
from tokenmill.backends.cpu.memory import Memory
from tokenmill.backends.cpu.states import padded_width
from tokenmill.program.ops import Op, Weight
from tokenmill.program.recurrence import CausalConv, DeltaRule, RgLru, StateSpace
from tokenmill.program.value import Program, Value

_LANES = 16


def refused(op: Op) -> str:
    """Return why the kernels cannot run an operation with a state; "" if they can, or for another operation."""
    if isinstance(op, CausalConv) and op.act not in layout.ACTS:
        return f"it has no kernel for the activation {op.act}"
    if isinstance(op, StateSpace):
        if (op.b.width // op.groups) % 4:
            return f"its scans are for states of a multiple of 4 columns, not {op.b.width // op.groups}"
        if op.groups > 1 and op.x.width // op.groups % _LANES:
            return f"its scans are for groups of a multiple of {_LANES} columns, not {op.x.width // op.groups}"
    if isinstance(op, DeltaRule) and (op.head_dim % _LANES or op.v.width // op.b.width % _LANES):
        heads = f"{op.head_dim} and {op.v.width // op.b.width}"
        return f"its delta rule is for heads of a multiple of {_LANES} columns, not {heads}"
    if isinstance(op, RgLru) and op.input_gate[0].columns % _LANES:
        return f"its recurrent units have heads of a multiple of {_LANES} columns, not {op.input_gate[0].columns}"
    return ""


def constants(op: Op) -> list[Weight]:
    """Return the matrices whose numbers lowering reads, so they are not packed for products."""
    if isinstance(op, CausalConv):
        return [op.weight]
    if isinstance(op, StateSpace):
        return [op.a_log]
    return [op.input_bias, op.recurrence_bias] if isinstance(op, RgLru) else []


def stacked_gates(program: Program) -> Program:
    """Stack the matrices of a recurrent unit's heads, because one product computes the gates of all of them."""

    def stacked(weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
        return (replace(weights[0], parts=tuple(part for weight in weights for part in weight.parts)),)

    def changed(op: Op) -> Op:
        if not isinstance(op, RgLru):
            return op
        return replace(op, input_gate=stacked(op.input_gate), recurrence_gate=stacked(op.recurrence_gate))

    return replace(program, ops=tuple(map(changed, program.ops)))


def row_bytes(op: Op) -> int:
    """Return the bytes of a thread's scratch row that the kernel of an operation needs."""
    return 16 * (3 * 4 * op.head_dim + 64) if isinstance(op, DeltaRule) else 64


def _input(memory: Memory, column: int, value: Value) -> Fields:
    place = memory.place(value)
    return {column: place.address, column + 1: place.stride}


def _by_lanes(numbers: Any, repeat: int) -> Any:
    """Return numbers (heads, n) of heads of `repeat` columns as (columns / 16, n, 16), padded with zeros."""
    rows = np.repeat(numbers, repeat, 0)
    rows = np.concatenate([rows, np.zeros((-len(rows) % _LANES, rows.shape[1]), rows.dtype)])
    return rows.reshape(-1, _LANES, rows.shape[1]).transpose(0, 2, 1)


def causal_conv(memory: Memory, op: CausalConv) -> Lowered:
    """Return the row of a convolution."""
    columns = padded_width(op.x.width)

    def taps() -> Any:
        out = np.zeros((op.weight.columns, columns), np.float32)
        out[:, : op.x.width] = memory.numbers(op.weight).T
        return out

    fields = {
        layout.TAPS: op.weight.columns,
        layout.TAP_WEIGHTS: memory.array(("taps", op.weight), taps),
        layout.BIAS: memory.vector(op.bias),
        layout.ACT: layout.ACTS[op.act],
    }
    return [("conv", fields)]


def state_space(memory: Memory, op: StateSpace) -> Lowered:
    """Return the row of a scan."""
    heads = op.dt.width
    width, columns = op.x.width // heads, op.b.width // op.groups
    by_column = op.a_log.columns > 0

    def by_head(name: str, weight: Weight | None) -> int:
        def make() -> Any:
            numbers = np.zeros(heads, np.float32) if weight is None else memory.numbers(weight)
            return np.repeat(-np.exp(numbers) if name == "decay" else numbers, width)

        return memory.array((name, weight, op.x.width), make)

    def decays() -> Any:
        return _by_lanes(-np.exp(memory.numbers(op.a_log)), width)

    fields = {
        **_input(memory, layout.DT, op.dt), **_input(memory, layout.B, op.b), **_input(memory, layout.C, op.c),
        layout.DT_BIAS: by_head("bias", op.dt_bias),
        layout.DECAY: memory.array(("decays", op.a_log), decays) if by_column else by_head("decay", op.a_log),
        layout.SKIP: by_head("skip", op.d),
        layout.DECAY_BY_COLUMN: int(by_column),
        layout.HEAD_COLUMNS: width,
        layout.GROUP_COLUMNS: op.x.width // op.groups if op.groups > 1 else padded_width(op.x.width),
        layout.STATE_COLUMNS: columns,
        layout.LOW: float_bits(op.limits[0]),
        layout.HIGH: float_bits(op.limits[1]),
    }  # fmt: skip
    return [("scan", fields)]


def delta_rule(memory: Memory, op: DeltaRule) -> Lowered:
    """Return the row of a delta rule."""
    heads = op.b.width
    fields = {
        **_input(memory, layout.DT, op.a), **_input(memory, layout.K, op.k), **_input(memory, layout.V, op.v),
        **_input(memory, layout.RATES, op.b),
        layout.DT_BIAS: memory.vector(op.dt_bias),
        layout.DECAY: memory.array(("speed", op.a_log), lambda: -np.exp(memory.numbers(op.a_log))),
        layout.KEY_HEADS: op.q.width // op.head_dim,
        layout.VALUE_HEADS: heads,
        layout.VALUE_COLUMNS: op.v.width // heads,
        layout.DT_COLUMNS: op.a.width // heads,
        layout.STATE_COLUMNS: op.head_dim,
        layout.RATE: float_bits(op.rate),
        layout.QUERY_FACTOR: float_bits(op.head_dim**-0.5),
    }  # fmt: skip
    return [("delta", fields)]


def rg_lru(memory: Memory, op: RgLru) -> Lowered:
    """Return a row for each of the two gates, and one for the recurrence."""
    stride = 4 * padded_width(op.x.width)

    def gate(room: str, weight: Weight, bias: Weight) -> tuple[str, Fields]:
        (panels,) = memory.panels(weight)
        fields = {
            layout.OUT: memory.rooms.at(room),
            layout.OUT_STRIDE: stride,
            layout.WIDTH: weight.columns,
            layout.WEIGHT: panels.address,
            layout.PANEL_BYTES: panels.panel_bytes,
            layout.PANELS: panels.count,
            layout.HEAD_PANELS: weight.columns // _LANES,
            layout.X_STEP: 4 * weight.columns,
            layout.OUT_STEP: 4 * weight.columns,
            layout.BIAS: memory.vector(bias),
            layout.ACT: layout.SIGMOID,
        }
        return f"heads_{panels.form}", fields

    fields = {
        layout.INPUT_GATES: memory.rooms.at("input gates"),
        layout.RECURRENCE_GATES: memory.rooms.at("recurrence gates"),
        layout.GATES_STRIDE: stride,
        layout.DECAY: memory.array(("pace", op.a), lambda: -8 * np.logaddexp(0, memory.numbers(op.a))),
    }
    return [
        gate("input gates", op.input_gate[0], op.input_bias),
        gate("recurrence gates", op.recurrence_gate[0], op.recurrence_bias),
        ("lru", fields),
    ]
