"""Executor without a model: scripted tokens, a fixed time per step, faults on demand.

Engine, scheduler and sockets are those of a real model, so tests of clients and benchmarks of the front end run against
the real server.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

from tokenmill.backends.base import StepResult
from tokenmill.engine.sequence import Batch, Sequence
from tokenmill.errors import ArgumentError
from tokenmill.wire.messages import Payload, PromptDetails, TokenDetails

FAULTS = ("raise", "nan", "hang", "exit")

_LOGPROB = -0.25  # of every scripted token
_NEXT_LOGPROB = -2.5  # of the likeliest other one; each further one is a unit less likely


@dataclass(frozen=True, slots=True)
class MockStep:
    """A launched step. `ready_at`: its end, in time.monotonic() seconds."""

    number: int
    ready_at: float
    result: StepResult


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault to inject. `kind`: one of `FAULTS`. `step`: number of the step, from 1. `rank`: None for every rank."""

    kind: str
    step: int
    rank: int | None = None


def parse_faults(text: str) -> tuple[Fault, ...]:
    """Parse faults such as `"nan@5,raise@100,hang@7:1"`, the last one on rank 1 only.

    nan: the logits of a row are not finite; raise: an exception; hang: block for ever; exit: kill the process. Raise
    ArgumentError if the text is invalid.
    """
    faults = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, _, when = part.partition("@")
        step, colon, rank = when.partition(":")
        if kind not in FAULTS or not step.isdecimal() or int(step) < 1 or rank.isdecimal() != bool(colon):
            raise ArgumentError(
                f"The mock fault {part!r} is not understood. Allowed: one of {', '.join(FAULTS)}, then @ and the "
                "number of a step from 1, as in nan@5, or hang@5:1 for rank 1 only; several with commas between."
            )
        faults.append(Fault(kind, int(step), int(rank) if rank else None))
    return tuple(faults)


class MockExecutor:
    """Executor whose k-th new token of every sequence is the k-th of `script_ids`.

    After the script comes the first stop id of the request, if it has one and may stop; otherwise the script begins
    again. A step takes `step_s` seconds, plus `token_s` for each of its tokens. Steps run one after another, as on a
    device.
    """

    def __init__(
        self,
        script_ids: tuple[int, ...],
        *,
        step_s: float = 0.0,
        token_s: float = 0.0,
        vocab_size: int = 32000,
        faults: tuple[Fault, ...] = (),
        rank: int = 0,
    ) -> None:
        if not script_ids:
            raise ArgumentError("The mock engine's text is empty: give at least one token.")
        self._script = script_ids
        self._step_s, self._token_s = step_s, token_s
        self._vocab_size = vocab_size
        self._fault_at = {fault.step: fault.kind for fault in faults if fault.rank in (None, rank)}
        self._num_steps = 0
        self._free_at = 0.0

    def launch(self, batch: Batch) -> MockStep:
        """See `engine.Executor`."""
        self._num_steps += 1
        begin = max(time.monotonic(), self._free_at)
        self._free_at = begin + self._step_s + self._token_s * batch.num_tokens
        return MockStep(self._num_steps, self._free_at, self._result(batch))

    def complete(self, step: MockStep) -> None:
        """See `engine.Executor`."""

    def collect(self, step: MockStep) -> StepResult:
        """See `engine.Executor`."""
        if (left := step.ready_at - time.monotonic()) > 0:
            time.sleep(left)
        match self._fault_at.get(step.number):
            case "raise":
                raise RuntimeError(f"mock fault at step {step.number}")
            case "hang":
                while True:
                    time.sleep(3600)
            case "exit":
                os.kill(os.getpid(), signal.SIGKILL)
            case "nan" if step.result.token_ids:
                return StepResult([-1, *step.result.token_ids[1:]], step.result.details, step.result.payloads)
        return step.result

    def idle_work(self) -> bool:
        """See `engine.Executor`."""
        return False

    def _result(self, batch: Batch) -> StepResult:
        rows = batch.samples.tolist()
        ends = (batch.starts + batch.counts)[batch.samples].tolist()
        sequences = [batch.sequences[row] for row in rows]
        token_ids = [
            self._token(seq, end - len(seq.request.prompt_ids)) for seq, end in zip(sequences, ends, strict=True)
        ]
        details: list[TokenDetails | None] | None = None
        if any(seq.request.sampling.logprobs >= 0 for seq in sequences):
            details = [
                self._details(token_id, seq.request.sampling.logprobs)
                for token_id, seq in zip(token_ids, sequences, strict=True)
            ]
        return StepResult(token_ids, details, self._payloads(batch) or None)

    def _token(self, seq: Sequence, index: int) -> int:
        stopping = seq.request.stopping
        if index >= max(len(self._script), stopping.min_new_tokens) and stopping.stop_ids:
            return stopping.stop_ids[0]
        return self._script[index % len(self._script)]

    def _details(self, token_id: int, count: int) -> TokenDetails | None:
        """Return details in which `token_id` is the likeliest token, followed by the next ids of the vocabulary."""
        if count < 0:
            return None
        top_ids = tuple((token_id + index) % self._vocab_size for index in range(min(count, self._vocab_size)))
        logprobs = (_LOGPROB, *(_NEXT_LOGPROB - index for index in range(count - 1)))
        return TokenDetails(_LOGPROB, top_ids, logprobs[: len(top_ids)])

    def _payloads(self, batch: Batch) -> dict[int, Payload]:
        if not batch.num_prefill_rows and not batch.admitted:
            return {}
        payloads: dict[int, Payload] = {}
        for row, seq in enumerate(batch.sequences):
            count = seq.request.sampling.prompt_logprobs
            start = int(batch.starts[row]) + 1
            own = seq.request.prompt_ids[start : start + int(batch.counts[row])]
            if count >= 0 and own:
                details = (self._details(token_id, count) for token_id in own)
                payloads[row] = PromptDetails(start, tuple(filter(None, details)))
        return payloads
