"""Pipeline parallelism as a pass: from the program of a model to that of one stage, which has some of its layers.

The first stage has the embeddings, the last one the head. A stage receives the values that its operations read from
earlier ones, and sends those that later stages read.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from tokenmill.errors import ArgumentError, Unsupported
from tokenmill.program.cost import Load, cost
from tokenmill.program.encoded import encodes
from tokenmill.program.foreign import body_of
from tokenmill.program.ops import Op, Weight
from tokenmill.program.value import Program, Value

_ONE_STAGE = "Leave `--pipeline-parallel-size` out; use `--num-shard` for a model that one device cannot hold."
_LOAD = Load.decode(256, 1)  # a step that reads every expert, and few rows of the embedding table


class Send(Op):
    """Send x to the next stage. The result is not used."""

    rowwise = False
    whole_rows = True
    x: Value


class Receive(Op):
    """Receive a value from the stage before, which sends its values in the order in which this one receives them."""

    rowwise = False


class _Cut(NamedTuple):
    """A place between two layers at which a program may be cut."""

    before: int  # index of the first operation of the later stage
    gap: int  # ordinal of the pair of layers around it


def stage(program: Program, index: int, count: int) -> Program:
    """Return the program of stage `index` of `count` stages, which all have about the same bytes of weights.

    Cuts are made where the fewest values are alive. Layers that share a cache may be in several stages, each of which
    keeps it. Raise ArgumentError if there are fewer layers than stages, and Unsupported for an encoder and a decoder.
    """
    if count == 1:
        return program
    if encodes(program):
        raise Unsupported("model that is an encoder and a decoder", f"in {count} stages", (), _ONE_STAGE)
    if body_of(program):
        raise Unsupported("model that transformers computes", f"in {count} stages", (), _ONE_STAGE)
    ends = [0, *_cuts(program, count), len(program.ops)]
    first, last = ends[index], ends[index + 1]
    tape = program.tape()
    for value in _alive(program, last):
        tape.record(Send, value.spec.rows, 1, x=value)
    received = [Receive(out=value) for value in _alive(program, first)]
    outputs = program.outputs if index == count - 1 else {}
    return replace(program, ops=(*received, *program.ops[first:last], *tape.ops), outputs=outputs, whole=program)


def num_layers(program: Program) -> int:
    """Return the number of parts into which a program can be cut: its layers with a cache or a state."""
    return 1 + len({cut.gap for cut in _candidates(program)})


def _alive(program: Program, position: int) -> list[Value]:
    """Return the values that operations before `position` write and later ones, or outputs, read. In that order."""
    later = {v.buffer for op in program.ops[position:] for v in op.reads().values()}
    later |= {v.buffer for v in program.outputs.values()} if position < len(program.ops) else set()
    return [v for op in program.ops[:position] for v in op.results().values() if v.buffer in later]


def _candidates(program: Program) -> list[_Cut]:
    """Return the places between each two layers at which the fewest values are alive."""
    keeping = [i for i, op in enumerate(program.ops) if op.keeps() is not None or op.state() is not None]
    reading_ids = [i for i, op in enumerate(program.ops) if program.inputs.ids in op.reads().values()]
    first = max(reading_ids, default=-1) + 1
    widths = _widths(program)
    found = []
    for gap, (i, j) in enumerate(pairwise(keeping)):
        if _layer(program.ops[i]) == _layer(program.ops[j]):
            continue
        places = [at for at in range(max(i + 1, first), j + 1) if widths[at]]
        least = min((widths[at] for at in places), default=0)
        found += [_Cut(at, gap) for at in places if widths[at] == least]
    return found


def _layer(op: Op) -> int:
    """Return the layer of an operation that keeps a cache or a state."""
    spec = op.keeps() or op.state()
    assert spec is not None
    return spec.layer


def _widths(program: Program) -> list[int]:
    """Return, by index of an operation, the columns of the values that are alive before it.

    0 where they cannot cross: some are not numbers of all tokens.
    """
    last: dict[int, int] = {v.buffer: len(program.ops) for v in program.outputs.values()}
    for i, op in enumerate(program.ops):
        last |= {v.buffer: i for v in op.reads().values() if last.get(v.buffer, 0) < len(program.ops)}
    alive: dict[int, Value] = {}
    found = []
    for i, op in enumerate(program.ops):
        alive = {buffer: v for buffer, v in alive.items() if last.get(buffer, -1) >= i}
        crosses = all(v.spec.rows == "tokens" and v.spec.dtype == "float" for v in alive.values())
        found.append(sum(v.width for v in alive.values()) if crosses else 0)
        alive |= {v.buffer: v for v in op.results().values()}
    return found


def _cuts(program: Program, count: int) -> list[int]:
    """Return the places of the cuts into `count` stages whose largest has the fewest bytes of weights."""
    candidates = _candidates(program)
    layers = 1 + len({cut.gap for cut in candidates})
    if count > layers:
        raise ArgumentError(
            f"pipeline-parallel-size is {count}, but this model can be cut into {layers} parts at most: one for each "
            f"layer. Allowed: 1 to {layers}."
        )
    before = [0.0]  # bytes of weights of all operations before each one
    for op in program.ops:
        before.append(before[-1] + cost(op, _LOAD, _bits).weights)
    # By cut: the bytes of the largest stage before it, and the cuts up to it, for the best division of these stages.
    best: dict[_Cut, tuple[float, tuple[int, ...]]] = {cut: (before[cut.before], (cut.before,)) for cut in candidates}
    for _ in range(count - 2):
        best = {
            cut: min((max(size, before[cut.before] - before[other.before]), (*places, cut.before))
                     for other, (size, places) in best.items() if other.gap < cut.gap)
            for cut in candidates if any(other.gap < cut.gap for other in best)
        }  # fmt: skip
    _, places = min((max(size, before[-1] - before[cut.before]), places) for cut, (size, places) in best.items())
    return list(places)


def _bits(weight: Weight) -> float:
    return 16.0  # any value: stages are compared, and a model has one format for nearly all of its weights
