"""Decode at batch size one in fewer launches: products include the norm before them and the sum behind them.

A layer is then five kernels, each launched while the one before ends.
"""

from __future__ import annotations

from tokenmill.backends.cuda.launch import Launch, Run
from tokenmill.backends.cuda.lower import Lowering
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.products.base import Product
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.program import ops
from tokenmill.program.ops import Op
from tokenmill.program.passes import readers_of
from tokenmill.program.value import Value


class BatchOneFusion:
    """Fusions of a lowered program at batch size one. The lowering's launches serve what is not fused."""

    def __init__(self, lowering: Lowering, memory: Memory) -> None:
        self._lowering, self._memory = lowering, memory
        self._ops = memory.program.ops
        self._readers = readers_of(self._ops)
        self._summed: dict[int, ops.AddNorm] = {}  # product's buffer -> the sum that it goes into
        self._normed: dict[int, ops.Norm] = {}  # norm's buffer -> the norm
        for before, op in zip((None, *self._ops), self._ops, strict=False):
            self._look(before, op)

    def launches(self) -> list[Launch]:
        """Return the launches in order, without those whose work is done by another one."""
        made = []
        gates = {id(g) for op in self._ops if isinstance(op, ops.Linear) and (g := self._gate(op))}
        for launch in self._lowering.launches():
            op = launch.op
            if isinstance(op, ops.Linear) and self._fits(op):
                made.append(Launch(op, self._product(op)))
            elif id(op) not in gates and not (isinstance(op, ops.Norm) and op.out.buffer in self._normed):
                made.append(launch)
        return made

    def _look(self, before: Op | None, op: Op) -> None:
        """Note a norm that its readers can do. Its sum, if it has one, must be fusable into the product before."""
        if not isinstance(op, ops.Norm) or op.head_dim or op.center or op.bias or op.weight is None:
            return
        readers = self._readers.get(op.out.buffer, [])
        if not readers or not all(isinstance(r, ops.Linear) and r.x.whole and self._fits(r) for r in readers):
            return
        if isinstance(op, ops.AddNorm):
            if not isinstance(before, ops.Linear) or not self._fits(before) or self._gate(before) is not None:
                return
            if before.out.buffer not in (op.x.buffer, op.y.buffer) or len(self._readers[before.out.buffer]) != 1:
                return
            self._summed[before.out.buffer] = op
        self._normed[op.out.buffer] = op

    def _fits(self, op: ops.Linear) -> bool:
        return self._lowering.product(op).fuses_one

    def _gate(self, op: ops.Linear) -> ops.GatedAct | None:
        return self._lowering.gate_of(op) if self._fits(op) else None

    def _product(self, op: ops.Linear) -> Run:
        product: Product = self._lowering.product(op)
        norm = residual = None
        if (found := self._normed.get(op.x.buffer)) is not None:
            assert found.weight is not None, "_look leaves it out"
            x: Value = found.total if isinstance(found, ops.AddNorm) else found.x
            norm = self._memory.value(x), self._lowering.weight(found.weight), found.eps
        if (total := self._summed.get(op.out.buffer)) is not None:
            other = total.y if total.x.buffer == op.out.buffer else total.x
            residual = self._memory.value(other), self._memory.value(total.total)

        def run(n: Sizes) -> None:
            product.one(norm, residual, n.early)

        return run
