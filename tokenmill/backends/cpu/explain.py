"""The kernels that a model needs and the bytes of its weights, found from a few rows of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.accounts import samples
from tokenmill.backends.cpu.collectives import ranks_of
from tokenmill.backends.cpu.isa import Isa
from tokenmill.backends.cpu.lower import Lowering
from tokenmill.backends.cpu.memory import Memory, Sizes
from tokenmill.backends.cpu.pack import pack_loaded
from tokenmill.backends.cpu.prepare import prepare
from tokenmill.parallel.group import Group
from tokenmill.program import ops
from tokenmill.program.cost import weights_of
from tokenmill.program.ops import Weight
from tokenmill.program.value import Program
from tokenmill.quant.base import Coded, Piece, Reader, check, stored_names
from tokenmill.weights.checkpoint import Checkpoint

_ROWS = 64  # rows read of each tensor, or a few more for whole heads: enough to determine its packing


def packed_bytes(program: Program, source: Checkpoint, read: Reader) -> int:
    """Return the bytes of a program's weights in panels; ModelError as `quant.base.check`.

    Matrices of products and experts are packed in part for it, one of each kind. Others take as many bytes as stored.
    """
    weights = weights_of(program)
    check(weights_of(program.model), source)
    panels = {w for op in program.ops if isinstance(op, ops.Linear | ops.Experts) for w in _matrices(op)}
    total = 0
    for ranks in {w.ranks for w in weights}:  # each rank holds its part
        stored = stored_names([w for w in weights if w not in panels and w.ranks == ranks], source)
        total += sum(map(source.nbytes, stored)) // ranks
    for sample in samples(program, source, read):
        packed = pack_loaded(sample.parts, product=sample.use == "product")
        each = sum(p.panels.nbytes for p in packed) / sum(part.shape[0] for part in sample.parts)
        total += round(each * sample.rows) * sample.alike
    return total


def _matrices(op: ops.Op) -> list[Weight]:
    return [w for ws in op.weights().values() for w in ws if w.columns]


def kernels_of(program: Program, source: Checkpoint, read: Reader, isa: Isa, kv_dtype: str) -> dict[str, Counter[str]]:
    """Count the rows of the step table by kind of operation and kernel, in the order of the program. Compiles nothing.

    `program`: of a rank, as recorded; the backend must not refuse it. `kv_dtype`: "f16" or "int8".
    """

    def read_some(source: Checkpoint, piece: Piece) -> Coded:
        first, stop, unit = piece.rows.start, piece.rows.stop, piece.weight.unit
        return read(source, replace(piece, rows=slice(first, min(stop, first + -(-_ROWS // unit) * unit))))

    def zeros(weight: Weight) -> NDArray[np.float32]:
        return np.zeros((weight.rows, weight.width) if weight.columns else weight.rows, np.float32)

    prepared = prepare(program, source, read_some, isa, 1, None, Group(0, ranks_of(program)))
    memory = Memory(
        prepared.program, Sizes(1, 1, 1, 1, kv_dtype), prepared.panels, zeros, prepared.private, prepared.division
    )
    kernels: dict[str, Counter[str]] = {}
    for line in Lowering(prepared.program, memory).lines():
        kind = type(line.op).__name__ if line.op is not None else "Rope"  # the cosines and sines of a step
        kernels.setdefault(kind, Counter())[line.kernel] += 1
    return kernels | {"Sample": Counter(["sample"])}
