"""Plan the buffers of a step: every value has a fixed offset in one arena before the step runs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from tokenmill.program import ops
from tokenmill.program.ops import Op
from tokenmill.program.value import Buffer, Program, Value

ALIGN = 64  # bytes: a cache line


@dataclass(frozen=True, slots=True)
class Plan:
    """Layout of the arena in bytes. `offsets`: by buffer id."""

    offsets: dict[int, int]
    size: int
    naive: int  # bytes if no two buffers shared memory


def plan_buffers(
    program: Program,
    bytes_of: Callable[[Buffer], int],
    late: Callable[[Op], bool] = lambda op: False,
    lasting: Collection[int] = (),
    among: Callable[[int], bool] = lambda buffer: True,
    free_after: Callable[[int], int] = lambda last: last,
) -> Plan:
    """Assign arena offsets, first fit over lifetimes. A sum overwrites a term that has no later reader.

    `late`: true for operations without a barrier after them, so their inputs must also outlive the next operation.
    `lasting`: buffers that live to the end, because the operations that read them may run more than once.
    `among`: true for the buffers to assign; others have no offset. `free_after`: index of the operation after which a
    buffer's memory may be used again, by the index of its last reader.
    """
    used = last_uses(program, late) | dict.fromkeys(lasting, len(program.ops) + 1)
    last = {buffer: free_after(index) for buffer, index in used.items()}
    live: dict[int, tuple[int, int]] = {}  # buffer -> (start, end)
    offsets: dict[int, int] = {}
    naive = high = 0
    for i, op in enumerate(program.ops):
        before = program.ops[i - 1] if i else None
        stale = {v.buffer for v in before.reads().values()} if before and late(before) else set()
        for v in (v for v in op.results().values() if among(v.buffer)):
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
    """Return the index of the last operation that needs each buffer. Outputs outlive all operations."""
    last: dict[int, int] = {}
    for i, op in enumerate(program.ops):
        for v in (*op.reads().values(), *op.results().values()):
            last[v.buffer] = max(last.get(v.buffer, 0), i + late(op))
    last |= {value.buffer: len(program.ops) + 1 for value in program.outputs.values()}
    return last


def _written_over(op: Op, result: Value) -> Value | None:
    """Return the term that a sum may overwrite. A product's input is never one: each output reads all of it."""
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
