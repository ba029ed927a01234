"""Per-request timings, recorded at the link for requests that ask for them.

The loop and the scheduler have no code for timings, and other requests cost nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from tokenmill.engine.engine import Link
from tokenmill.engine.scheduler import Scheduler
from tokenmill.wire.messages import Extend, Output, Request, RequestTimings, Stats, ToScheduler


class _Run:
    """Times and counts of one request. Times are clock values in seconds; None: not reached yet."""

    __slots__ = ("arrived", "began", "first", "largest_batch", "num_cached", "num_forced")

    def __init__(self, arrived: float) -> None:
        self.arrived = arrived
        self.began: float | None = None
        self.first: float | None = None
        self.num_cached = self.largest_batch = self.num_forced = 0


class Timed:
    """Link around `inner` that adds `RequestTimings` to every output with tokens whose request asked for them.

    `scheduler`: the engine's; only read. `clock`: the clock of `Request.sent_at`. The time of a step's tokens is that
    of the call of `send`.
    """

    def __init__(self, inner: Link, scheduler: Scheduler, clock: Callable[[], float] = time.monotonic) -> None:
        self._inner, self._scheduler, self._clock = inner, scheduler, clock
        self._runs: dict[int, _Run] = {}  # unfinished requests with timings
        self._in_step: list[_Run] = []  # runs in the planned step whose outputs are sent next

    def receive(self, block: bool, plan: bytes = b"") -> Sequence[ToScheduler]:
        """See `engine.Link`."""
        messages = self._inner.receive(block, plan)
        for message in messages:
            if isinstance(message, Request):
                if message.wants_timings:
                    self._runs[message.id] = _Run(message.sent_at or self._clock())
            elif isinstance(message, Extend):
                if run := self._runs.get(message.id):
                    run.num_forced += len(message.token_ids)
            else:
                self._runs.pop(message.id, None)
        return messages

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """See `engine.Link`."""
        if self._runs:
            now = self._clock()
            for run in self._in_step:
                run.largest_batch = max(run.largest_batch, stats.batch_size)
            outputs = [self._with_timings(output, now) for output in outputs]
            running = self._scheduler.running
            self._in_step = [run for request_id, run in self._runs.items() if request_id in running]
        self._inner.send(outputs, stats)

    def _with_timings(self, output: Output, now: float) -> Output:
        """Return `output` with the timings of its request, if the request has timings and the output has tokens."""
        run = self._runs.get(output.request_id)
        if run is None:
            return output
        if output.finish_reason:
            del self._runs[output.request_id]
        if run.began is None:  # admission: its first step starts now, as the previous one has just ended
            run.began, run.num_cached = now, output.num_cached
        if not output.token_ids:
            return output
        if run.first is None:
            run.first = now
        timings = RequestTimings(
            run.began - run.arrived,
            run.first - run.began,
            now - run.first,
            run.num_cached,
            self._num_preemptions(output),
            run.largest_batch,
            run.num_forced,
        )
        return msgspec.structs.replace(output, timings=timings)

    def _num_preemptions(self, output: Output) -> int:
        if output.finish_reason:
            return output.num_preemptions
        scheduler = self._scheduler
        seq = scheduler.running.get(output.request_id) or scheduler.waiting.get(output.request_id)
        return seq.num_preemptions if seq else 0
