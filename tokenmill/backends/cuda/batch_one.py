"""Decode at batch size one in fewer launches: products include the norm before them and the sum behind them.

Products with packed codes do not norm their input: the product before stores the sum times the norm's weight, too.

A layer is then five kernels, six with a mixture of experts, each launched while the one before ends.
"""

from __future__ import annotations

from torch import Tensor

from tokenmill.backends.cuda.launch import Launch, Run
from tokenmill.backends.cuda.lower import Lowering
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.products.base import NormedRow, Product
from tokenmill.backends.cuda.products.coded import CodedProduct
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
        self._given: dict[int, NormedRow] = {}  # norm's buffer -> the row that the product before stores instead
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
            elif isinstance(op, ops.Route) and (norm := self._norm_before(op)) is not None:
                made.append(Launch(op, self._lowering.mixtures.route_one(op, norm)))
            elif isinstance(op, ops.Experts):
                made.append(Launch(op, self._lowering.mixtures.experts_one(op, self._sum_behind(op))))
            elif id(op) not in gates and not (isinstance(op, ops.Norm) and op.out.buffer in self._normed):
                made.append(launch)
        return made

    def _look(self, before: Op | None, op: Op) -> None:
        """Note a norm that its readers can do. Its sum, if it has one, must be fusable into the product before."""
        if not isinstance(op, ops.Norm) or op.head_dim or op.center or op.bias or op.weight is None:
            return
        if isinstance(before, ops.AllReduce):  # The kernel of the sum may do the norm.
            return
        readers = self._readers.get(op.out.buffer, [])
        if not readers or not all(self._norms(r) for r in readers) or not self._outlives(op, readers[-1]):
            return
        kinds = [type(reader) for reader in readers]
        if ops.Experts in kinds and ops.Route not in kinds:  # A routing writes the norm for the experts.
            return
        given = any(isinstance(r, ops.Linear) and not self._lowering.product(r).norms_one for r in readers)
        if isinstance(op, ops.AddNorm):
            if before is None or not self._sums_into(before, op) or (given and not self._gives(before, op, readers)):
                return
            self._summed[before.out.buffer] = op
        elif given:
            return
        self._normed[op.out.buffer] = op

    def _sums_into(self, before: Op, norm: ops.AddNorm) -> bool:
        """Return True if the operation before a norm of a sum can add the other term, and no other one reads it."""
        reads = before.out.buffer in (norm.x.buffer, norm.y.buffer)
        return reads and self._sums(before) and len(self._readers[before.out.buffer]) == 1

    def _gives(self, before: Op, norm: ops.AddNorm, readers: list[Op]) -> bool:
        """Note that a product stores its result for the readers of the norm behind; False if one cannot."""
        product = self._lowering.product(before) if isinstance(before, ops.Linear) else None
        alike = all(isinstance(r, ops.Linear) and not self._lowering.product(r).norms_one for r in readers)
        if not isinstance(product, CodedProduct) or not alike or before.x.buffer in self._given:  # type: ignore[attr-defined]
            return False
        assert norm.weight is not None, "_look leaves it out"
        place, weight = self._memory.value(norm.out), self._lowering.weight(norm.weight)
        self._given[norm.out.buffer] = product.normed(place, weight, norm.eps)
        return True

    def _norms(self, op: Op) -> bool:
        """Return True if an operation can norm its input itself, or if another one does it for both."""
        if isinstance(op, ops.Route | ops.Experts):
            return op.x.whole
        return isinstance(op, ops.Linear) and op.x.whole and self._fits(op)

    def _sums(self, op: Op) -> bool:
        """Return True if an operation can add another term to its result."""
        return (isinstance(op, ops.Linear) and self._fits(op) and self._gate(op) is None) or isinstance(op, ops.Experts)

    def _outlives(self, norm: ops.Norm, reader: Op) -> bool:
        """Return True if the input of a norm is still in memory at the last reader of its result."""
        last = self._readers.get(self._source(norm).buffer, [norm])[-1]
        at, used = self._ops.index(reader), self._ops.index(last)
        return at <= used or self._ops[at - 1] is norm

    @staticmethod
    def _source(norm: ops.Norm) -> Value:
        return norm.total if isinstance(norm, ops.AddNorm) else norm.x

    def _norm_before(self, op: ops.Linear | ops.Route) -> tuple[Tensor, Tensor, float] | None:
        """Return the row before the norm that an operation does itself, the norm's weight and epsilon; None: none."""
        found = self._normed.get(op.x.buffer)
        if found is None:
            return None
        assert found.weight is not None, "_look leaves it out"
        return self._memory.value(self._source(found)), self._lowering.weight(found.weight), found.eps

    def _sum_behind(self, op: Op) -> tuple[Tensor, Tensor] | None:
        """Return the term that an operation adds itself, and the sum's place; None: none."""
        total = self._summed.get(op.out.buffer)
        if total is None:
            return None
        other = total.y if total.x.buffer == op.out.buffer else total.x
        return self._memory.value(other), self._memory.value(total.total)

    def _fits(self, op: ops.Linear) -> bool:
        return self._lowering.product(op).fuses_one

    def _gate(self, op: ops.Linear) -> ops.GatedAct | None:
        return self._lowering.gate_of(op) if self._fits(op) else None

    def _product(self, op: ops.Linear) -> Run:
        product: Product = self._lowering.product(op)
        norm, residual = self._norm_before(op), self._sum_behind(op)
        if isinstance(product, CodedProduct):
            given, total = self._given.get(op.x.buffer), self._summed.get(op.out.buffer)
            makes = None if total is None else self._given.get(total.out.buffer)
            return lambda n: product.one(None, residual, n.early, given, makes)

        def run(n: Sizes) -> None:
            product.one(norm, residual, n.early)

        return run
