"""Generation: one sequence on its way from the engine to a client, as text.

It detokenizes, finds stop strings, splits thoughts and calls from the text if it has a router, records times for
headers, logs and metrics, and passes each token to its answer. All of it runs in the callback that read the engine's
frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import msgspec

from tokenmill.errors import GenerationError, GrammarError, RequestError
from tokenmill.text.detokenizer import Detokenizer, Piece
from tokenmill.text.prepare import Prepared
from tokenmill.text.router import Delta, Router, fold
from tokenmill.wire.messages import Output, RequestTimings, TokenDetails

Finish = Literal["", "eos", "stop", "length"]


class GeneratedToken(msgspec.Struct, gc=False):
    """One token of the answer. `text`: its part of the answer; `token_text`: its own text.

    The last token's `text` ends with everything that was held back. `finish`: "eos" an end-of-sequence id, "stop" a
    stop string or the last call that an answer may have, "length"; "" for all but the last token. `read`: `text` as its
    router split it, if there is one.
    """

    index: int  # counted from 1
    id: int
    text: str
    token_text: str
    special: bool
    finish: Finish
    details: TokenDetails | None
    read: Delta | None = None


class Timings(msgspec.Struct):
    """Times of a request's events, in monotonic seconds; 0.0: not yet."""

    arrived: float
    submitted: float = 0.0
    admitted: float = 0.0
    first: float = 0.0
    last: float = 0.0


class Answer(Protocol):
    """Answer that a generation is part of. Called from the event loop; must not block."""

    def token(self, generation: Generation, token: GeneratedToken) -> None:
        """Take the next token, in order."""

    def failed(self, generation: Generation, error: RequestError) -> None:
        """Take an error: no more tokens and no result will come."""


class Generation:
    """One sequence. `index`: the choice of the answer that it is; `observe_gap`: takes the seconds between two tokens;
    `router`: splits the text, and finds stop strings instead of the detokenizer."""

    __slots__ = (
        "_answer", "_observe_gap", "detokenizer", "engine", "engine_timings", "finish", "id", "index", "num_cached",
        "num_moves", "num_reasoning", "prepared", "prompt_details", "prompt_index", "router", "sum_logprobs",
        "timings", "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        request_id: int,
        prepared: Prepared,
        detokenizer: Detokenizer,
        answer: Answer,
        timings: Timings,
        observe_gap: Callable[[float], None],
        *,
        index: int = 0,
        prompt_index: int = 0,
        router: Router | None = None,
    ) -> None:
        self.id, self.prepared, self.detokenizer = request_id, prepared, detokenizer
        self._answer, self.timings, self._observe_gap = answer, timings, observe_gap
        self.index, self.prompt_index = index, prompt_index
        self.finish: Finish = ""
        self.router = router
        self.token_ids: list[int] = []
        self.num_reasoning = 0  # tokens of thoughts
        self.engine = 0  # number of the engine that generates
        self.num_moves = 0  # engines that stopped before
        self.num_cached = 0
        self.sum_logprobs = 0.0
        self.prompt_details: list[TokenDetails] = []
        self.engine_timings: RequestTimings | None = None  # if asked for

    @property
    def text(self) -> str:
        """The answer so far."""
        return self.detokenizer.text

    @property
    def num_generated(self) -> int:
        """Number of tokens so far."""
        return len(self.token_ids)

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability, by which the best of several sequences is chosen."""
        return self.sum_logprobs / self.num_generated if self.num_generated else float("-inf")

    def push(self, output: Output, now: float) -> bool:
        """Take one output, which came at `now` (monotonic seconds); True if the sequence is over."""
        times = self.timings
        if output.payload is not None:
            self.prompt_details.extend(output.payload.after(len(self.prompt_details)))
        if output.finish_reason == "error":
            self.fail(self._error(output))
            return True
        if not times.admitted:
            times.admitted = now
            self.num_cached = output.num_cached
        if output.token_ids:
            if times.last:
                self._observe_gap(now - times.last)
            else:
                times.first = now
            times.last = now
            for position, token_id in enumerate(output.token_ids):
                if self._take(token_id, output, position):
                    return True
        if output.finish_reason:  # without a token: nothing was left to generate
            self.fail(GenerationError("Server error: the sequence ended without a last token"))
            return True
        return False

    def replay(self, token_ids: tuple[int, ...]) -> bool:
        """Take the first tokens of the answer, from an engine that has stopped, before any output; True if the sequence
        is over with them. They have no details."""
        stopping, times = self.prepared.stopping, self.timings
        over = len(token_ids) >= stopping.max_new_tokens
        reason = "stop" if token_ids[-1] in stopping.stop_ids else "length" if over else ""
        output = Output(self.id, token_ids, finish_reason=reason)
        for position, token_id in enumerate(token_ids):
            if position + 1 == len(token_ids) and reason:
                times.admitted = times.first = times.last = times.submitted
            if self._take(token_id, output, position):
                return True
        return False

    def _error(self, output: Output) -> RequestError:
        """Return the error of an output. A request waits for its grammar before it is admitted, so an error before that
        is the grammar's."""
        if self.prepared.grammar is not None and not self.timings.admitted:
            return GrammarError(output.message, self.prepared.grammar_field)
        return GenerationError(f"Server error: {output.message or 'the engine gave up on the request'}")

    def fail(self, error: RequestError) -> None:
        """End the sequence without a result."""
        self._answer.failed(self, error)

    def resume(self) -> None:
        """Record that the engine has stopped, and that another one goes on behind the tokens so far."""
        self.num_moves += 1

    def _take(self, token_id: int, output: Output, position: int) -> bool:
        """Pass on the `position`-th token of `output`; True if it is the last."""
        piece = self.detokenizer.push(token_id)
        details = output.details[position] if output.details else None
        if details is not None:
            self.sum_logprobs += details.logprob
        self.token_ids.append(token_id)
        finish: Finish = ""
        text = piece.text
        read = self._read(piece) if self.router is not None else None
        if output.finish_reason == "stop" and position == len(output.token_ids) - 1:
            finish = "eos"
        elif piece.stopped is not None or (self.router is not None and self.router.over):
            finish = "stop"
        elif output.finish_reason and position == len(output.token_ids) - 1:
            finish = "length"
        if finish:
            text += self.detokenizer.finish()
            if self.router is not None and read is not None:
                read = fold((read, self.router.finish()))
                finish = "stop" if finish == "length" and self.router.over else finish
            self.finish = finish
        token = GeneratedToken(
            self.num_generated, token_id, text, piece.token_text, piece.special, finish, details, read
        )
        self._answer.token(self, token)
        return bool(finish)

    def _read(self, piece: Piece) -> Delta:
        """Return a token's text as the router splits it, and count it if it belongs to a thought."""
        assert self.router is not None
        read = self.router.push(piece.text, "" if piece.text else piece.token_text)
        if read.reasoning or self.router.in_reasoning:
            self.num_reasoning += 1
        return read


class MeasuredGeneration(Generation):
    """Generation whose request asked for timings; it keeps the newest, with those of engines that stopped added. A
    separate class, so that others do not pay for it."""

    __slots__ = ("_earlier",)

    def push(self, output: Output, now: float) -> bool:
        """See `Generation.push`."""
        if output.timings is not None:
            self.engine_timings = _added(self._earlier, output.timings) if self.num_moves else output.timings
        return super().push(output, now)

    def resume(self) -> None:
        """See `Generation.resume`."""
        super().resume()
        self._earlier = self.engine_timings or RequestTimings()


def _added(earlier: RequestTimings, newest: RequestTimings) -> RequestTimings:
    """Return the timings of a request that two engines have worked on, one after the other."""
    return RequestTimings(
        earlier.queue_s + newest.queue_s,
        earlier.prefill_s + newest.prefill_s,
        earlier.decode_s + newest.decode_s,
        newest.num_cached,
        earlier.num_preemptions + newest.num_preemptions,
        max(earlier.largest_batch, newest.largest_batch),
        earlier.num_forced + newest.num_forced,
    )
