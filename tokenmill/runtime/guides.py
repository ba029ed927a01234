"""Sequences whose next tokens are not the model's choice alone, on rank 0, which samples.

They are met in three places, and this is what the three share. At the border (`engine.intake.Gate`): a request waits
outside of the scheduler until its grammar is compiled, and what is found out of a sequence goes to the schedulers of
all ranks as a message. At the executor (`runtime.executor.Guiding`): a step that has such rows samples when the tokens
of the step before are known, from masks that are made while the device computes. In `Guide`: one sequence.

One thread, but for `_wake`, which compilations call back.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.base import Masks
from tokenmill.engine.sequence import Batch
from tokenmill.errors import GenerationError, GrammarError
from tokenmill.grammar.base import Grammar, Matcher
from tokenmill.runtime.guide import Guide
from tokenmill.wire.messages import Abort, Extend, GrammarSpec, Output, Request, ToEngine, ToScheduler

_log = logging.getLogger(__name__)

class Compiling(Protocol):
    """A grammar that is there later. `concurrent.futures.Future` is one."""

    def done(self) -> bool:
        """Whether `result` returns at once."""

    def result(self) -> Grammar:
        """The grammar. GrammarError: it is none."""

    def add_done_callback(self, fn: Callable[[Any], object], /) -> None:
        """Call `fn` on any thread when done, at once if it is."""

    def cancel(self) -> bool:
        """Nobody waits for it any more."""


class Grammars(Protocol):
    """Who compiles grammars for a model."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text. Asked for when a grammar is there."""

    def prepare(self) -> object:
        """Begin the next piece of what a first grammar would wait for; never waits."""

    def compile(self, spec: GrammarSpec) -> Compiling:
        """Begin to compile a grammar; never waits."""

    def fill(self, matchers: Sequence[Matcher], mask: NDArray[np.uint32], rows: Sequence[int]) -> None:
        """Let each matcher fill the row of the mask that is named in its place."""


class Guides:
    """All guides of an engine, and the requests that wait for one.

    `grammars` None: requests with a grammar are refused. It stays the caller's to close.
    """

    def __init__(self, vocab_size: int, grammars: Grammars | None = None) -> None:
        self._words, self._grammars = -(-vocab_size // 32), grammars
        self._held: dict[int, tuple[Request, Compiling]] = {}
        self._guides: dict[int, Guide] = {}
        self._found: dict[int, Extend] = {}  # by request: what the schedulers have not been told
        self._refused: list[Output] = []
        self._over: set[int] = set()  # whose end was told, and that the schedulers will end
        self._newest, self._late = 0, False  # of the batches that were launched: number, whether it waits
        self._waking = threading.Lock()  # a pipe that is closed is not written to: its number may be another file's
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)

    def prepare(self) -> None:
        """Begin the next piece of what a first request with a grammar would wait for; never waits."""
        if self._grammars is not None:
            self._grammars.prepare()

    def close(self) -> None:
        """Forget everything. Idempotent."""
        for _, compiling in self._held.values():
            compiling.cancel()
        self._held.clear()
        self._guides.clear()
        with self._waking:
            if self._wake_read >= 0:
                os.close(self._wake_read)
                os.close(self._wake_write)
                self._wake_read = self._wake_write = -1

    def compile(self, spec: GrammarSpec) -> Compiling:
        """Begin to compile a grammar; never waits. GrammarError if nobody can."""
        if self._grammars is None:
            raise GrammarError("this engine has no grammars")
        return self._grammars.compile(spec)

    # ---- at the border ----

    @property
    def holds(self) -> bool:
        """Whether a request waits for its grammar."""
        return bool(self._held)

    def fileno(self) -> int:
        """See `engine.intake.Gate`."""
        return self._wake_read

    def take(self, messages: list[ToEngine]) -> list[ToScheduler]:
        """See `engine.intake.Gate`."""
        passed: list[ToScheduler] = []
        for message in messages:
            if isinstance(message, Abort):
                self._forget(message.id)
                passed.append(message)
            elif message.grammar is not None:
                self._hold(message, message.grammar)
            else:
                if message.stopping.force_after > 0:
                    self._guides[message.id] = Guide(message, None, ())
                passed.append(message)
        if self._held:
            passed += self._compiled()
        if self._found:
            passed[:0] = self._found.values()
            self._found.clear()
        return passed

    def tell(self, outputs: list[Output]) -> list[Output]:
        """See `engine.intake.Gate`."""
        if self._guides or self._over:
            outputs = [told for output in outputs if (told := self._tell(output))]
        if self._refused:
            outputs, self._refused = self._refused + outputs, []
        return outputs

    def _tell(self, output: Output) -> Output | None:
        """The output; with its end, if the schedulers will be told next that the sequence ends behind its token; None
        if that was told."""
        request_id, found = output.request_id, self._found.get(output.request_id)
        if request_id in self._over:
            self._over.discard(request_id)
            return None
        if output.finish_reason:
            self._forget(request_id)
        elif found and found.finish_reason == "stop" and output.token_ids and not found.token_ids:
            self._over.add(request_id)
            self._guides.pop(request_id)
            return msgspec.structs.replace(output, finish_reason="stop")
        return output

    def _hold(self, request: Request, spec: GrammarSpec) -> None:
        try:
            compiling = self.compile(spec)
        except Exception as error:  # noqa: BLE001  it ends this request alone
            self._refuse(request.id, _why(error))
            return
        self._held[request.id] = request, compiling
        compiling.add_done_callback(self._wake)

    def _wake(self, _: object) -> None:
        with self._waking, suppress(OSError):  # full: it wakes anyhow; closed: nobody sleeps
            os.write(self._wake_write, b"\0")

    def _compiled(self) -> list[Request]:
        """The held requests that may go on; those whose grammar is none are refused."""
        assert self._grammars is not None
        with suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        ready = []
        for request_id, (request, compiling) in list(self._held.items()):
            if not compiling.done():
                continue
            del self._held[request_id]
            try:
                self._guides[request_id] = Guide(request, compiling.result().matcher(), self._grammars.end_ids)
            except Exception as error:  # noqa: BLE001  it ends this request alone
                self._refuse(request_id, _why(error))
            else:
                ready.append(request)
        return ready

    def _refuse(self, request_id: int, message: str) -> None:
        self._refused.append(Output(request_id, finish_reason="error", message=message))

    def _forget(self, request_id: int) -> None:
        self._guides.pop(request_id, None)
        self._found.pop(request_id, None)
        self._over.discard(request_id)
        if held := self._held.pop(request_id, None):
            held[1].cancel()

    # ---- at the executor ----

    def waits(self, batch: Batch) -> bool:
        """See `runtime.executor.Guiding`."""
        self._newest, self._late = batch.number, False
        if self._guides:
            self._late = any(guide.waits for _, guide in self._rows(batch))
        return self._late

    def masks(self, batch: Batch) -> Masks:
        """See `runtime.executor.Guiding`."""
        waiting = [(place, guide) for place, guide in self._rows(batch) if guide.waits]
        bits = np.zeros((len(waiting), self._words), np.uint32)
        asking = [row for row, (_, guide) in enumerate(waiting) if guide.asks_matcher]
        try:
            self._fill([(row, waiting[row][1]) for row in asking], bits)
        except Exception:  # noqa: BLE001  whose it is shows when each is asked alone
            self._fill_alone([(row, waiting[row][1]) for row in asking], bits)
        for row, (_, guide) in enumerate(waiting):
            if guide.ended:
                bits[row] = 0xFFFFFFFF
            elif found := guide.restrict(bits[row]):
                self._find(guide, found)
        return Masks(np.array([place for place, _ in waiting], np.int32), bits)

    def observe(self, batch: Batch, token_ids: list[int]) -> None:
        """See `runtime.executor.Guiding`."""
        if not self._guides:
            return
        for place, guide in self._rows(batch):
            if token_ids[place] < 0:  # its numbers are broken: it ends
                guide.ended = True
                continue
            try:
                found = guide.observe(token_ids[place], not self._late)
            except Exception as error:  # noqa: BLE001  it ends this request alone
                self._fail(guide, error)
                continue
            if found:
                self._find(guide, found)

    def _rows(self, batch: Batch) -> list[tuple[int, Guide]]:
        """The sampling rows, by their place among these, that have a guide and count."""
        guides, sequences, number = self._guides, batch.sequences, batch.number
        rows = []
        for place, row in enumerate(batch.samples.tolist()):
            guide = guides.get(sequences[row].id)
            if guide is not None and number >= guide.valid_from and not guide.ended:
                rows.append((place, guide))
        return rows

    def _fill(self, rows: list[tuple[int, Guide]], bits: NDArray[np.uint32]) -> None:
        if self._grammars is not None and rows:
            matchers = [guide.matcher for _, guide in rows if guide.matcher is not None]
            self._grammars.fill(matchers, bits, [row for row, _ in rows])

    def _fill_alone(self, rows: list[tuple[int, Guide]], bits: NDArray[np.uint32]) -> None:
        for row, guide in rows:
            try:
                bits[row] = 0
                self._fill([(row, guide)], bits)
            except Exception as error:  # noqa: BLE001  it ends this request alone
                self._fail(guide, error)

    def _find(self, guide: Guide, found: Extend) -> None:
        """The schedulers are told with the next messages; what is on the device by then does not count."""
        self._found[guide.id] = found
        guide.valid_from = self._newest + 1

    def _fail(self, guide: Guide, error: Exception) -> None:
        guide.ended = True
        self._find(guide, Extend(guide.id, guide.known, (), "error", _why(error)))


def _why(error: Exception) -> str:
    if isinstance(error, GrammarError | GenerationError):
        return str(error)
    _log.error("A grammar failed.", exc_info=error)
    return "the grammar that was asked for failed; the server's log says more"
