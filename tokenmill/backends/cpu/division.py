"""Division of a step's rows among the ranks that share a model, and the places where ranks wait for each other.

Between two products, all ranks have the same rows. So each rank computes some of them only: it sums these rows of the
product before over the ranks, adds the residual, normalizes, and writes the result to memory that all ranks share,
where the next product reads all rows. As in sequence parallelism, the ranks together do the work of one.

A rank *meets* the others where an operation reads what they have written. With at most FEW rows a meeting costs more
than the rows: then each rank computes all of them between two products, and only the sums need a meeting. Ranks that
write the same place then write equal bits, each place once. Invariant: memory that other ranks read is used again only
behind a meeting that always takes place and follows the last reader (`Division.free_after`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tokenmill.program import ops, special
from tokenmill.program.encoded import StoreInput
from tokenmill.program.ops import Op
from tokenmill.program.value import Program, Value

_BY_ROW = (
    ops.Norm, ops.AddNorm, ops.Add, ops.Act, ops.GatedAct, ops.Scale, ops.SoftCap, ops.Quantize, special.Clip,
    special.ScaleByWeight, special.ScaleByPosition,
)  # fmt: skip
"""Operations whose kernels can compute some of the rows"""

Needed = Literal["always", "tokens", "samples"]
"""When ranks meet: in each step, or if it has more than FEW rows of this kind"""


@dataclass(frozen=True, slots=True)
class Division:
    """Division of a program's rows among ranks. All but `ranks` is empty for one rank."""

    ranks: int = 1
    own: frozenset[int] = frozenset()  # results, by buffer, of which each rank computes its own rows
    slots: frozenset[int] = frozenset()  # buffers in shared memory of which each rank has one
    common: frozenset[int] = frozenset()  # buffers in shared memory that the ranks write together
    meetings: Mapping[int, Needed] = field(default_factory=dict)  # before which operations, by index, ranks meet
    ops: int = 0

    def shares(self, buffer: int) -> bool:
        """Return True if a buffer lies in memory that the ranks share."""
        return buffer in self.slots or buffer in self.common

    def free_after(self, last: int) -> int:
        """Return the operation after which memory may be used again whose last reader is at index `last`.

        It is not `last` itself: where all ranks compute the same rows, none may overwrite what another still reads.
        """
        certain = [index for index, needed in self.meetings.items() if needed == "always"]
        i = bisect_right(certain, last)
        return max(last + 1, certain[i] - 1) if i < len(certain) else self.ops + 1

    @staticmethod
    def of(program: Program, ranks: int) -> Division:
        """Divide a program of one of `ranks` ranks."""
        return Division() if ranks == 1 else _Divider(program).divided(ranks)


class _Divider:
    """A walk over a program. `written`: buffers that are not complete on every rank, with the index of their writer."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.own, self.slots, self.common = set[int](), set[int](), set[int]()
        self.varies: set[int] = set()  # buffers with other columns, or terms of a sum, on each rank
        self.written: dict[int, int] = {}
        self.producers: dict[int, int] = {}  # index of the operation that writes a buffer
        self.meetings: dict[int, Needed] = {0: "always"}  # the first one protects the memory of the step before

    def divided(self, ranks: int) -> Division:
        gathered = {v.buffer for op in self.program.ops for v in op.results().values() if not v.whole}
        takes = [i for i, op in enumerate(self.program.ops) if isinstance(op, ops.TakeRows)]
        for i, op in enumerate(self.program.ops):
            if i in takes[:1]:
                self.meet(i, "always")  # prompt log-probabilities begin here
            if i and isinstance(self.program.ops[i - 1], StoreInput) and not isinstance(op, StoreInput):
                self.meet(i, "always")  # a step begins here; the rows before are the encoder's
            self.read(i, op)
            for buffer in (v.buffer for v in op.results().values()):
                self.producers[buffer] = i
                if buffer in gathered:  # the others write the other columns
                    self.written[buffer] = i
                    self.common.add(buffer)
                    self.varies.discard(buffer)
        for value in self.program.outputs.values():
            self.complete(len(self.program.ops), value)
        own, slots, common = map(frozenset, (self.own, self.slots, self.common))
        return Division(ranks, own, slots, common, self.meetings, len(self.program.ops))

    def read(self, i: int, op: Op) -> None:
        results = {v.buffer for v in op.results().values()}
        reads = list(op.reads().values())
        if isinstance(op, ops.AllReduce | ops.Gather):
            self.slots.add(op.x.buffer)
            self.meet_behind(i, self.producers[op.x.buffer], "always")
            if isinstance(op, ops.AllReduce):
                self.own |= results
                self.written |= dict.fromkeys(results, i)
            return
        shared = any(weight.ranks > 1 for weights in op.weights().values() for weight in weights)
        varies = shared or any(v.buffer in self.varies for v in reads)
        if varies:
            self.varies |= results
        elif type(op) in _BY_ROW and any(v.buffer in self.own and v.buffer in self.written for v in reads):
            self.own |= results
            self.written |= dict.fromkeys(results, i)
            return
        for value in reads:
            self.complete(i, value)

    def complete(self, i: int, value: Value) -> None:
        """Make a value complete on every rank before operation `i`."""
        if value.buffer in self.written:
            self.common.add(value.buffer)
            rows = value.spec.rows
            needed: Needed = rows if value.buffer in self.own and rows != "inputs" else "always"
            self.meet_behind(i, self.written.pop(value.buffer), needed)

    def meet_behind(self, i: int, writer: int, needed: Needed) -> None:
        """Meet before operation `i`, unless ranks have met since operation `writer`."""
        if not any(index > writer and kind in ("always", needed) for index, kind in self.meetings.items()):
            self.meet(i, needed)

    def meet(self, i: int, needed: Needed) -> None:
        self.meetings[i] = needed if self.meetings.get(i, needed) == needed else "always"
