"""Operations between the ranks that share a model: passes over their program, and their lowering.

Ranks exchange values through shared memory (`peers.py`). A value that other ranks read is written there by the
operation that computes it, so a collective copies nothing: its row of the table waits for the other ranks
(`division.py`), and the next one reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.layout import Fields, Lowered, float_bits
from tokenmill.backends.cpu.memory import Memory
from tokenmill.program import ops, passes, special
from tokenmill.program.ops import Op
from tokenmill.program.value import Program, Value

_LANES = 16
_ON_COLUMNS = ops.Scale, ops.SoftCap, special.Clip
"""Operations on each number alone, which may as well come before the ranks' columns are gathered"""


class SumRanks(ops.AllReduce):
    """Sum x over the ranks, in their order, then add the residual."""

    residual: Value | None = None


def ranks_of(program: Program) -> int:
    """Return the number of ranks that share a program."""
    return max((w.ranks for op in program.ops for weights in op.weights().values() for w in weights), default=1)


def fused(program: Program) -> Program:
    """Add residuals where the ranks' products are summed, and write logits where all ranks' columns lie."""
    return _gathered_in_place(_gathered_last(passes.fuse(program, _residual_into_sum)))


def _residual_into_sum(op: Op, graph: passes.Graph) -> tuple[Op, list[Op]] | None:
    """Fuse x + all_reduce(y)."""
    if not isinstance(op, ops.Add) or op.x.buffer == op.y.buffer:
        return None
    for own, other in ((op.x, op.y), (op.y, op.x)):
        if (reduced := graph.source(own, ops.AllReduce, op)) is not None:
            return SumRanks(x=reduced.x, residual=other, out=op.out), [reduced]
    return None


def _gathered_last(program: Program) -> Program:
    """Move operations on single numbers before the Gather that they follow: each rank computes its own columns."""
    graph, tape = passes.Graph.of(program), program.tape()
    parts: dict[int, Value] = {}  # by buffer of a value that is not gathered yet: this rank's columns
    out: list[Op] = []
    for op in program.ops:
        if isinstance(op, _ON_COLUMNS) and op.x.buffer in parts:
            part = tape.new(op.out.spec.rows, parts[op.x.buffer].width)
            out.append(replace(op, x=parts[op.x.buffer], out=part))
            op = ops.Gather(x=part, out=op.out)
        if isinstance(op, ops.Gather):
            reader = graph.readers.get(op.out.buffer, [op])[0]
            if isinstance(reader, _ON_COLUMNS) and reader.x.whole and graph.read_by_only(op.out, reader):
                parts[op.out.buffer] = op.x
                continue
        out.append(op)
    return replace(program, ops=tuple(out))


def _gathered_in_place(program: Program) -> Program:
    """Drop each Gather of whole vectors: the operation before it writes its columns of the gathered value.

    Its result is then a view that begins at column 0; `Memory.place` moves it to the rank's columns.
    """
    graph, tape = passes.Graph.of(program), program.tape()
    gathers = {
        op.x.buffer: op
        for op in program.ops
        if isinstance(op, ops.Gather) and op.x.whole and op.x.width % _LANES == 0 and graph.read_by_only(op.x, op)
    }
    ranks = ranks_of(program)
    wholes: dict[int, Value] = {}  # by buffer of the gathered value
    out: list[Op] = []

    def instead(v: Value) -> Value:
        whole = wholes.get(v.buffer)
        return v if whole is None else replace(whole, start=v.start, width=v.width)

    for op in program.ops:
        if gathers.get(getattr(op, "x", op.out).buffer) is op:
            continue
        if (gather := gathers.get(op.out.buffer)) is not None:
            whole = tape.new(op.out.spec.rows, gather.x.width * ranks)  # the last columns may be of no token
            wholes[gather.out.buffer] = whole
            op = replace(op, out=replace(whole, width=gather.x.width))
        out.append(replace(op, **{name: instead(v) for name, v in op.reads().items()}))
    outputs = {name: instead(v) for name, v in program.outputs.items()}
    return replace(program, ops=tuple(out), outputs=outputs)


def refused(op: Op) -> str:
    """Return why the kernels cannot run an operation of ranks; "" if they can, or for another operation."""
    if isinstance(op, special.Moments | special.NormOfShare) and op.x.width % _LANES:
        return f"ranks share norms of multiples of {_LANES} columns each, not {op.x.width}"
    return ""


# ---- lowering ----


def sum_ranks(memory: Memory, op: ops.AllReduce) -> Lowered:
    """Return the row that sums this rank's rows over the ranks."""
    residual = op.residual if isinstance(op, SumRanks) else None
    return [("sum_ranks", _slots(memory, op.x) | (_other(memory, residual) if residual is not None else {}))]


def gather(memory: Memory, op: ops.Gather) -> Lowered:
    """Return the row that copies the columns of all ranks side by side."""
    return [("gather", _slots(memory, op.x) | {layout.GATHERED: op.out.width})]


def moments(memory: Memory, op: special.Moments) -> Lowered:
    """Return the row of the sums of a rank's columns."""
    return [("moments", {layout.FACTOR: float_bits(op.share)})]


def norm_of_share(memory: Memory, op: special.NormOfShare) -> Lowered:
    """Return the row of the norm of a rank's columns."""
    weight = memory.vector(op.weight) if op.weight is not None else memory.constant(op.x.width, 1.0)
    fields = {
        layout.NORM_WEIGHT: weight,
        layout.NORM_EPS: float_bits(op.eps),
        layout.SHARED_COLUMNS: op.columns,
    }
    return [("share_norm", fields | _other(memory, op.moments))]


def _other(memory: Memory, value: Value) -> Fields:
    place = memory.place(value)
    return {layout.Y: place.address, layout.Y_STRIDE: place.stride}


def _slots(memory: Memory, x: Value) -> Fields:
    """Return the columns of a row that reads a value of every rank."""
    first, slot = memory.slots(x)
    return {layout.X: first, layout.SLOT_BYTES: slot}


KINDS: dict[type[Op], Callable[..., Lowered]] = {
    ops.AllReduce: sum_ranks,
    SumRanks: sum_ranks,
    ops.Gather: gather,
    special.Moments: moments,
    special.NormOfShare: norm_of_share,
}
"""Functions of the lowering by kind"""
