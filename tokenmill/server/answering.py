"""Generates the answer to prompts, and sends it as a stream of events or as one JSON object.

A handler passes prepared prompts and an `AnswerFormat`. Tokens arrive in `_Answer.token`, in the callback that read the
engine's frame. A stream encodes and sends them there; a whole answer collects them and is made at the end, of the same
tokens.
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
from tokenmill.server import access, failures, receipt, resume, sse
from tokenmill.server.call import Call, ClientGone
from tokenmill.server.generation import GeneratedToken, Generation, MeasuredGeneration, Timings
from tokenmill.text.answer_reader import PLAIN, AnswerReader
from tokenmill.text.prepare import Prepared
from tokenmill.wire.messages import Request

log = logging.getLogger(__name__)

_MAX_SEED = 2**64 - 1
_LONG_ANSWER = 2000
"""Tokens and alternatives of an answer that is made in a thread, so that streams do not wait for it."""


class AnswerFormat(Protocol):
    """The JSON objects of one API's answers."""

    def chunk(self, generation: Generation, token: GeneratedToken) -> bytes:
        """Return the event of one token, as JSON; b"" for no event. The last token always has one."""

    def closing(self, generations: Sequence[Generation]) -> bytes:
        """Return one more event after the last token of all sequences, as JSON; b"" for none."""

    def fold(self, generations: Sequence[Generation], tokens: Sequence[list[GeneratedToken]]) -> bytes:
        """Return the whole answer, as JSON: all chunks joined. `tokens[i]`: the tokens of `generations[i]`."""


class Prompts(msgspec.Struct, frozen=True):
    """The prompts of one call, in order. `copies`: sequences to generate for each (`n`, `best_of`).

    `keep_stop`: stop strings are part of the text. `readers`: one for each prompt, or none: all text is content.
    `receipt`: see `receipt.py`.
    """

    prepared: tuple[Prepared, ...]
    copies: int = 1
    keep_stop: bool = False
    num_characters: int = 0  # characters of all prompts that are text
    receipt: bool = False
    readers: tuple[AnswerReader, ...] = ()


class _Answer(ABC):
    """One answer under way: its running sequences, and how they end."""

    def __init__(self, call: Call, answer_format: AnswerFormat) -> None:
        self.call, self.answer_format = call, answer_format
        self.generations: list[Generation] = []
        call.generations = self.generations
        self.num_open = 0
        self.error: RequestError | None = None

    def submit(self, prompts: Prompts) -> None:
        """Send every sequence to the engine. Raises NotReady, ValidationError."""
        service = self.call.service
        resumed = resume.resumed_ids(self.call, len(prompts.prepared) * prompts.copies)
        model = service.ready().model
        kind = MeasuredGeneration if prompts.receipt else Generation
        for prompt_index, prepared in enumerate(prompts.prepared):
            service.requests.prepared(prepared)
            reader = prompts.readers[prompt_index] if prompts.readers else PLAIN
            for copy in range(prompts.copies):
                one = prepared if copy == 0 else _reseeded(prepared, copy)
                text, router = reader.begin(model.tokenizer, one, include_stop=prompts.keep_stop)
                generation = kind(
                    service.client.new_id(), one, text, self, Timings(self.call.arrived, time.monotonic()),
                    service.requests.gap, index=len(self.generations), prompt_index=prompt_index,
                    router=router,
                )  # fmt: skip
                self.generations.append(generation)
                self.num_open += 1
        for generation in self.generations:
            p = generation.prepared
            request = Request(
                generation.id, p.prompt_ids, p.sampling, p.stopping,
                wants_timings=prompts.receipt, sent_at=generation.timings.submitted, grammar=p.grammar,
                output_ids=resumed,
            )  # fmt: skip
            if not (resumed and generation.replay(resumed)):
                service.client.submit(request, generation)

    @abstractmethod
    def token(self, generation: Generation, token: GeneratedToken) -> None:
        """See `generation.Answer`."""

    @abstractmethod
    def failed(self, generation: Generation, error: RequestError) -> None:
        """See `generation.Answer`."""

    def finished(self, generation: Generation) -> bool:
        """Record a complete sequence; True if it was the last one."""
        self.call.service.requests.sequence(generation)
        self.num_open -= 1
        return self.num_open == 0

    def give_up(self) -> None:
        """Abort the sequences that still run."""
        for generation in self.generations:
            if not generation.finish:
                self.call.service.client.abort(generation.id)
        self.num_open = 0


class _WholeAnswer(_Answer):
    """An answer that is sent as a whole. Keeps tokens until all sequences are complete."""

    def __init__(self, call: Call, answer_format: AnswerFormat) -> None:
        super().__init__(call, answer_format)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.tokens: list[list[GeneratedToken]] = []

    def token(self, generation: Generation, token: GeneratedToken) -> None:
        """See `generation.Answer`."""
        self.tokens[generation.index].append(token)
        if token.finish and self.finished(generation) and not self.done.done():
            self.done.set_result(None)

    def failed(self, generation: Generation, error: RequestError) -> None:
        """See `generation.Answer`."""
        self.error = self.error or error
        if not self.done.done():
            self.done.set_result(None)


class _StreamedAnswer(_Answer):
    """An answer that is streamed. Sends each token in the callback that brought it."""

    def __init__(self, call: Call, answer_format: AnswerFormat, headers: sse.Headers, *, receipt: bool) -> None:
        super().__init__(call, answer_format)
        self.events = sse.EventStream(call.raw_send, headers)
        self._receipt = receipt
        self._marks = resume.Marks() if resume.wants_token_ids(call) else None
        self._end = sse.DONE if call.dialect == "openai" else b""

    def token(self, generation: Generation, token: GeneratedToken) -> None:
        """See `generation.Answer`."""
        chunk = self.answer_format.chunk(generation, token)
        if self._marks is not None:
            self._marks.add(token.id)
        if token.finish and self.finished(generation):
            self.events.end(self._mark() + self._last(chunk))
        elif chunk:
            self.events.write(self._mark() + sse.event(chunk))

    def _mark(self) -> bytes:
        """Return the line before the next event that has the ids of its tokens, if they were asked for."""
        return self._marks.line() if self._marks is not None else b""

    def _last(self, chunk: bytes) -> bytes:
        """Return the end of the stream, from the last token's chunk on."""
        payloads = [payload for payload in (chunk, self.answer_format.closing(self.generations)) if payload]
        if self._receipt:
            payloads[-1] = receipt.attach(payloads[-1], self.call, self.generations)
        return b"".join(map(sse.event, payloads)) + self._end

    def failed(self, generation: Generation, error: RequestError) -> None:
        """See `generation.Answer`. An error before the first event becomes an ordinary error answer."""
        if self.error is not None:
            return
        self.error = error
        if not self.events.started:
            self.events.close()
            return
        self.events.end(sse.event(failures.body(error, self.call.dialect)) + self._end)


async def stream(call: Call, prompts: Prompts, answer_format: AnswerFormat) -> None:
    """Generate, and send events. Raises an error that comes before the first event."""
    headers = [
        (b"x-compute-type", compute_type(call)),
        (b"x-compute-characters", b"%d" % prompts.num_characters),
        (b"x-accel-buffering", b"no"),
        *_truncation(prompts),
    ]
    answer = _StreamedAnswer(call, answer_format, headers, receipt=prompts.receipt)
    events = answer.events
    try:
        answer.submit(prompts)
        complete = await call.wait(events.done)
        if events.started:
            call.status = 200
        if events.overflowed:
            log.warning("A client read too slowly; its stream was cut off")
        if not complete or events.overflowed:
            raise ClientGone
    finally:
        answer.give_up()
        events.close()
    if answer.error is not None:
        if not events.started:
            raise answer.error
        call.service.requests.failure(answer.error)
        log.error("%s failed in the middle of a stream: %s", call.scope["path"], answer.error)
        return
    access.succeeded(call, answer.generations, prompts.copies)


async def fold(call: Call, prompts: Prompts, answer_format: AnswerFormat) -> None:
    """Generate everything, then answer. Raises the first error of any sequence."""
    answer = _WholeAnswer(call, answer_format)
    answer.tokens = [[] for _ in range(len(prompts.prepared) * prompts.copies)]
    try:
        answer.submit(prompts)
        if not await call.wait(answer.done):
            raise ClientGone
    finally:
        answer.give_up()
    if answer.error is not None:
        raise answer.error
    if sum(map(_num_entries, answer.generations)) > _LONG_ANSWER:  # up to a second of work
        body = await call.service.in_thread(lambda: answer_format.fold(answer.generations, answer.tokens))
    else:
        body = answer_format.fold(answer.generations, answer.tokens)
    if prompts.receipt:
        body = receipt.attach(body, call, answer.generations)
    await call.answer(body, plain_headers(call, prompts, answer.generations))
    access.succeeded(call, answer.generations, prompts.copies)


def _num_entries(generation: Generation) -> int:
    """Return how many tokens and alternatives an answer may show of a sequence."""
    sampling = generation.prepared.sampling
    of_prompt = len(generation.prompt_details) * (1 + max(sampling.prompt_logprobs, 0))
    return of_prompt + generation.num_generated * (1 + max(sampling.logprobs, 0))


def _reseeded(prepared: Prepared, copy: int) -> Prepared:
    """Return the prompt with the seed of its `copy`-th sequence. Greedy sequences are all equal."""
    if prepared.seed is None:
        return prepared
    seed = (prepared.seed + copy) & _MAX_SEED
    sampling = msgspec.structs.replace(prepared.sampling, seed=seed)
    return msgspec.structs.replace(prepared, sampling=sampling, seed=seed)


def compute_type(call: Call) -> bytes:
    """Return the `x-compute-type` header: as configured, or the number and kind of the devices."""
    configured = call.service.options.compute_type
    if configured:
        return configured.encode("latin-1", "replace")
    client, info = call.service.client, call.service.client.info
    return f"{client.num_engines * info.num_shard}-{info.device}".encode() if info else b"unknown"


def plain_headers(call: Call, prompts: Prompts, generations: Sequence[Generation]) -> sse.Headers:
    """Return TGI's headers of a whole answer. Times of several prompts are added; of several copies the first
    counts."""
    first = [g for g in generations if g.index % prompts.copies == 0]
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
    if len(prompts.prepared) == 1:
        headers.append((b"x-compute-time", f"{total:.6f}".encode()))
    headers.append((b"x-compute-characters", b"%d" % prompts.num_characters))
    headers.extend((name, b"%d" % int(seconds * 1000)) for name, seconds in values)
    headers.extend(_truncation(prompts))
    headers.append((b"x-prompt-tokens", b"%d" % sum(g.prepared.num_prompt for g in first)))
    headers.append((b"x-generated-tokens", b"%d" % generated))
    return headers


def _truncation(prompts: Prompts) -> sse.Headers:
    """Return the header with the number of tokens that `truncate` cut off the prompts, if any."""
    cut = sum(prepared.num_truncated for prepared in prompts.prepared)
    return [(b"x-truncated-tokens", b"%d" % cut)] if cut else []
