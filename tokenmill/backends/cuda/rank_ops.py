"""Launches of operations that combine the ranks' results: sums, with the norm behind them, and gathered columns."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor

from tokenmill.backends.cuda.collectives.base import Collectives, Normed, Reduction
from tokenmill.backends.cuda.launch import Run
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.program import ops
from tokenmill.program.ops import Op, Weight
from tokenmill.program.passes import readers_of


class RankLowering:
    """Lowers these operations. `weights`: vectors on the device. `stores_codes`: norm -> for how many rows it stores
    codes for FP8 products, which the kernel of a sum does not.
    """

    def __init__(
        self,
        memory: Memory,
        weights: dict[Weight, Tensor],
        collectives: Collectives,
        stores_codes: Callable[[ops.Norm], Callable[[int], bool]],
    ) -> None:
        self._memory, self._weights, self._collectives = memory, weights, collectives
        self._stores_codes = stores_codes
        self._joined = joined_norms(memory.program.ops)
        self._reductions: dict[int, Reduction] = {}  # by the sum's buffer

    def by_kind(self) -> dict[type[Op], Callable[[Any], Run]]:
        """Return the function that lowers each kind."""
        return {ops.AllReduce: self._sum, ops.Gather: self._gather}

    def norm(self, op: ops.Norm, alone: Run) -> Run:
        """Return the launch of a norm, with the sum before it if one kernel does both. `alone`: without."""
        found = next((sum_ for sum_, norm in self._joined.values() if norm is op), None)
        if found is None:
            return alone
        reduction, coded = self._reduction(found), self._stores_codes(op)

        def run(n: Sizes) -> None:
            rows = n.of(op.out)
            if reduction.norms(rows) and not coded(rows):
                reduction.run_normed(rows, n.early)
            else:
                alone(n)

        return run

    def _sum(self, op: ops.AllReduce) -> Run:
        reduction, (_, norm) = self._reduction(op), self._joined.get(op.out.buffer, (op, None))
        coded = None if norm is None else self._stores_codes(norm)

        def run(n: Sizes) -> None:
            rows = n.of(op.out)
            if coded is None or not reduction.norms(rows) or coded(rows):
                reduction.run(rows, n.early)

        return run

    def _reduction(self, op: ops.AllReduce) -> Reduction:
        """Return the sum of an operation, one object for all who launch it."""
        if op.out.buffer not in self._reductions:
            x, out = self._memory.value(op.x), self._memory.value(op.out)
            _, norm = self._joined.get(op.out.buffer, (op, None))
            normed = None if norm is None else self._normed(op, norm)
            self._reductions[op.out.buffer] = self._collectives.reduction(x, out, normed)
        return self._reductions[op.out.buffer]

    def _normed(self, op: ops.AllReduce, norm: ops.Norm) -> Normed:
        y, total = None, self._memory.value(op.out)
        if isinstance(norm, ops.AddNorm):
            y = self._memory.value(norm.y if norm.x.buffer == op.out.buffer else norm.x)
            total = self._memory.value(norm.total)
        weight, bias = (None if w is None else self._weights[w] for w in (norm.weight, norm.bias))
        return Normed(y, weight, bias, total, self._memory.value(norm.out), norm.eps, norm.center)

    def _gather(self, op: ops.Gather) -> Run:
        operations = self._memory.program.ops
        behind = operations[operations.index(op) + 1 :]
        first_only = not any(each.weights() or isinstance(each, ops.AllReduce | ops.Gather) for each in behind)
        x, out = self._memory.value(op.x), self._memory.value(op.out)
        gathering = self._collectives.gathering(x, out, first_only)

        def run(n: Sizes) -> None:
            if rows := n.of(op.out):
                gathering.run(rows)

        return run


def joined_norms(operations: tuple[Op, ...]) -> dict[int, tuple[ops.AllReduce, ops.Norm]]:
    """Return the sums, by buffer, with the norm right behind that one kernel may do too.

    A norm of the sum itself leaves the sum in memory for others. One of the sum and another term does not, so it must
    be the only reader.
    """
    readers, found = readers_of(operations), dict[int, tuple[ops.AllReduce, ops.Norm]]()
    for before, op in pairwise(operations):
        if not isinstance(before, ops.AllReduce) or not isinstance(op, ops.Norm) or op.head_dim:
            continue
        terms = (op.x, op.y) if isinstance(op, ops.AddNorm) else (op.x,)
        if [v.buffer for v in terms].count(before.out.buffer) != 1 or not all(v.whole for v in terms):
            continue
        if not isinstance(op, ops.AddNorm) or len(readers[before.out.buffer]) == 1:
            found[before.out.buffer] = before, op
    return found
