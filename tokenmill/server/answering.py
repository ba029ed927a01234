"""From submitted sequences to an answer, as a stream of events or as their fold.

A handler gives the prepared sequences and an `Answer`, which knows the shape. Tokens come from the engine's frame
straight into `token`: a stream encodes and sends them there, a plain answer keeps them and folds them at the end. So
both see the same tokens.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import msgspec

from tokenmill.errors import RequestError
from tokenmill.server import access, failures, receipt, sse
from tokenmill.server.call import Call, ClientGone
from tokenmill.server.generation import GeneratedToken, Generation, MeasuredGeneration, Timings
from tokenmill.text.answer_reader import PLAIN, AnswerReader
from tokenmill.text.prepare import Prepared
from tokenmill.wire.messages import Request

log = logging.getLogger(__name__)

_MAX_SEED = 2**64 - 1
_LONG_ANSWER = 2000
"""Tokens and alternatives from which an answer is put together in a thread, so that streams do not wait for it."""


class Answer(Protocol):
    """The shape of an answer."""

    def chunk(self, generation: Generation, token: GeneratedToken) -> bytes:
        """The JSON text of the event that one token makes; b"" if it makes none, which the last one always does."""

    def closing(self, generations: Sequence[Generation]) -> bytes:
        """The JSON text of one more event after the last token of all sequences; b"" if there is none."""

    def fold(self, generations: Sequence[Generation], tokens: Sequence[list[GeneratedToken]]) -> bytes:
        """The plain answer that all chunks together make. `tokens[i]` are the tokens of `generations[i]`."""


class Sequences(msgspec.Struct, frozen=True):
    """What to generate: prompts in order, each `copies` times (`n`, `best_of`).

    `keep_stop`: stop strings are part of the text. `readers`: one for each prompt, or none: all text is content.
    `receipt`: see `receipt.py`.
    """

    prompts: tuple[Prepared, ...]
    copies: int = 1
    keep_stop: bool = False
    num_characters: int = 0  # of all prompts, as text
    receipt: bool = False
    readers: tuple[AnswerReader, ...] = ()


class _Listener(ABC):
    """What streams and folds have in common: the sequences that run, and how they end."""

    def __init__(self, call: Call, answer: Answer) -> None:
        self.call, self.answer = call, answer
        self.generations: list[Generation] = []
        call.generations = self.generations
        self.num_open = 0
        self.error: RequestError | None = None

    def submit(self, sequences: Sequences) -> None:
        """Send every sequence to the engine. Raises NotReady."""
        service = self.call.service
        model, _, _ = service.ready()
        kind = MeasuredGeneration if sequences.receipt else Generation
        for prompt_index, prepared in enumerate(sequences.prompts):
            service.count_prepared(prepared)
            reader = sequences.readers[prompt_index] if sequences.readers else PLAIN
            for copy in range(sequences.copies):
                one = prepared if copy == 0 else _reseeded(prepared, copy)
                text, router = reader.begin(model.tokenizer, one, include_stop=sequences.keep_stop)
                generation = kind(
                    service.client.new_id(), one, text, self, Timings(self.call.arrived, time.monotonic()),
                    service.observe_gap, index=len(self.generations), prompt_index=prompt_index,
                    router=router,
                )  # fmt: skip
                self.generations.append(generation)
                self.num_open += 1
        for generation in self.generations:
            p = generation.prepared
            request = Request(
                generation.id, p.prompt_ids, p.sampling, p.stopping,
                wants_timings=sequences.receipt, sent_at=generation.timings.submitted, grammar=p.grammar,
            )  # fmt: skip
            service.client.submit(request, generation)

    @abstractmethod
    def token(self, generation: Generation, token: GeneratedToken) -> None:
        """See `generation.Listener`."""

    @abstractmethod
    def failed(self, generation: Generation, error: RequestError) -> None:
        """See `generation.Listener`."""

    def finished(self, generation: Generation) -> bool:
        """A sequence is complete; True if it was the last one."""
        self.call.service.count_sequence(generation)
        self.num_open -= 1
        return self.num_open == 0

    def give_up(self) -> None:
        """Abort what still runs."""
        for generation in self.generations:
            if not generation.finish:
                self.call.service.client.abort(generation.id)
        self.num_open = 0


class _Folded(_Listener):
    """Keeps tokens until all sequences are complete."""

    def __init__(self, call: Call, answer: Answer) -> None:
        super().__init__(call, answer)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.tokens: list[list[GeneratedToken]] = []

    def token(self, generation: Generation, token: GeneratedToken) -> None:
        """See `generation.Listener`."""
        self.tokens[generation.index].append(token)
        if token.finish and self.finished(generation) and not self.done.done():
            self.done.set_result(None)

    def failed(self, generation: Generation, error: RequestError) -> None:
        """See `generation.Listener`."""
        self.error = self.error or error
        if not self.done.done():
            self.done.set_result(None)


class _Streamed(_Listener):
    """Sends each token as it comes."""

    def __init__(self, call: Call, answer: Answer, headers: sse.Headers, *, receipt: bool) -> None:
        super().__init__(call, answer)
        self.events = sse.EventStream(call.raw_send, headers)
        self._receipt = receipt
        self._end = sse.DONE if call.dialect == "openai" else b""

    def token(self, generation: Generation, token: GeneratedToken) -> None:
        """See `generation.Listener`."""
        chunk = self.answer.chunk(generation, token)
        if token.finish and self.finished(generation):
            self.events.end(self._last(chunk))
        elif chunk:
            self.events.write(sse.event(chunk))

    def _last(self, chunk: bytes) -> bytes:
        """The end of the stream, from the last token's chunk on."""
        payloads = [payload for payload in (chunk, self.answer.closing(self.generations)) if payload]
        if self._receipt:
            payloads[-1] = receipt.attach(payloads[-1], self.call, self.generations)
        return b"".join(map(sse.event, payloads)) + self._end

    def failed(self, generation: Generation, error: RequestError) -> None:
        """See `generation.Listener`. Before the first event there is still time for an ordinary error answer."""
        if self.error is not None:
            return
        self.error = error
        if not self.events.started:
            self.events.close()
            return
        self.events.end(sse.event(failures.body(error, self.call.dialect)) + self._end)


async def stream(call: Call, sequences: Sequences, answer: Answer) -> None:
    """Generate and send events. Raises the error if there was one before the first event."""
    headers = [
        (b"x-compute-type", compute_type(call)),
        (b"x-compute-characters", b"%d" % sequences.num_characters),
        (b"x-accel-buffering", b"no"),
        *_truncation(sequences),
    ]
    listener = _Streamed(call, answer, headers, receipt=sequences.receipt)
    events = listener.events
    try:
        listener.submit(sequences)
        complete = await call.wait(events.done)
        if events.started:
            call.status = 200
        if events.overflowed:
            log.warning("A client read too slowly; its stream was cut off")
        if not complete or events.overflowed:
            raise ClientGone
    finally:
        listener.give_up()
        events.close()
    if listener.error is not None:
        if not events.started:
            raise listener.error
        call.service.count_failure(listener.error)
        log.error("%s failed in the middle of a stream: %s", call.scope["path"], listener.error)
        return
    access.succeeded(call, listener.generations, sequences.copies)


async def fold(call: Call, sequences: Sequences, answer: Answer) -> None:
    """Generate everything, then answer. Raises the first error of any sequence."""
    listener = _Folded(call, answer)
    listener.tokens = [[] for _ in range(len(sequences.prompts) * sequences.copies)]
    try:
        listener.submit(sequences)
        if not await call.wait(listener.done):
            raise ClientGone
    finally:
        listener.give_up()
    if listener.error is not None:
        raise listener.error
    if sum(map(_num_entries, listener.generations)) > _LONG_ANSWER:  # a second of work for the longest ones
        body = await call.service.in_thread(lambda: answer.fold(listener.generations, listener.tokens))
    else:
        body = answer.fold(listener.generations, listener.tokens)
    if sequences.receipt:
        body = receipt.attach(body, call, listener.generations)
    await call.answer(body, plain_headers(call, sequences, listener.generations))
    access.succeeded(call, listener.generations, sequences.copies)


def _num_entries(generation: Generation) -> int:
    """Tokens and alternatives that an answer may show of a sequence."""
    sampling = generation.prepared.sampling
    of_prompt = len(generation.prompt_details) * (1 + max(sampling.prompt_logprobs, 0))
    return of_prompt + generation.num_generated * (1 + max(sampling.logprobs, 0))


def _reseeded(prepared: Prepared, copy: int) -> Prepared:
    """The `copy`-th sibling of a sampled sequence: the same but for its randomness. Greedy ones are all alike."""
    if prepared.seed is None:
        return prepared
    seed = (prepared.seed + copy) & _MAX_SEED
    sampling = msgspec.structs.replace(prepared.sampling, seed=seed)
    return msgspec.structs.replace(prepared, sampling=sampling, seed=seed)


def compute_type(call: Call) -> bytes:
    """The `x-compute-type` header: as configured, else number and kind of the devices."""
    configured = call.service.options.compute_type
    if configured:
        return configured.encode("latin-1", "replace")
    info = call.service.client.info
    return f"{info.num_shard}-{info.device}".encode() if info else b"unknown"


def plain_headers(call: Call, sequences: Sequences, generations: Sequence[Generation]) -> sse.Headers:
    """TGI's headers of a plain answer. Times of several prompts add up; of several copies the first counts."""
    first = [g for g in generations if g.index % sequences.copies == 0]
    total = sum(g.timings.last - g.timings.arrived for g in first)
    inference = sum(g.timings.last - g.timings.admitted for g in first)
    generated = sum(g.num_generated for g in first)
    values = (
        (b"x-total-time", total),
        (b"x-validation-time", sum(g.timings.submitted - g.timings.arrived for g in first)),
        (b"x-queue-time", sum(g.timings.admitted - g.timings.submitted for g in first)),
        (b"x-inference-time", inference),
        (b"x-time-per-token", inference / generated if generated else 0.0),
    )
    headers = [(b"x-compute-type", compute_type(call))]
    if len(sequences.prompts) == 1:
        headers.append((b"x-compute-time", f"{total:.6f}".encode()))
    headers.append((b"x-compute-characters", b"%d" % sequences.num_characters))
    headers.extend((name, b"%d" % int(seconds * 1000)) for name, seconds in values)
    headers.extend(_truncation(sequences))
    headers.append((b"x-prompt-tokens", b"%d" % sum(g.prepared.num_prompt for g in first)))
    headers.append((b"x-generated-tokens", b"%d" % generated))
    return headers


def _truncation(sequences: Sequences) -> sse.Headers:
    """Says how many tokens `truncate` cut off the prompts, if it did."""
    cut = sum(prepared.num_truncated for prepared in sequences.prompts)
    return [(b"x-truncated-tokens", b"%d" % cut)] if cut else []
