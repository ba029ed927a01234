"""Rewrites, Program -> Program. Each leaves the numbers of the torch backend as they were (tests/test_program.py).

Memory is in `buffers.py`, tensor parallelism in `shard.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeVar

from tokenmill.program import ops
from tokenmill.program.ops import Op
from tokenmill.program.value import Program, Value

OpT = TypeVar("OpT", bound=Op)


class Graph(NamedTuple):
    """Producers and readers of a program's buffers, as they were before a fusion began."""

    producers: dict[int, Op]  # by buffer
    readers: dict[int, list[Op]]  # by buffer, in program order: an operation once for every field that reads it
    outputs: frozenset[int]  # buffers that are read after the last operation

    @classmethod
    def of(cls, program: Program) -> Graph:
        """Index a program."""
        producers = {value.buffer: op for op in program.ops for value in op.results().values()}
        return cls(producers, readers_of(program.ops), frozenset(value.buffer for value in program.outputs.values()))

    def read_by_only(self, value: Value, op: Op) -> bool:
        """True if `op` alone reads the buffer of `value`, in however many fields."""
        return value.buffer not in self.outputs and all(reader is op for reader in self.readers.get(value.buffer, ()))

    def source(self, value: Value, kind: type[OpT], reader: Op) -> OpT | None:
        """The producer of `value`, if a fusion may take it into `reader`.

        That needs three things: its kind is exactly `kind`, `value` is all of its first result, and nothing else reads
        that. The last keeps a fused operation from computing again what another one needs as well.
        """
        producer = self.producers.get(value.buffer)
        if type(producer) is not kind or not value.whole or not self.read_by_only(value, reader):
            return None
        assert isinstance(producer, kind)
        return producer if producer.out.buffer == value.buffer else None


Fusion = Callable[[Op, Graph], tuple[Op, list[Op]] | None]
"""(operation, graph) -> the operation that replaces it, and the producers that become needless"""


def readers_of(program_ops: tuple[Op, ...]) -> dict[int, list[Op]]:
    """Operations that read each buffer, once for every field that does."""
    out: dict[int, list[Op]] = {}
    for op in program_ops:
        for value in op.reads().values():
            out.setdefault(value.buffer, []).append(op)
    return out


def fuse(program: Program, *fusions: Fusion) -> Program:
    """Apply each fusion in turn wherever it fits."""
    for fusion in fusions:
        graph = Graph.of(program)
        changed: dict[int, Op] = {}
        gone: set[int] = set()
        for op in program.ops:
            if found := fusion(op, graph):
                changed[id(op)], needless = found
                gone |= {id(o) for o in needless}
        kept = tuple(changed.get(id(op), op) for op in program.ops if id(op) not in gone)
        program = replace(program, ops=kept)
    return program


def residual_into_linear(op: Op, graph: Graph) -> tuple[Op, list[Op]] | None:
    """Fuse x + linear(y) into a product with a residual."""
    if not isinstance(op, ops.Add) or op.x.buffer == op.y.buffer:
        return None
    for own, other in ((op.x, op.y), (op.y, op.x)):
        product = graph.source(own, ops.Linear, op)
        if product and not product.act and product.residual is None:
            return replace(product, out=op.out, residual=other), [product]
    return None


def act_into_linear(op: Op, graph: Graph) -> tuple[Op, list[Op]] | None:
    """Fuse act(linear(x)), or act(gate) · up of a product whose outputs are gate | up, into the product."""
    if isinstance(op, ops.GatedAct):
        gate, up = op.gate, op.up
        halves = gate.buffer == up.buffer and (gate.start, up.start) == (0, gate.width)
        if not halves or 2 * gate.width != gate.spec.width or up.width != gate.width:
            return None
        source = replace(gate, width=gate.spec.width)
    elif isinstance(op, ops.Act):
        source = op.x
    else:
        return None
    product = graph.source(source, ops.Linear, op)
    if product is None or product.act or product.residual is not None:
        return None
    return replace(product, out=op.out, act=op.act, gated=isinstance(op, ops.GatedAct)), [product]


def heads_into_attention(op: Op, graph: Graph) -> tuple[Op, list[Op]] | None:
    """Fuse the rotation of queries and keys into attention, and the RMS norm of their heads before it.

    The fused operation has one rotation and one epsilon for both, so queries and keys must agree on them.
    """
    if not isinstance(op, ops.Attention) or op.rope or op.q_norm or op.k_norm or op.q.buffer == op.k.buffer:
        return None
    q, k = graph.source(op.q, ops.Rope, op), graph.source(op.k, ops.Rope, op)
    if q is None or k is None or q.rope != k.rope or not q.head_dim == k.head_dim == op.head_dim:
        return None
    fused = replace(op, rope=q.rope, q=q.x, k=k.x)
    q_norm, k_norm = graph.source(q.x, ops.Norm, q), graph.source(k.x, ops.Norm, k)
    if q_norm is None or k_norm is None or not (_fusible_norm(q_norm, op) and _fusible_norm(k_norm, op)):
        return fused, [q, k]
    if q_norm.eps != k_norm.eps:
        return fused, [q, k]
    fused = replace(fused, q=q_norm.x, k=k_norm.x, q_norm=q_norm.weight, k_norm=k_norm.weight, eps=q_norm.eps)
    return fused, [q, k, q_norm, k_norm]


def _fusible_norm(norm: ops.Norm, attention: ops.Attention) -> bool:
    """True for a norm that attention can apply itself: RMS, of its heads, no bias."""
    return norm.head_dim == attention.head_dim and not norm.center and norm.bias is None


def add_into_norm(op: Op, graph: Graph) -> tuple[Op, list[Op]] | None:
    """Fuse norm(x + y), keeping the sum: on a GPU this pays more than `residual_into_linear`.

    The sum is then written where the norm is, so the norm must be its first reader.
    """
    if type(op) is not ops.Norm or op.head_dim or not op.x.whole:
        return None
    add = graph.producers.get(op.x.buffer)
    if not isinstance(add, ops.Add) or graph.readers[add.out.buffer][0] is not op:
        return None
    both = ops.AddNorm(
        x=add.x, y=add.y, total=add.out, out=op.out, weight=op.weight, bias=op.bias, eps=op.eps, center=op.center
    )
    return both, [add]


def take_rows_early(program: Program) -> Program:
    """After the last operation that looks across rows only the rows that sample matter: choose them there.

    The program is left as it is if there is not exactly one TakeRows, or if something later needs all rows of a value
    between the two.
    """
    takes = [i for i, op in enumerate(program.ops) if isinstance(op, ops.TakeRows)]
    if len(takes) != 1:
        return program
    take = takes[0]
    first = next((i + 1 for i in range(take - 1, -1, -1) if not program.ops[i].rowwise), 0)
    if first == take:
        return program
    between = {v.buffer for op in program.ops[first:take] for v in op.results().values()}
    later = [v for op in program.ops[take + 1 :] for v in op.reads().values()]
    if any(v.buffer in between for v in (*later, *program.outputs.values())):
        return program
    tape = program.tape()
    taken: dict[int, Value] = {}  # buffer -> its rows that sample

    def at(v: Value) -> Value:
        if v.buffer not in taken:
            whole = replace(v, start=0, width=v.spec.width)
            taken[v.buffer] = tape.new("samples", v.spec.width, v.spec.dtype)
            tape.ops.append(ops.TakeRows(x=whole, out=taken[v.buffer]))
        return replace(taken[v.buffer], start=v.start, width=v.width)

    for op in program.ops[first:take]:
        reads = {name: at(v) for name, v in op.reads().items()}
        results = {name: tape.new("samples", v.width, v.spec.dtype) for name, v in op.results().items()}
        taken |= {v.buffer: results[name] for name, v in op.results().items()}
        tape.ops.append(replace(op, **reads, **results))
    needed = program.ops[take]
    assert isinstance(needed, ops.TakeRows)
    old, new = needed.out, at(needed.x)

    def instead(v: Value) -> Value:
        return replace(new, start=new.start + v.start, width=v.width) if v.buffer == old.buffer else v

    rest = [replace(op, **{name: instead(v) for name, v in op.reads().items()}) for op in program.ops[take + 1 :]]
    outputs = {name: instead(value) for name, value in program.outputs.items()}
    return replace(program, ops=(*program.ops[:first], *tape.ops, *rest), outputs=outputs)


def quantize_inputs(program: Program, wants: Callable[[ops.Linear], bool], fuses: Callable[[Op], bool]) -> Program:
    """Give products that want them int8 inputs: written so by the producer if `fuses` allows it, else by a Quantize."""
    tape = program.tape()
    twins = {(buffer, 0, value.width): value for buffer, value in _written_as_int8(program, wants, fuses).items()}
    rewritten = {value.buffer for value in twins.values()}
    out: list[Op] = []
    for op in program.ops:
        if isinstance(op, ops.Linear) and wants(op):
            x = op.x
            key = (x.buffer, x.start, x.width)
            if key not in twins:
                twins[key] = tape.new(x.spec.rows, x.width, "int8")
                out.append(ops.Quantize(x=x, out=twins[key]))
            op = replace(op, x=twins[key])
        if op.out.buffer in rewritten:
            op = replace(op, out=twins[op.out.buffer, 0, op.out.width])
        out.append(op)
    return replace(program, ops=tuple(out))


def _written_as_int8(
    program: Program, wants: Callable[[ops.Linear], bool], fuses: Callable[[Op], bool]
) -> dict[int, Value]:
    """Int8 values by buffer, where the producer can write int8 itself and every reader wants that.

    Such a value keeps its buffer's id. A reader that takes the buffer as its residual, too, needs it as it is.
    """
    graph = Graph.of(program)
    twins: dict[int, Value] = {}
    for buffer, readers in graph.readers.items():
        producer = graph.producers.get(buffer)
        if producer is None or producer.out.buffer != buffer or buffer in graph.outputs or not fuses(producer):
            continue
        if all(isinstance(r, ops.Linear) and wants(r) and r.x.whole and _reads_as_input(r, buffer) for r in readers):
            value = producer.out
            twins[buffer] = replace(value, spec=replace(value.spec, dtype="int8"))
    return twins


def _reads_as_input(op: ops.Linear, buffer: int) -> bool:
    """True if a product reads `buffer` as its input and as nothing else."""
    return op.x.buffer == buffer and (op.residual is None or op.residual.buffer != buffer)
