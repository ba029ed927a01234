"""Constraints on the sequences of an engine, on rank 0, which samples. `runtime.constraint` has that on one sequence.

`Constraints` implements three interfaces:

* `engine.gated.Prerequisite`: a request waits until its grammar is compiled.
* `runtime.executor.Masking`: a step with constrained rows samples once the tokens of the previous step are known, from
  masks that are filled while the device computes.
* `engine.extended.Extender`: tokens without an alternative, and ends, are sent to the schedulers of all ranks.

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
    """A grammar that is being compiled. `concurrent.futures.Future` implements it."""

    def result(self) -> Grammar:
        """Return the grammar. Raise GrammarError if it is invalid."""


class Grammars(Protocol):
    """Compiler of grammars for one model, and filler of their masks."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text. Available once a grammar is compiled."""

    def prepare(self) -> object:
        """Start the next unit of the one-time work before a first grammar. Does not block."""

    def compile(self, spec: GrammarSpec) -> Compiling:
        """Start to compile a grammar. Does not block."""

    def fill(self, matchers: Sequence[Matcher], mask: NDArray[np.uint32], rows: Sequence[int]) -> None:
        """Fill row `rows[i]` of the mask by `matchers[i]`, for each i."""


class Constraints:
    """All constraints of an engine.

    `grammars`: closed by the caller; None: refuse requests with a grammar.
    """

    name = "grammar"

    def __init__(self, vocab_size: int, grammars: Grammars | None = None) -> None:
        self._row_words, self._grammars = -(-vocab_size // 32), grammars
        self._constraints: dict[int, Constraint] = {}
        self.due: dict[int, Extend] = {}  # see `engine.extended.Extender`
        self._last_number, self._last_deferred = 0, False  # of the last launched batch

    def prepare(self) -> None:
        """Start the next unit of the one-time work before a first grammar, if grammars are served. Does not block."""
        if self._grammars is not None:
            self._grammars.prepare()

    def compile(self, spec: GrammarSpec) -> Compiling:
        """Start to compile a grammar. Does not block. Raise GrammarError if this engine serves no grammars."""
        if self._grammars is None:
            raise GrammarError("this engine has no grammars")
        return self._grammars.compile(spec)

    @staticmethod
    def constrains(request: Request) -> bool:
        """Return True if steps may need masks for this request. Every rank can tell from the request."""
        return request.grammar is not None or request.stopping.force_after > 0

    # ---- at the gate

    def begin(self, request: Request) -> Pending | None:
        """See `engine.gated.Prerequisite`."""
        if request.grammar is not None:
            return _Compiled(self, request, self.compile(request.grammar))
        if request.stopping.force_after > 0:
            self._constraints[request.id] = Constraint(request, None, ())
        return None

    def start(self, request: Request, grammar: Grammar) -> None:
        """Constrain a request, which is about to run, by its compiled grammar."""
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
        self.due.pop(request_id, None)

    # ---- at the executor

    def defers(self, batch: Batch) -> bool:
        """See `runtime.executor.Masking`."""
        self._last_number, self._last_deferred = batch.number, False
        if self._constraints:
            self._last_deferred = any(constraint.deferred for _, constraint in self._rows(batch))
        return self._last_deferred

    def masks(self, batch: Batch) -> Masks:
        """See `runtime.executor.Masking`."""
        rows = [(index, constraint) for index, constraint in self._rows(batch) if constraint.deferred]
        bits = np.zeros((len(rows), self._row_words), np.uint32)
        unfilled = [(row, constraint) for row, (_, constraint) in enumerate(rows) if constraint.needs_matcher]
        try:
            self._fill(unfilled, bits)
        except Exception:  # noqa: BLE001  fill the rows one by one to find the one that failed
            self._fill_alone(unfilled, bits)
        for row, (_, constraint) in enumerate(rows):
            if constraint.ended:
                bits[row] = 0xFFFFFFFF
            elif message := constraint.restrict(bits[row]):
                self._queue(constraint, message)
        return Masks(np.array([index for index, _ in rows], np.int32), bits)

    def observe(self, batch: Batch, token_ids: list[int]) -> None:
        """See `runtime.executor.Masking`."""
        if not self._constraints:
            return
        for index, constraint in self._rows(batch):
            if token_ids[index] < 0:  # its logits are not finite: the scheduler ends it
                constraint.ended = True
                continue
            try:
                message = constraint.observe(token_ids[index], not self._last_deferred)
            except Exception as error:  # noqa: BLE001  an error ends only this request
                self._fail(constraint, error)
                continue
            if message:
                self._queue(constraint, message)

    def _rows(self, batch: Batch) -> list[tuple[int, Constraint]]:
        """Return the constrained sampling rows whose tokens count, as (index into `batch.samples`, constraint)."""
        constraints, sequences, number = self._constraints, batch.sequences, batch.number
        rows = []
        for index, row in enumerate(batch.samples.tolist()):
            constraint = constraints.get(sequences[row].id)
            if constraint is not None and number >= constraint.valid_from and not constraint.ended:
                rows.append((index, constraint))
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
            except Exception as error:  # noqa: BLE001  an error ends only this request
                self._fail(constraint, error)

    def _queue(self, constraint: Constraint, message: Extend) -> None:
        """Queue a message to send before the next step. It voids the sampled tokens of steps on the device."""
        self.due[constraint.id] = message
        constraint.valid_from = self._last_number + 1

    def _fail(self, constraint: Constraint, error: Exception) -> None:
        constraint.ended = True
        message = explain(error, self.name)
        self._queue(constraint, Extend(constraint.id, constraint.num_tokens, (), "error", message))


class _Compiled:
    """`engine.gated.Pending` for the grammar of a request: `result` creates the constraint."""

    def __init__(self, constraints: Constraints, request: Request, compiling: Compiling) -> None:
        self._constraints, self._request, self._compiling = constraints, request, compiling
        self.done, self.add_done_callback = compiling.done, compiling.add_done_callback

    def result(self) -> None:
        self._constraints.start(self._request, self._compiling.result())

    def cancel(self) -> None:
        self._compiling.cancel()
        self._constraints.forget(self._request.id)
