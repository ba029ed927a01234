"""The constraints of an engine's sequences, on rank 0, which samples.

They take part in three places. At the gate (`engine.gated.Prerequisite`) a request waits for its grammar. At the
executor (`runtime.executor.Masking`) a step with constrained rows samples when the tokens of the step before are known,
from masks that are made while the device computes. Before the scheduler (`engine.extended.Extender`) what a constraint
decides by itself is sent to all ranks. `runtime.constraint.Constraint` is one sequence's.

Everything runs on the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.base import Masks
from tokenmill.engine.gated import Pending, explain
from tokenmill.engine.sequence import Batch
from tokenmill.errors import GrammarError
from tokenmill.grammar.base import Grammar, Matcher
from tokenmill.runtime.constraint import Constraint
from tokenmill.wire.messages import Extend, GrammarSpec, Request


class Compiling(Pending, Protocol):
    """A grammar that is there later. `concurrent.futures.Future` is one."""

    def result(self) -> Grammar:
        """Return the grammar. GrammarError: there is none."""


class Grammars(Protocol):
    """The grammars of a model."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text. Read only after a grammar was compiled."""

    def prepare(self) -> object:
        """Begin the next piece of the work that a first grammar would wait for, without blocking."""

    def compile(self, spec: GrammarSpec) -> Compiling:
        """Begin to compile a grammar, without blocking."""

    def fill(self, matchers: Sequence[Matcher], mask: NDArray[np.uint32], rows: Sequence[int]) -> None:
        """Let each matcher fill the row of the mask whose index stands in the same place of `rows`."""


class Constraints:
    """All constraints of an engine.

    `grammars`: None refuses requests with a grammar. It stays the caller's to close.
    """

    name = "grammar"

    def __init__(self, vocab_size: int, grammars: Grammars | None = None) -> None:
        self._words, self._grammars = -(-vocab_size // 32), grammars
        self._constraints: dict[int, Constraint] = {}
        self.found: dict[int, Extend] = {}  # see `engine.extended.Extender`
        self._newest, self._deferred = 0, False  # of the batches that were launched: its number, and how it samples

    def prepare(self) -> None:
        """Begin the next piece of the work that a first request with a grammar would wait for, without blocking."""
        if self._grammars is not None:
            self._grammars.prepare()

    def compile(self, spec: GrammarSpec) -> Compiling:
        """Begin to compile a grammar, without blocking. GrammarError: this engine serves none."""
        if self._grammars is None:
            raise GrammarError("this engine has no grammars")
        return self._grammars.compile(spec)

    # ---- at the gate

    def begin(self, request: Request) -> Pending | None:
        """See `engine.gated.Prerequisite`."""
        if request.grammar is not None:
            return _Compiled(self, request, self.compile(request.grammar))
        if request.stopping.force_after > 0:
            self._constraints[request.id] = Constraint(request, None, ())
        return None

    def start(self, request: Request, grammar: Grammar) -> None:
        """Constrain a request, which will run, by its grammar."""
        assert self._grammars is not None
        self._constraints[request.id] = Constraint(request, grammar.matcher(), self._grammars.end_ids)

    # ---- before the scheduler

    @property
    def active(self) -> bool:
        """See `engine.extended.Extender`."""
        return bool(self._constraints)

    def forget(self, request_id: int) -> None:
        """See `engine.extended.Extender`."""
        self._constraints.pop(request_id, None)
        self.found.pop(request_id, None)

    # ---- at the executor

    def defers(self, batch: Batch) -> bool:
        """See `runtime.executor.Masking`."""
        self._newest, self._deferred = batch.number, False
        if self._constraints:
            self._deferred = any(constraint.deferred for _, constraint in self._rows(batch))
        return self._deferred

    def masks(self, batch: Batch) -> Masks:
        """See `runtime.executor.Masking`."""
        rows = [(place, constraint) for place, constraint in self._rows(batch) if constraint.deferred]
        bits = np.zeros((len(rows), self._words), np.uint32)
        asking = [(row, constraint) for row, (_, constraint) in enumerate(rows) if constraint.asks_matcher]
        try:
            self._fill(asking, bits)
        except Exception:  # noqa: BLE001  filling the rows one by one shows which one failed
            self._fill_alone(asking, bits)
        for row, (_, constraint) in enumerate(rows):
            if constraint.ended:
                bits[row] = 0xFFFFFFFF
            elif found := constraint.restrict(bits[row]):
                self._find(constraint, found)
        return Masks(np.array([place for place, _ in rows], np.int32), bits)

    def observe(self, batch: Batch, token_ids: list[int]) -> None:
        """See `runtime.executor.Masking`."""
        if not self._constraints:
            return
        for place, constraint in self._rows(batch):
            if token_ids[place] < 0:  # its numbers are broken: it ends
                constraint.ended = True
                continue
            try:
                found = constraint.observe(token_ids[place], not self._deferred)
            except Exception as error:  # noqa: BLE001  it ends this request alone
                self._fail(constraint, error)
                continue
            if found:
                self._find(constraint, found)

    def _rows(self, batch: Batch) -> list[tuple[int, Constraint]]:
        """The sampling rows that are constrained and count, by their place among the sampling rows."""
        constraints, sequences, number = self._constraints, batch.sequences, batch.number
        rows = []
        for place, row in enumerate(batch.samples.tolist()):
            constraint = constraints.get(sequences[row].id)
            if constraint is not None and number >= constraint.valid_from and not constraint.ended:
                rows.append((place, constraint))
        return rows

    def _fill(self, rows: list[tuple[int, Constraint]], bits: NDArray[np.uint32]) -> None:
        if self._grammars is not None and rows:
            matchers = [constraint.matcher for _, constraint in rows if constraint.matcher is not None]
            self._grammars.fill(matchers, bits, [row for row, _ in rows])

    def _fill_alone(self, rows: list[tuple[int, Constraint]], bits: NDArray[np.uint32]) -> None:
        for row, constraint in rows:
            try:
                bits[row] = 0
                self._fill([(row, constraint)], bits)
            except Exception as error:  # noqa: BLE001  it ends this request alone
                self._fail(constraint, error)

    def _find(self, constraint: Constraint, found: Extend) -> None:
        """Have a message sent before the next step. Steps that are on the device by then do not count."""
        self.found[constraint.id] = found
        constraint.valid_from = self._newest + 1

    def _fail(self, constraint: Constraint, error: Exception) -> None:
        constraint.ended = True
        message = explain(error, self.name)
        self._find(constraint, Extend(constraint.id, constraint.num_tokens, (), "error", message))


class _Compiled:
    """A request's grammar as the gate waits for it: `result` makes the constraint."""

    def __init__(self, constraints: Constraints, request: Request, compiling: Compiling) -> None:
        self._constraints, self._request, self._compiling = constraints, request, compiling
        self.done, self.add_done_callback = compiling.done, compiling.add_done_callback

    def result(self) -> None:
        self._constraints.start(self._request, self._compiling.result())

    def cancel(self) -> None:
        self._compiling.cancel()
        self._constraints.forget(self._request.id)
