"""Lowering of mixtures of experts to rows of the step table, and the memory that these rows share.

Layers run one after another, so all share one set of arrays, of the size that the largest needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.forms import BLOCK, BLOCK_FORMS, PAIRS, PANEL
from tokenmill.backends.cpu.layout import ACTS, Fields, Lowered, float_bits
from tokenmill.backends.cpu.scratch import zeros
from tokenmill.program import ops
from tokenmill.program.ops import Op, Weight
from tokenmill.program.value import Buffer, Program

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenmill.backends.cpu.lower import Lowering

NONE = {layout.OUT_SCALES: 0, layout.PRIVATE_X: 0, layout.PRIVATE_OUT: 0}
"""Columns of a row that neither quantizes nor has private copies"""


class Items:
    """Memory of (row, expert) pairs. `rows`: the rows of a buffer."""

    def __init__(self, program: Program, rows: Callable[[Buffer], int]) -> None:
        self.count = self.experts = logits = width = inner = 0
        for op in program.ops:
            if isinstance(op, ops.Route):
                logits = max(logits, rows(op.out.spec) * logits_stride(op))
            if isinstance(op, ops.Experts):
                self.count = max(self.count, rows(op.out.spec) * op.ids.width)
                self.experts = max(self.experts, len(op.down))
                width, inner = max(width, op.x.width), max(inner, op.down[0].width)
        used = self.count > 0
        self._arrays: dict[str, NDArray[Any]] = {
            "logits": zeros((logits,)),
            "counts": zeros((self.experts + 1,), np.int64),
            "active": zeros((1 + 3 * self.experts,), np.int64),
            "source": zeros((self.count,), np.int64),
            "place": zeros((self.count,), np.int64),
            "input": zeros((self._bytes(width),)) if used else zeros((0,)),  # later the results
            "inner": zeros((self._bytes(inner),)) if used else zeros((0,)),
            "coded": zeros((self._bytes(inner),)) if used else zeros((0,)),
        }
        self._tables: list[NDArray[np.int64]] = []

    def _bytes(self, width: int) -> int:
        """Return the bytes of a row for each item, in any format."""
        return self.count * max(4 * width, layout.narrow_stride(width)) + 64

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    def at(self, name: str) -> int:
        """Return the address of an array."""
        return int(self._arrays[name].ctypes.data)

    def table(self, addresses: list[int]) -> int:
        """Return the address of a new array of addresses; 0 for none."""
        if not addresses:
            return 0
        self._tables.append(np.array(addresses, np.int64))
        return int(self._tables[-1].ctypes.data)


def logits_stride(op: ops.Route) -> int:
    """Return the bytes of a row of logits, and of room for as many numbers, twice."""
    return 3 * -(-op.weight.rows // PANEL) * PANEL * 4


def refused(op: Op) -> str:
    """Return why the kernels cannot run a Route or Experts; "" if they can, or for another operation."""
    if isinstance(op, ops.Route):
        return "" if op.group_best in (1, 2) else f"it has no groups of experts that count as {op.group_best} scores"
    if not isinstance(op, ops.Experts):
        return ""
    if op.act not in ACTS:
        return f"it has no kernel for the activation {op.act}"
    if op.x.width % BLOCK or op.down[0].width % BLOCK:
        return f"its experts are of multiples of {BLOCK} columns, not {op.x.width} and {op.down[0].width}"
    return ""


def route(lower: Lowering, op: ops.Route) -> Lowered:
    """Return a row for the product of the logits, and one for the choice."""
    memory, factors = lower.memory, lower.memory.place(op.factors)
    (panels,) = memory.panels(op.weight)
    logits = {layout.OUT: memory.items.at("logits"), layout.OUT_STRIDE: logits_stride(op), **NONE}
    product = logits | {
        layout.WEIGHT: panels.address,
        layout.PANEL_BYTES: panels.panel_bytes,
        layout.PANELS: panels.count,
        layout.BIAS: memory.vector(op.bias),
    }
    choice = {
        layout.X: memory.items.at("logits"),
        layout.X_STRIDE: logits_stride(op),
        layout.EXPERTS: op.weight.rows,
        layout.TOP_K: op.top_k,
        layout.SCORE: layout.SCORES_OF_EXPERTS.index(op.score),
        layout.MARGIN: float_bits(2 * op.margin),
        layout.CORRECTION: memory.vector(op.correction),
        layout.GROUPS: op.groups,
        layout.TOP_GROUPS: op.top_groups,
        layout.GROUP_BEST: op.group_best,
        layout.RENORMALIZE: int(op.renormalize),
        layout.LEAST_SUM: float_bits(op.least_sum),
        layout.FACTOR_SCALE: float_bits(op.scale),
        layout.FACTORS: factors.address,
        layout.FACTORS_STRIDE: factors.stride,
    }
    return [(f"linear_{panels.form}", product), ("route", choice)]


def experts(lower: Lowering, op: ops.Experts) -> Lowered:
    """Return rows that sort, gather the inputs, compute both products, and sum the results."""
    memory, items = lower.memory, lower.memory.items
    ids, factors, x = (memory.place(value) for value in (op.ids, op.factors, op.x))
    order = {
        layout.TOP_K: op.ids.width,
        layout.PLACE: items.at("place"),
        layout.EXPERTS: len(op.down),
        layout.COUNTS: items.at("counts"),
        **NONE,
    }
    sort = order | {
        layout.X: ids.address,
        layout.X_STRIDE: ids.stride,
        layout.FIRST_EXPERT: memory.rank * len(op.down) if op.shard == "part" else 0,
        layout.ACTIVE: items.at("active"),
        layout.SOURCE: items.at("source"),
    }
    width, inner = op.x.width, op.down[0].width
    given = {layout.FACTORS: factors.address, layout.FACTORS_STRIDE: factors.stride}
    taken = {layout.X: x.address, layout.X_STRIDE: x.stride, layout.SOURCE: items.at("source"), **order}
    taken |= given if op.scale_inputs else {}
    bounds = {layout.LIMIT: float_bits(op.limit), layout.UP_OFFSET: float_bits(op.up_offset)}
    gated = {layout.OUT: items.at("inner"), layout.OUT_STRIDE: 4 * inner, layout.ACT: ACTS[op.act]}
    gated |= {layout.GATED: int(op.gated)} | bounds
    made = {layout.X: items.at("inner"), layout.X_STRIDE: 4 * inner, layout.SOURCE: 0, **order}
    results = {layout.OUT: items.at("input"), layout.OUT_STRIDE: 4 * width}
    up = _product(lower, op.gate_up, op.gate_up_bias, taken | {layout.WIDTH: width}, "input", gated)
    down = _product(lower, op.down, op.down_bias, made | {layout.WIDTH: inner}, "coded", results)
    combine = order | {
        layout.X: items.at("input"),
        layout.X_STRIDE: 4 * width,
        **({} if op.scale_inputs else given),
    }
    return [("sort_items", sort), *up, *down, ("combine", combine)]


def _product(
    lower: Lowering, weights: tuple[Weight, ...], biases: tuple[Weight, ...], x: Fields, room: str, out: Fields
) -> Lowered:
    """Return a row that writes the inputs `x` to `room` in the weights' kind of numbers, and the product's row."""
    memory, width, gated = lower.memory, x[layout.WIDTH], bool(out.get(layout.GATED))
    panels = [memory.panels(weight)[0] for weight in weights]
    at, form = memory.items.at(room), panels[0].form
    if form == PAIRS.name:
        kernel, stride, scales = "spread_narrow", layout.narrow_stride(width), 0
    elif form in BLOCK_FORMS:
        kernel, stride, scales = "spread", width, at + -(-memory.items.count * width // 64) * 64
    elif x[layout.SOURCE]:
        kernel, stride, scales = "spread", 4 * width, 0
    else:
        kernel, at, stride, scales = "", x[layout.X], x[layout.X_STRIDE], 0
    spread = x | {layout.OUT: at, layout.OUT_STRIDE: stride, layout.OUT_SCALES: scales}
    product = {
        **NONE, **out,
        layout.X: at,
        layout.X_STRIDE: stride,
        layout.X_SCALES: scales,
        layout.WIDTH: width,
        layout.WEIGHT: memory.items.table([each.address for each in panels]),
        layout.PANEL_BYTES: panels[0].panel_bytes,
        layout.PANELS: panels[0].count,
        layout.BIAS: memory.items.table([memory.vector(bias, gated=gated) for bias in biases]),
        layout.ACTIVE: memory.items.at("active"),
    }  # fmt: skip
    return [*([(kernel, spread)] if kernel else []), (f"experts_{form}", product)]
