"""Preparation of a recorded program for lowering: fusion, weight packing and int8 activations.

`refusal` decides whether this backend can run a program before any weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokenmill.backends.cpu import collectives, items, lower_encoded, lower_latent, lower_special, lower_states
from tokenmill.backends.cpu.division import Division
from tokenmill.backends.cpu.isa import Isa
from tokenmill.backends.cpu.layout import ACTS, BLOCK
from tokenmill.backends.cpu.lower import KINDS
from tokenmill.backends.cpu.ordered import order_inputs
from tokenmill.backends.cpu.pack import Packed, gates, pack, pack_weight
from tokenmill.backends.cpu.scratch import Arena
from tokenmill.backends.kind import Report
from tokenmill.errors import Unsupported
from tokenmill.parallel.group import Group
from tokenmill.program import ops, passes
from tokenmill.program.ops import Op, Weight
from tokenmill.program.recurrence import RgLru
from tokenmill.program.value import Program
from tokenmill.quant.base import Reader, check, dense, for_each, load
from tokenmill.weights.checkpoint import Checkpoint
from tokenmill.weights.mapped import Reading

_VECTOR = 16
_ALONE = Group()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A program ready for lowering.

    `panels`: packed matrices. `private`: buffers of which each thread holds a private copy while rows are few.
    `division`: of the work among ranks.
    """

    program: Program
    panels: dict[Weight, tuple[Packed, ...]]
    private: frozenset[int]
    division: Division


def fused(program: Program) -> Program:
    """Fuse the operations that one kernel of this backend computes together. Needs no weights."""
    program = passes.fuse(
        passes.take_rows_early(program),
        passes.residual_into_linear,
        _act_into_linear,
        passes.act_into_conv,
        _heads_into_attention,
    )
    return collectives.fused(program)


def _act_into_linear(op: Op, graph: passes.Graph) -> tuple[Op, list[Op]] | None:
    """As `passes.act_into_linear`, but skip gated products whose halves are not whole blocks."""
    if isinstance(op, ops.GatedAct) and not gates(2 * op.gate.width):
        return None
    return passes.act_into_linear(op, graph)


def _heads_into_attention(op: Op, graph: passes.Graph) -> tuple[Op, list[Op]] | None:
    """As `passes.heads_into_attention`, but skip queries and keys that something reads after attention.

    The kernel normalizes and rotates queries and keys in place, so a later reader would get changed values.
    """
    found = passes.heads_into_attention(op, graph)
    if found is None:
        return None
    fused, removed = found
    assert isinstance(fused, ops.Attention)
    return None if _read_later(fused, graph, op, *removed) else found


def _read_later(attention: ops.Attention, graph: passes.Graph, *consumers: Op) -> bool:
    """Return True if something reads the queries or keys of `attention` after all of `consumers`."""
    consumed = {id(op) for op in consumers}
    return any(
        value.buffer in graph.outputs or id(graph.readers[value.buffer][-1]) not in consumed
        for value in (attention.q, attention.k)
    )


def refusal(program: Program, block_size: int) -> str:
    """Return the reason why this backend cannot run a recorded program; "" if it can."""
    if block_size % BLOCK:
        return f"its cache blocks are of {BLOCK} tokens or a multiple, not {block_size}"
    lowered = fused(program)
    graph = passes.Graph.of(lowered)
    for op in lowered.ops:
        if type(op) not in KINDS:
            return f"it has no kernel for {type(op).__name__}"
        if isinstance(op, ops.Attention) and (op.rope or op.q_norm) and _read_later(op, graph, op):
            return "an operation reads queries or keys that its attention rotates in place"
        if why := next(filter(None, (refuse(op) for refuse in _REFUSALS)), ""):
            return why
    return lower_special.refused_ids(lowered)


def _refused(op: Op) -> str:
    if isinstance(op, ops.Attention):
        if op.head_dim % _VECTOR:
            return f"its attention is for heads of a multiple of {_VECTOR} columns, not {op.head_dim}"
        if op.q.width % op.k.width:
            return "query heads must be a multiple of key-value heads"
    if isinstance(op, ops.Linear | ops.Act | ops.GatedAct) and op.act not in ACTS:
        return f"it has no kernel for the activation {op.act}"
    if isinstance(op, ops.Norm) and (op.head_dim or op.x.width) % _VECTOR:
        return f"its norms are for multiples of {_VECTOR} columns, not {op.head_dim or op.x.width}"
    if isinstance(op, ops.Norm) and op.weight and op.weight.rows not in (op.head_dim, op.x.width):
        return "its norms have a weight for each column"
    if isinstance(op, ops.Norm) and op.bias is not None and not op.center:
        return "it has no kernel for an RMS norm with a bias"
    return ""


_REFUSALS = (
    _refused, items.refused, lower_latent.refused, lower_states.refused, lower_special.refused, lower_encoded.refused,
    collectives.refused,
)  # fmt: skip


def prepare(
    program: Program,
    source: Checkpoint,
    read: Reader,
    isa: Isa,
    threads: int,
    report: Report | None,
    group: Group = _ALONE,
) -> Prepared:
    """Fuse a program, then read all its matrices and pack them for an instruction set. `program`: of a rank of `group`.

    Raises ModelError if a tensor is missing or has an unexpected shape.
    """
    program = lower_states.stacked_gates(fused(program))
    check(_weights(program.model), source)
    panels = pack_all(program, source, read, isa, threads, report, group.rank)
    ordered = {weight for weight, packed in panels.items() if packed[0].order is not None}
    program = passes.quantize_inputs(
        program, lambda op: panels[op.weight][0].quantized and op.weight not in ordered, _writes_int8
    )
    program = order_inputs(program, panels)
    return Prepared(program, panels, private_outputs(program), Division.of(program, group.size))


def _weights(program: Program) -> list[Weight]:
    return list(dict.fromkeys(w for op in program.ops for ws in op.weights().values() for w in ws))


def pack_all(
    program: Program,
    source: Checkpoint,
    read: Reader,
    isa: Isa,
    threads: int,
    report: Report | None,
    rank: int = 0,
) -> dict[Weight, tuple[Packed, ...]]:
    """Pack all matrices on several threads. `report` is called on the calling thread, with bytes of the checkpoint."""
    gated = {op.weight for op in program.ops if isinstance(op, ops.Linear) and op.gated}
    gated |= {weight for op in program.ops if isinstance(op, ops.Experts) and op.gated for weight in op.gate_up}
    floats = {op.weight for op in program.ops if isinstance(op, ops.Route)}  # because near scores decide
    floats |= {w for op in program.ops if isinstance(op, RgLru) for w in (*op.input_gate, *op.recurrence_gate)}
    expansions = {op.expand: op for op in program.ops if isinstance(op, ops.LatentAttention)}
    products = {op.weight for op in program.ops if isinstance(op, ops.Linear)}
    products -= {w for op in program.ops if not isinstance(op, ops.Linear) for ws in op.weights().values() for w in ws}
    constants = {w for op in program.ops for w in (*lower_states.constants(op), *lower_encoded.constants(op))}
    wanted = [w for w in _weights(program) if w.columns and w not in constants]
    arena = Arena()

    def packed_from(source: Checkpoint, weight: Weight) -> tuple[Packed, ...]:
        if weight in floats:
            return (pack(dense(load(weight, source, read, rank).floats()), allocate=arena.zeros),)
        if weight in expansions:
            return lower_latent.packed(expansions[weight], load(weight, source, read, rank), arena.zeros)
        how = {"gated": weight in gated, "pairs": isa.pairs, "product": weight in products}
        return pack_weight(weight, source, read, rank, **how, allocate=arena.zeros)

    def one(weight: Weight) -> tuple[Packed, ...]:
        with Reading(source) as reading:  # so that weights are in memory once, not twice
            return packed_from(reading, weight)

    packed = for_each(wanted, source, one, max(1, threads), report)
    _one_form(program, packed)
    return packed


def _one_form(program: Program, packed: dict[Weight, tuple[Packed, ...]]) -> None:
    """Raise Unsupported if some parts of a matrix need int8 activations and others need floats."""
    for op in program.ops:
        if isinstance(op, ops.Linear) and len({part.quantized for part in packed[op.weight]}) > 1:
            raise Unsupported("mixture of weights", op.weight.name, (), "Use --backend torch.")
        for bank in (op.gate_up, op.down) if isinstance(op, ops.Experts) else ():
            if len({part.form for weight in bank for part in packed[weight]}) > 1:
                raise Unsupported("mixture of weights of experts", bank[0].name, (), "Use --backend torch.")


def _writes_int8(op: Op) -> bool:
    """Return True if the kernel of this operation can write its output as int8."""
    if isinstance(op, ops.Attention):
        return op.q.width // (op.k.width // op.head_dim) % 32 == 0  # the heads of one item must be whole blocks of 32
    if isinstance(op, ops.Linear):
        return op.act is not None and op.out.width % 32 == 0
    return isinstance(op, ops.Norm) and not isinstance(op, ops.AddNorm) and not op.head_dim and op.x.width % 32 == 0


def private_outputs(program: Program) -> frozenset[int]:
    """Return the buffers of norms that only products read.

    While rows are few each thread computes a private copy of them, which is cheaper than a barrier.
    """
    graph = passes.Graph.of(program)
    return frozenset(
        op.out.buffer
        for op in program.ops
        if type(op) is ops.Norm
        and not op.head_dim
        and op.out.buffer not in graph.outputs
        and _all_products(op.out.buffer, graph.readers.get(op.out.buffer, []))
    )


def _all_products(buffer: int, readers: Iterable[Op]) -> bool:
    return all(isinstance(r, ops.Linear) and r.x.buffer == buffer and _no_residual(r, buffer) for r in readers)


def _no_residual(op: ops.Linear, buffer: int) -> bool:
    return op.residual is None or op.residual.buffer != buffer
