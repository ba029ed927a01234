"""Grammars of a model: compiled by a pool of processes; their masks are filled on several threads.

Loading the tokenizer into the grammar library takes a second or two for a large vocabulary, most of it with Python's
global lock held. So it is done at the first grammar, or earlier and in units by `prepare`, which should be called while
the engine is idle.
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
from tokenmill.text.load import load_tokenizer
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.weights.source import ModelSource
from tokenmill.wire.messages import GrammarSpec

_MAX_THREADS = 8
"""Maximum threads that fill masks: with 256 rows of 50 µs each, more would not shorten a step."""

_log = logging.getLogger(__name__)


class _Parts(NamedTuple):
    """Objects that exist once the tokenizer is loaded."""

    backend: Backend
    pool: CompilePool
    filler: MaskFiller


class ModelGrammars:
    """Implementation of `runtime.constraints.Grammars` for a model on disk.

    `size`: number of logits. `cpus`: CPUs that may be used. Before the first grammar is compiled, `end_ids` and `fill`
    block until the tokenizer is loaded.
    """

    def __init__(self, source: ModelSource, size: int, cpus: int = 1) -> None:
        self._source, self._size = source, size
        self._threads = max(1, min(cpus, _MAX_THREADS))
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._parts_future: Future[_Parts] = Future()
        self._units = self._build()
        self._unit: Future[None] | None = None
        self._all_submitted = False

    def prepare(self) -> None:
        """See `runtime.constraints.Grammars`. Do nothing while a unit is running."""
        if not self._all_submitted and (self._unit is None or self._unit.done()):
            self._unit = self._executor.submit(self._run_units, 1)

    def start(self) -> Future[_Parts]:
        """Start all the remaining one-time work. Idempotent; does not block."""
        if not self._all_submitted:
            self._all_submitted = True
            self._executor.submit(self._run_units, None)
        return self._parts_future

    @property
    def _parts(self) -> _Parts:
        return self.start().result()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return self._parts.backend.vocabulary.end_ids

    def compile(self, spec: GrammarSpec) -> Future[Grammar]:
        """Start to compile a grammar. Does not block.

        The future fails with GrammarError, or with any error of the one-time work.
        """
        if self.start().done():
            return self._parts.pool.submit(spec)
        target: Future[Grammar] = Future()
        self._parts_future.add_done_callback(lambda _: self._submit_to_pool(spec, target))
        return target

    def fill(self, matchers: Sequence[Matcher], mask: NDArray[np.uint32], rows: Sequence[int]) -> None:
        """See `runtime.constraints.Grammars`. Rows are filled in parallel."""
        self._parts.filler.fill(list(zip(matchers, rows, strict=True)), mask)

    def close(self) -> None:
        """End the compiling processes and wait until they have ended. Idempotent."""
        self._all_submitted = True
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._parts_future.cancel()  # has no effect if it is done
        if not self._parts_future.cancelled() and self._parts_future.exception() is None:
            self._parts_future.result().pool.close()

    def _run_units(self, limit: int | None) -> None:
        """Run at most `limit` units, all if None. An error fails the future of the parts."""
        try:
            for parts in islice(self._units, limit):
                if parts is not None:
                    self._parts_future.set_result(parts)
        except Exception as error:  # noqa: BLE001  each request with a grammar gets the error
            _log.error("Requests with a grammar are refused: %s", error)
            self._parts_future.set_exception(error)

    def _build(self) -> Iterator[_Parts | None]:
        """Do the one-time work: yield None after each unit but the last, then the parts.

        A unit takes about half a second, in which a request that arrives must wait.
        """
        from tokenmill.grammar.llguidance import LLGuidance

        tokenizer = load_tokenizer(self._source)
        if not any(token_id < self._size for token_id in tokenizer.grammar_end_ids):
            raise GrammarError("this model has no token that ends an answer, so no grammar can be followed")
        yield None
        backend = LLGuidance(vocabulary_of(tokenizer, self._size), _encode_of(tokenizer))
        yield None
        pool = CompilePool(backend, awaited=self._all_submitted)
        yield _Parts(backend, pool, backend.filler(self._threads))

    def _submit_to_pool(self, spec: GrammarSpec, target: Future[Grammar]) -> None:
        """Compile a grammar in the pool; its result or error becomes that of `target`."""
        try:
            self._parts.pool.submit(spec).add_done_callback(lambda source: _copy_result(source, target))
        except BaseException as error:  # noqa: BLE001  it becomes the result of the future
            if target.set_running_or_notify_cancel():
                target.set_exception(error)


def vocabulary_of(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer, for a model with `size` logits."""
    return Vocabulary.of(
        tokenizer.token_bytes, tokenizer.vocab_size, size, tokenizer.grammar_end_ids, sorted(tokenizer.special_ids)
    )


def _encode_of(tokenizer: Tokenizer) -> Encode:
    return lambda text: tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False)


def _copy_result(source: Future[Grammar], target: Future[Grammar]) -> None:
    if not target.set_running_or_notify_cancel():
        return
    if (error := source.exception()) is not None:
        target.set_exception(error)
    else:
        target.set_result(source.result())
