"""Where the values of a step live: one arena, known before the step runs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from tokenmill.program import ops
from tokenmill.program.ops import Op
from tokenmill.program.value import Buffer, Program, Value

ALIGN = 64  # bytes: a cache line


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes. `offsets` by buffer id."""

    offsets: dict[int, int]
    size: int
    naive: int  # every buffer by itself


def plan_buffers(
    program: Program,
    bytes_of: Callable[[Buffer], int],
    late: Callable[[Op], bool] = lambda op: False,
    lasting: Collection[int] = (),
) -> Plan:
    """One arena: first fit over lifetimes; a sum is written over the term that dies in it.

    `late`: no barrier follows this operation, so what it reads must live through the next one too. `lasting`: buffers
    that live to the end, for a part of the program that is run more than once.
    """
    last = last_uses(program, late) | dict.fromkeys(lasting, len(program.ops) + 1)
    live: dict[int, tuple[int, int]] = {}  # buffer -> (start, end)
    offsets: dict[int, int] = {}
    naive = high = 0
    for i, op in enumerate(program.ops):
        before = program.ops[i - 1] if i else None
        stale = {v.buffer for v in before.reads().values()} if before and late(before) else set()
        for v in op.results().values():
            size = -(-bytes_of(v.spec) // ALIGN) * ALIGN
            naive += size
            over = _written_over(op, v)
            if (
                over is not None
                and last[over.buffer] == i
                and bytes_of(over.spec) == bytes_of(v.spec)
                and over.buffer in live.keys() - stale
            ):
                live[v.buffer] = live.pop(over.buffer)
            else:
                start = _first_fit(live, size)
                live[v.buffer] = (start, start + size)
            offsets[v.buffer], high = live[v.buffer][0], max(high, live[v.buffer][1])
        live = {b: span for b, span in live.items() if last[b] > i}
    return Plan(offsets, high, naive)


def last_uses(program: Program, late: Callable[[Op], bool] = lambda op: False) -> dict[int, int]:
    """By buffer: the last operation that needs it. Outputs outlive all."""
    last: dict[int, int] = {}
    for i, op in enumerate(program.ops):
        for v in (*op.reads().values(), *op.results().values()):
            last[v.buffer] = max(last.get(v.buffer, 0), i + late(op))
    last |= {value.buffer: len(program.ops) + 1 for value in program.outputs.values()}
    return last


def _written_over(op: Op, result: Value) -> Value | None:
    """The term that a sum may be written over. Not a product's input: each output needs all of it."""
    if result.buffer != op.out.buffer:
        return None
    if isinstance(op, ops.Linear):
        return op.residual if op.residual is not None and op.residual.buffer != op.x.buffer else None
    return op.x if isinstance(op, ops.Add) else None


def _first_fit(live: dict[int, tuple[int, int]], size: int) -> int:
    start = 0
    for a, b in sorted(live.values()):
        if start + size <= a:
            break
        start = max(start, b)
    return start
