"""What single requests ask to know of their own run: measured around the engine, at the link, so that neither the loop
nor the scheduler knows of it, and the requests that did not ask pay nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from tokenmill.engine.engine import Link
from tokenmill.engine.scheduler import Scheduler
from tokenmill.wire.messages import Extend, Facts, Output, Request, Stats, ToScheduler


class _Run:
    """One request's times in seconds, None: not yet; and what else is counted."""

    __slots__ = ("arrived", "began", "first", "largest_batch", "num_cached", "num_forced")

    def __init__(self, arrived: float) -> None:
        self.arrived = arrived
        self.began: float | None = None
        self.first: float | None = None
        self.num_cached = self.largest_batch = self.num_forced = 0


class FactsLink:
    """The link of rank 0, through which every output with tokens gets `Facts` if its request wants them.

    `scheduler` is the engine's and only read. A step's tokens are taken as made when `send` is called. `clock` is
    that of `Request.sent_at`.
    """

    def __init__(self, link: Link, scheduler: Scheduler, clock: Callable[[], float] = time.monotonic) -> None:
        self._link, self._scheduler, self._clock = link, scheduler, clock
        self._runs: dict[int, _Run] = {}  # of the requests that asked and have not ended
        self._in_step: list[_Run] = []  # those that ran when the step was planned that is told of next

    def receive(self, block: bool, plan: bytes = b"") -> list[ToScheduler]:
        """See `engine.Link`."""
        messages = self._link.receive(block, plan)
        for message in messages:
            if isinstance(message, Request):
                if message.wants_facts:
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
            outputs = [self._complete(output, now) for output in outputs]
            running = self._scheduler.running
            self._in_step = [run for request_id, run in self._runs.items() if request_id in running]
        self._link.send(outputs, stats)

    def _complete(self, output: Output, now: float) -> Output:
        """`output` with its request's facts, if it asked and there are tokens."""
        run = self._runs.get(output.request_id)
        if run is None:
            return output
        if output.finish_reason:
            del self._runs[output.request_id]
        if run.began is None:  # the step before the one that it joined has just ended, if there was one
            run.began, run.num_cached = now, output.num_cached
        if not output.token_ids:
            return output
        if run.first is None:
            run.first = now
        facts = Facts(
            run.began - run.arrived,
            run.first - run.began,
            now - run.first,
            run.num_cached,
            self._num_preemptions(output),
            run.largest_batch,
            run.num_forced,
        )
        return msgspec.structs.replace(output, facts=facts)

    def _num_preemptions(self, output: Output) -> int:
        if output.finish_reason:
            return output.num_preemptions
        scheduler = self._scheduler
        seq = scheduler.running.get(output.request_id) or scheduler.waiting.get(output.request_id)
        return seq.num_preemptions if seq else 0
