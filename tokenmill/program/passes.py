"""Passes: rewrites of a program to an equivalent one.

Invariant: a pass does not change the results of the torch backend (tests/test_program.py). Memory planning is in
`buffers.py`, tensor parallelism in `shard.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeVar

from tokenmill.program import ops
from tokenmill.program.ops import Op
from tokenmill.program.recurrence import CausalConv
from tokenmill.program.value import Program, Value

OpT = TypeVar("OpT", bound=Op)


class Graph(NamedTuple):
    """Producers and readers of a program's buffers, indexed before a fusion begins."""

    producers: dict[int, Op]  # by buffer
    readers: dict[int, list[Op]]  # by buffer, in program order; an operation appears once per field that reads it
    outputs: frozenset[int]  # buffers that are read after the last operation

    @classmethod
    def of(cls, program: Program) -> Graph:
        """Index a program."""
        producers = {value.buffer: op for op in program.ops for value in op.results().values()}
        return cls(producers, readers_of(program.ops), frozenset(value.buffer for value in program.outputs.values()))

    def read_by_only(self, value: Value, op: Op) -> bool:
        """Return True if `op` is the only reader of the buffer of `value`, in one or more fields."""
        return value.buffer not in self.outputs and all(reader is op for reader in self.readers.get(value.buffer, ()))

    def source(self, value: Value, kind: type[OpT], reader: Op) -> OpT | None:
        """Return the producer of `value` if it may be fused into `reader`, else None.

        Fusion has three conditions: the producer's type is exactly `kind`, `value` is the whole of its first result,
        and `reader` is the only reader of that result. Without the last, the result would be computed twice.
        """
        producer = self.producers.get(value.buffer)
        if type(producer) is not kind or not value.whole or not self.read_by_only(value, reader):
            return None
        assert isinstance(producer, kind)
        return producer if producer.out.buffer == value.buffer else None


Fusion = Callable[[Op, Graph], tuple[Op, list[Op]] | None]
"""(operation, graph) -> the replacing operation and the producers that it makes redundant; None: no match"""


def readers_of(program_ops: tuple[Op, ...]) -> dict[int, list[Op]]:
    """Return the readers of each buffer, in program order; an operation appears once per field that reads it."""
    out: dict[int, list[Op]] = {}
    for op in program_ops:
        for value in op.reads().values():
            out.setdefault(value.buffer, []).append(op)
    return out


def fuse(program: Program, *fusions: Fusion) -> Program:
    """Apply each fusion in turn, wherever it matches."""
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
    """Fuse x + linear(y) into one product with a residual."""
    if not isinstance(op, ops.Add) or op.x.buffer == op.y.buffer:
        return None
    for own, other in ((op.x, op.y), (op.y, op.x)):
        product = graph.source(own, ops.Linear, op)
        if product and not product.act and product.residual is None:
            return replace(product, out=op.out, residual=other), [product]
    return None


def act_into_linear(op: Op, graph: Graph) -> tuple[Op, list[Op]] | None:
    """Fuse an activation into the product before it: act(linear(x)), or act(gate) · up with outputs gate | up."""
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


def act_into_conv(op: Op, graph: Graph) -> tuple[Op, list[Op]] | None:
    """Fuse an activation into the convolution before it."""
    if not isinstance(op, ops.Act):
        return None
    conv = graph.source(op.x, CausalConv, op)
    return None if conv is None or conv.act else (replace(conv, out=op.out, act=op.act), [conv])


def heads_into_attention(op: Op, graph: Graph) -> tuple[Op, list[Op]] | None:
    """Fuse the rotation of queries and keys into attention, with the RMSNorm of their heads if there is one.

    The fused operation has one rotation and one epsilon. If queries and keys differ in the rotation, nothing is fused;
    if they differ in the epsilon, the norms are not.
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
    """Return True for a norm that attention can apply: RMSNorm of each head by the same weight, without bias."""
    one = norm.weight is not None and norm.weight.rows == attention.head_dim
    return one and norm.head_dim == attention.head_dim and not norm.center and norm.bias is None


def add_into_norm(op: Op, graph: Graph) -> tuple[Op, list[Op]] | None:
    """Fuse norm(x + y) and keep the sum as a second result. On a GPU this saves more than `residual_into_linear`.

    The fused operation writes the sum at the place of the norm, so the norm must be the sum's first reader.
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
    """Move TakeRows to just after the last operation that is not row-wise, so that later ones compute fewer rows.

    Leaves the program unchanged if it does not have exactly one TakeRows, or if an operation after TakeRows, or an
    output, reads all rows of a value that is computed between the two places.
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
    """Give int8 inputs to the products that take them.

    `wants`: true for a product that takes an int8 input. `fuses`: true for an operation that can write int8 directly;
    after any other producer a Quantize is inserted.
    """
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
    """Return the int8 values, by buffer, for buffers whose producer can write int8 and whose readers all take it.

    An int8 value keeps its buffer's id. A buffer that is also read as a residual stays in floating point.
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
    """Return True if a product reads `buffer` as its input only, not as its residual."""
    return op.x.buffer == buffer and (op.residual is None or op.residual.buffer != buffer)
