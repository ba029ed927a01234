"""Which kernel serves which operation of a program here: what `tokenmill doctor` prints."""

from __future__ import annotations

from collections import Counter

from tokenmill.backends.cuda.prepare import fused
from tokenmill.program import ops
from tokenmill.program.ops import Op
from tokenmill.program.value import Program


def kernels_of(program: Program) -> dict[str, Counter[str]]:
    """By kind of operation: the kernels, and how many operations each serves. Needs no weights and no device."""
    found: dict[str, Counter[str]] = {}
    for op in fused(program).ops:
        found.setdefault(type(op).__name__, Counter())[_kernel(op)] += 1
    return found


def _kernel(op: Op) -> str:
    if isinstance(op, ops.Linear):
        return "cuBLAS"
    if isinstance(op, ops.Attention):
        parts = ["norm"] * bool(op.q_norm) + ["rope"] * bool(op.rope) + ["window"] * bool(op.window)
        inside = f" with {', '.join(parts)}" if parts else ""
        return f"decode and attend_tiles of heads of {op.head_dim}{inside}"
    if isinstance(op, ops.Norm):
        return "norm_heads" if op.head_dim else "norm_rows"
    names = {ops.Embed: "embed_rows", ops.GatedAct: "gate_rows", ops.TakeRows: "take_rows"}
    return names.get(type(op), "torch")
