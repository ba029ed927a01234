"""Rewrites, Program -> Program. Each leaves the numbers of the torch backend as they were (tests/test_program.py).

Memory is in `buffers.py`, tensor parallelism in `shard.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tokenmill.program import ops
from tokenmill.program.ops import Op
from tokenmill.program.value import Program, Value

Fusion = Callable[[Op, dict[int, Op], dict[int, list[Op]]], tuple[Op, list[Op]] | None]
"""(operation, producer of each buffer, its readers) -> what stands in its place, and what becomes needless"""


def readers_of(program_ops: tuple[Op, ...]) -> dict[int, list[Op]]:
    """Who reads each buffer, once for every field that does."""
    out: dict[int, list[Op]] = {}
    for op in program_ops:
        for value in op.reads().values():
            out.setdefault(value.buffer, []).append(op)
    return out


def fuse(program: Program, *fusions: Fusion) -> Program:
    """Apply each fusion in turn wherever it fits."""
    for fusion in fusions:
        made = {v.buffer: op for op in program.ops for v in op.results().values()}
        readers = readers_of(program.ops)
        changed: dict[int, Op] = {}
        gone: set[int] = set()
        for op in program.ops:
            if found := fusion(op, made, readers):
                changed[id(op)], needless = found
                gone |= {id(o) for o in needless}
        kept = tuple(changed.get(id(op), op) for op in program.ops if id(op) not in gone)
        program = replace(program, ops=kept)
    return program


def residual_into_linear(op: Op, made: dict[int, Op], readers: dict[int, list[Op]]) -> tuple[Op, list[Op]] | None:
    """x + linear(y), if nobody else reads the product."""
    if not isinstance(op, ops.Add):
        return None
    for own, other in ((op.x, op.y), (op.y, op.x)):
        p = made.get(own.buffer)
        if isinstance(p, ops.Linear) and not p.act and p.residual is None and len(readers[own.buffer]) == 1:
            return replace(p, out=op.out, residual=other), [p]
    return None


def act_into_linear(op: Op, made: dict[int, Op], readers: dict[int, list[Op]]) -> tuple[Op, list[Op]] | None:
    """act(linear(x)), act(gate) · up"""
    if isinstance(op, ops.GatedAct):
        source, halves = op.gate, op.gate.start == 0 and op.up.buffer == op.gate.buffer and op.up.start == op.gate.width
    elif isinstance(op, ops.Act):
        source, halves = op.x, op.x.whole
    else:
        return None
    p = made.get(source.buffer)
    alone = all(reader is op for reader in readers[source.buffer])
    if halves and alone and isinstance(p, ops.Linear) and not p.act and p.residual is None:
        return replace(p, out=op.out, act=op.act, gated=isinstance(op, ops.GatedAct)), [p]
    return None


def heads_into_attention(op: Op, made: dict[int, Op], readers: dict[int, list[Op]]) -> tuple[Op, list[Op]] | None:
    """Norm of heads and rope, just before attention."""
    if not isinstance(op, ops.Attention):
        return None
    ropes = [made.get(op.q.buffer), made.get(op.k.buffer)]
    q, k = ropes
    if not isinstance(q, ops.Rope) or not isinstance(k, ops.Rope):
        return None
    fused = replace(op, rope=q.rope, q=q.x, k=k.x)
    needless: list[Op] = [q, k]
    q_norm, k_norm = made.get(q.x.buffer), made.get(k.x.buffer)
    if isinstance(q_norm, ops.Norm) and isinstance(k_norm, ops.Norm) and q_norm.head_dim and k_norm.head_dim:
        fused = replace(fused, q=q_norm.x, k=k_norm.x, q_norm=q_norm.weight, k_norm=k_norm.weight, eps=q_norm.eps)
        needless += [q_norm, k_norm]
    return fused, needless


def add_into_norm(op: Op, made: dict[int, Op], readers: dict[int, list[Op]]) -> tuple[Op, list[Op]] | None:
    """norm(x + y), the sum being kept: what a GPU wants instead of `residual_into_linear`."""
    if not isinstance(op, ops.Norm) or isinstance(op, ops.AddNorm) or op.head_dim:
        return None
    p = made.get(op.x.buffer)
    if not isinstance(p, ops.Add) or readers[p.out.buffer][0] is not op:
        return None
    both = ops.AddNorm(
        x=p.x, y=p.y, total=p.out, out=op.out, weight=op.weight, bias=op.bias, eps=op.eps, center=op.center
    )
    return both, [p]


CPU_FUSIONS = (residual_into_linear, act_into_linear, heads_into_attention)
GPU_FUSIONS = (add_into_norm, heads_into_attention, act_into_linear)

ROWWISE = (ops.Norm, ops.Linear, ops.Add, ops.Act, ops.GatedAct, ops.AllReduce, ops.Experts)


def take_rows_early(program: Program) -> Program:
    """After the last attention only the rows that sample matter: choose them there.

    Left as it is if there is no attention, no TakeRows, or something between them that looks across rows.
    """
    attentions = [i for i, op in enumerate(program.ops) if isinstance(op, ops.Attention)]
    takes = [i for i, op in enumerate(program.ops) if isinstance(op, ops.TakeRows)]
    if not attentions or len(takes) != 1 or takes[0] < attentions[-1]:
        return program
    first, take = attentions[-1] + 1, takes[0]
    if not all(isinstance(op, ROWWISE) for op in program.ops[first:take]):
        return program
    tape = program.tape()
    taken: dict[int, Value] = {}  # buffer -> its rows that sample

    def at(v: Value) -> Value:
        if v.buffer not in taken:
            whole = replace(v, start=0, width=v.spec.width)
            taken[v.buffer] = tape.record(ops.TakeRows, "samples", v.spec.width, x=whole)
        return replace(taken[v.buffer], start=v.start, width=v.width)

    for op in program.ops[first:take]:
        reads = {name: at(v) for name, v in op.reads().items()}
        results = {name: tape.new("samples", v.width) for name, v in op.results().items()}
        taken |= {v.buffer: results[name] for name, v in op.results().items()}
        tape.ops.append(replace(op, **reads, **results))
    needed = program.ops[take]
    assert isinstance(needed, ops.TakeRows)
    old, new = needed.out, at(needed.x)

    def instead(v: Value) -> Value:
        return replace(new, start=new.start + v.start, width=v.width) if v.buffer == old.buffer else v

    rest = [replace(op, **{name: instead(v) for name, v in op.reads().items()}) for op in program.ops[take + 1 :]]
    return replace(program, ops=(*program.ops[:first], *tape.ops, *rest), output=instead(program.output))


def quantize_inputs(program: Program, wants: Callable[[ops.Linear], bool], fuses: Callable[[Op], bool]) -> Program:
    """int8 inputs for the products that want them: written so by their producer if it can, else by a Quantize."""
    tape = program.tape()
    twin = _written_as_int8(program, wants, fuses)
    out: list[Op] = []
    for op in program.ops:
        if isinstance(op, ops.Linear) and wants(op):
            if op.x.buffer not in twin:
                twin[op.x.buffer] = tape.new(op.x.spec.rows, op.x.width, "int8")
                out.append(ops.Quantize(x=op.x, out=twin[op.x.buffer]))
            op = replace(op, x=twin[op.x.buffer])
        written = twin.get(op.out.buffer)
        out.append(replace(op, out=written) if written and written.buffer == op.out.buffer else op)
    return replace(program, ops=tuple(out))


def _written_as_int8(
    program: Program, wants: Callable[[ops.Linear], bool], fuses: Callable[[Op], bool]
) -> dict[int, Value]:
    """Buffers whose producer writes int8 itself, for all who read them want that: buffer -> its int8 value."""
    made = {v.buffer: op for op in program.ops for v in op.results().values()}
    twin: dict[int, Value] = {}
    for buffer, readers in readers_of(program.ops).items():
        if buffer not in made or not fuses(made[buffer]):
            continue
        if all(isinstance(r, ops.Linear) and wants(r) and r.x.buffer == buffer and r.x.whole for r in readers):
            v = made[buffer].out
            twin[buffer] = replace(v, spec=replace(v.spec, dtype="int8"))
    return twin
