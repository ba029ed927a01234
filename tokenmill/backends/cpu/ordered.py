"""Products with matrices whose columns are sorted by group (GPTQ's act-order): their activations are reordered alike.

The activations are quantized in the order of the columns, so a block of 32 of them belongs to one group of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.layout import Lowered
from tokenmill.backends.cpu.memory import Memory
from tokenmill.backends.cpu.pack import Packed
from tokenmill.program import ops
from tokenmill.program.ops import Op, Weight
from tokenmill.program.value import Program, Value


class QuantizeOrdered(Op):
    """Quantize x to int8, with its columns in the order of a weight's."""

    rowwise = False
    x: Value
    weight: Weight


def order_inputs(program: Program, panels: Mapping[Weight, tuple[Packed, ...]]) -> Program:
    """Give ordered int8 inputs to the products whose matrices are ordered. Products of one order share them."""
    tape = program.tape()
    made: dict[tuple[int, int, int, bytes], Value] = {}
    out: list[Op] = []
    for op in program.ops:
        order = panels[op.weight][0].order if isinstance(op, ops.Linear) else None
        if isinstance(op, ops.Linear) and order is not None:
            key = (op.x.buffer, op.x.start, op.x.width, order.tobytes())
            if key not in made:
                made[key] = tape.new(op.x.spec.rows, op.x.width, "int8")
                out.append(QuantizeOrdered(x=op.x, weight=op.weight, out=made[key]))
            op = replace(op, x=made[key])
        out.append(op)
    return replace(program, ops=tuple(out))


def quantize_ordered(memory: Memory, op: QuantizeOrdered) -> Lowered:
    """Return the row that quantizes. The order is kept beside the panels."""
    order = memory.panels(op.weight)[0].order
    assert order is not None
    return [("ordered_quantize", {layout.ORDER: order.ctypes.data})]
