"""A model's grammars, as an engine gets them: compiled by a pool of processes, masks filled on several threads.

Reading the tokenizer and handing it to a grammar library takes a second or two for a large vocabulary, and holds
Python's lock for most of that. So it is done when a first grammar is wanted, or before, piece by piece, by `prepare`,
which is to be called while nobody waits for an answer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import GrammarError
from tokenmill.grammar.base import Backend, Encode, Grammar, MaskFiller, Matcher, Vocabulary
from tokenmill.grammar.pool import CompilePool
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.weights.source import ModelSource
from tokenmill.wire.messages import GrammarSpec

_MOST_THREADS = 8
"""That fill masks: with 256 rows of 50 µs each, more would not shorten a step any more."""

_log = logging.getLogger(__name__)


class _Parts(NamedTuple):
    """What is there when the tokenizer was read."""

    backend: Backend
    pool: CompilePool
    filler: MaskFiller


class ModelGrammars:
    """`runtime.constraints.Grammars` of a model on disk.

    `size`: of its logits. `cpus`: that may be used. Every method but `compile` is called
    when a grammar was compiled.
    """

    def __init__(self, source: ModelSource, size: int, cpus: int = 1) -> None:
        self._source, self._size = source, size
        self._threads = max(1, min(cpus, _MOST_THREADS))
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._made: Future[_Parts] = Future()
        self._pieces = self._make()
        self._piece: Future[None] | None = None
        self._hurried = False

    def prepare(self) -> None:
        """Begin the next piece of what a first grammar would wait for, if none is being done; never waits."""
        if not self._hurried and (self._piece is None or self._piece.done()):
            self._piece = self._executor.submit(self._go_on, 1)

    def start(self) -> Future[_Parts]:
        """Begin with all that is left of it. Idempotent; never waits."""
        if not self._hurried:
            self._hurried = True
            self._executor.submit(self._go_on, None)
        return self._made

    @property
    def _parts(self) -> _Parts:
        return self.start().result()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return self._parts.backend.vocabulary.end_ids

    def compile(self, spec: GrammarSpec) -> Future[Grammar]:
        """Begin to compile a grammar; never waits. The future fails with GrammarError, or whatever went wrong."""
        if self.start().done():
            return self._parts.pool.submit(spec)
        found: Future[Grammar] = Future()
        self._made.add_done_callback(lambda _: self._submit(spec, found))
        return found

    def fill(self, matchers: Sequence[Matcher], mask: NDArray[np.uint32], rows: Sequence[int]) -> None:
        """Each matcher's row of the mask, all at once."""
        self._parts.filler.fill(list(zip(matchers, rows, strict=True)), mask)

    def close(self) -> None:
        """End the processes. Idempotent; blocks until they have ended."""
        self._hurried = True
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._made.cancel()  # if it is not there yet, it never will be
        if not self._made.cancelled() and self._made.exception() is None:
            self._made.result().pool.close()

    def _go_on(self, most: int | None) -> None:
        """Do so many pieces. Whatever goes wrong in one is told to whoever waits for the last."""
        try:
            for made in islice(self._pieces, most):
                if made is not None:
                    self._made.set_result(made)
        except Exception as error:  # noqa: BLE001  who asks for a grammar is told
            _log.error("Requests with a grammar are refused: %s", error)
            self._made.set_exception(error)

    def _make(self) -> Iterator[_Parts | None]:
        """Yield what a grammar needs, after None for each piece of the way there: half a second of this process each,
        in which a request that comes must wait."""
        from tokenmill.grammar.llguidance import LLGuidance

        tokenizer = Tokenizer.load(self._source)
        if not any(token_id < self._size for token_id in tokenizer.eos_ids):
            raise GrammarError("this model has no token that ends an answer, so no grammar can be followed")
        yield None
        backend = LLGuidance(vocabulary_of(tokenizer, self._size), _encode_of(tokenizer))
        yield None
        pool = CompilePool(backend, awaited=self._hurried)
        yield _Parts(backend, pool, backend.filler(self._threads))

    def _submit(self, spec: GrammarSpec, found: Future[Grammar]) -> None:
        """Let `found` become what the pool gives."""
        try:
            self._parts.pool.submit(spec).add_done_callback(lambda given: _copy(given, found))
        except BaseException as error:  # noqa: BLE001  who waits for it is told
            if found.set_running_or_notify_cancel():
                found.set_exception(error)


def vocabulary_of(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """What a grammar needs of a tokenizer whose model has so many logits."""
    return Vocabulary.of(
        tokenizer.token_bytes, tokenizer.vocab_size, size, tokenizer.eos_ids, sorted(tokenizer.special_ids)
    )


def _encode_of(tokenizer: Tokenizer) -> Encode:
    return lambda text: tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False)


def _copy(given: Future[Grammar], found: Future[Grammar]) -> None:
    if not found.set_running_or_notify_cancel():
        return
    if (error := given.exception()) is not None:
        found.set_exception(error)
    else:
        found.set_result(given.result())
