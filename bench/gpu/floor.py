"""Floors of measurements: the time that reading what a step needs takes, and the share of the card's products."""

from __future__ import annotations

from tokenmill.program import ops
from tokenmill.program.cost import Load, cost
from tokenmill.program.value import Program

BYTES_S, FLOPS_S = 4e12, 990e12
"""Of an H200: what kernels reach when they only read, and the datasheet's products in bfloat16."""


def decode_ms(
    program: Program, rows: int, context: int, chosen: float | None = None, bits: float = 16.0,
    expert_bits: float = 16.0,
) -> float:  # fmt: skip
    """Return the milliseconds of reading weights and cache once.

    `context`: tokens of a sequence. `chosen`: experts that a layer's rows choose on average; None: as if at random.
    `bits`, `expert_bits`: of a weight of a product, and of an expert; all others and the cache have 16.
    """
    load, found, by_kind = Load.decode(rows, context), 0.0, {ops.Linear: bits, ops.Experts: expert_bits}
    for op in program.ops:
        size = by_kind.get(type(op), 16.0)
        one = cost(op, load, lambda w, size=size: 16.0 if w.table else size)  # type: ignore[misc]
        share = chosen / expected(op, rows) if chosen is not None and isinstance(op, ops.Experts) else 1.0
        found += one.weights * share + one.cache
    return found / BYTES_S * 1e3


def expected(op: ops.Experts, rows: int) -> float:
    """Return the number of experts that some row chooses, if all choose at random."""
    count = len(op.down)
    return count * (1 - (1 - op.ids.width / count) ** rows)


def share_of_peak(program: Program, tokens_s: float) -> float:
    """Return the share of the card's products that active weights take at so many prompt tokens a second."""
    load = Load(1000, 0, 0, 0)
    flops = sum(cost(op, load, lambda w: 16.0).flops for op in program.ops if op.keeps() is None and op.weights())
    return flops / 1000 * tokens_s / FLOPS_S
