"""The sums over the ranks that a step needs, and its launches, for `tokenmill doctor`. Needs no device."""

from __future__ import annotations

from tokenmill.backends.cuda.collectives.choice import usual
from tokenmill.backends.cuda.experts import LAUNCHES
from tokenmill.backends.cuda.rank_ops import joined_norms
from tokenmill.program import ops, special
from tokenmill.program.ops import Op
from tokenmill.program.value import Program


def rank_rules(program: Program, item_bytes: int, ranks: int) -> dict[str, str]:
    """Return lines by name about the collective operations of a step. `program`: of one rank, fused."""
    sums = [op for op in program.ops if isinstance(op, ops.AllReduce)]
    row_bytes = sum(op.x.width for op in sums) * item_bytes
    limits = usual(ranks, library=True)
    return {
        "ranks": f"{ranks}; a step has {len(sums)} sums over them, {size(row_bytes)} a row; "
        f"{len(joined_norms(program.ops))} include the norm behind",
        "sums over the ranks": f"{limits}, as a rule; the start measures it",
        "launches": f"about {num_launches(program)} in a decode step of several rows",
    }  # fmt: skip


def num_launches(program: Program) -> int:
    """Return the number of launches of a decode step of several rows in 16 bits, that of sampling included."""
    joined = {id(norm) for _, norm in joined_norms(program.ops).values()}
    found, before = 1, None
    for op in program.ops:
        found += 0 if id(op) in joined else _launches(op, before)
        before = op
    return found + any(isinstance(op, ops.Gather) for op in program.ops)  # tokens of rank 0


def _launches(op: Op, before: Op | None) -> int:
    if isinstance(op, special.Within):
        return 0
    if isinstance(op, ops.GatedAct) and isinstance(before, ops.Linear) and op.gate.buffer == before.out.buffer:
        return 0  # done with the product
    return LAUNCHES if isinstance(op, ops.Experts) else 1


def size(nbytes: int) -> str:
    """Return a number of bytes as users read it."""
    return f"{nbytes / (1 << 20):.1f} MiB" if nbytes >= 1 << 20 else f"{nbytes / 1024:.0f} KiB"
