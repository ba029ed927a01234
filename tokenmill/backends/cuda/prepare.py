"""What this backend can run, said before any weight is read, and the program as it runs it."""

from __future__ import annotations

from tokenmill.backends.cuda.shapes import MOST_SHARED
from tokenmill.program import ops, passes
from tokenmill.program.ops import Op
from tokenmill.program.value import Program

KINDS = (
    ops.Embed, ops.Linear, ops.Norm, ops.AddNorm, ops.Attention, ops.GatedAct, ops.Act, ops.Add, ops.SoftCap,
    ops.TakeRows,
)  # fmt: skip
DTYPES = ("bfloat16", "float16", "float32")
_HEAD_SIZES = range(16, 257)
_WIDEST_NORM = 1 << 16


def fused(program: Program) -> Program:
    """With what this backend's kernels do at once. Needs no weights."""
    return passes.fuse(passes.take_rows_early(program), passes.add_into_norm, passes.heads_into_attention)


def refusal(program: Program, dtype: str, ranks: int) -> str:
    """Why this backend cannot run a program; "" if it can."""
    if ranks > 1:
        return "it does not share a model over several devices"
    if dtype and dtype not in DTYPES:
        return f"it has no {dtype}"
    whys = (_why_not(op) for op in fused(program).ops)
    return next((why for why in whys if why), "")


def _why_not(op: Op) -> str:
    if not isinstance(op, KINDS):
        return f"it has no kernel for {type(op).__name__}"
    if isinstance(op, ops.Norm) and op.out.width > _WIDEST_NORM:
        return f"a norm of {op.out.width} columns is too wide for it"
    if isinstance(op, ops.Norm) and op.head_dim and (op.center or op.bias):
        return "it has no LayerNorm of heads"
    return _attention_refusal(op) if isinstance(op, ops.Attention) else ""


def _attention_refusal(op: ops.Attention) -> str:
    if op.head_dim not in _HEAD_SIZES or op.head_dim % 2:
        return f"its attention has no heads of {op.head_dim}"
    if op.q.width // op.k.width > MOST_SHARED:
        return f"{op.q.width // op.k.width} query heads share a key-value head"
    if op.rope is not None and op.rope.rotary_dim != op.head_dim:
        return "its rotation is of whole heads"
    if bool(op.q_norm) != bool(op.k_norm):
        return "it normalizes queries and keys or neither"
    return ""
