"""The engine's loop: receive messages, plan and launch a step, collect the previous step.

This file is shared by all models and features, and names none. The code of a feature belongs elsewhere: in a `Link`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from time import perf_counter
from typing import Generic, Protocol, TypeVar

from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.sequence import Batch, StepResult
from tokenmill.errors import OutOfMemory
from tokenmill.wire.messages import Abort, Output, Request, Stats, ToScheduler

StepT = TypeVar("StepT")

_IDLE_WORK_AFTER = 1000
"""After this many consecutive steps, run one unit of pending idle work even if the engine is busy."""

_log = logging.getLogger(__name__)


class Executor(Protocol[StepT]):
    """Interface to the device: starts steps and collects their results."""

    def launch(self, batch: Batch) -> StepT:
        """Start a step and return at once; it runs after all earlier steps.

        Raise OutOfMemory if it was not started for lack of device memory.
        """

    def complete(self, step: StepT) -> None:
        """Start the deferred part of a step, which needs the tokens of the previous step. Does not block.

        Called once for each step, after the previous step was collected and before the next launch; not called if the
        previous step ran out of memory. Raise OutOfMemory if the step will not run.
        """

    def collect(self, step: StepT) -> StepResult:
        """Wait for a step and return its result. Called once for each step, in the order of the launches.

        Raise OutOfMemory if the step did not run. No later launched step runs then, and `collect` raises for each.
        """

    def idle_work(self) -> bool:
        """Run one unit of idle work, in at most 0.1 s, and return True if more is left.

        Idle work is optional: it makes later steps faster. Called only while no step is on the device.
        """


class Link(Protocol):
    """Source of the engine's messages and destination of its outputs.

    Invariant: every rank receives the same messages, in the same order and before the same steps.
    """

    def receive(self, block: bool, plan: bytes = b"") -> Sequence[ToScheduler]:
        """Return the messages to process before the next step. If `block`, wait up to a second for the first one.

        `plan`: digest of the previous plan, compared across the ranks; b"": not compared.
        """

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """Send the outputs of a step, without blocking. Called in every `Engine.step`, also without outputs."""


class Engine(Generic[StepT]):
    """The engine of one rank. Its owner calls `step` in a loop.

    Invariant: between two calls of `step`, at most one step is on the device.
    """

    def __init__(
        self, scheduler: Scheduler, executor: Executor[StepT], link: Link, *, compare_plans: bool = False
    ) -> None:
        self.scheduler, self.executor, self.link = scheduler, executor, link
        self._in_flight: tuple[Batch, StepT, float] | None = None
        self._compare_plans = compare_plans
        self._plan_digest = b""
        self._last_collected = 0.0
        self._has_idle_work, self._steps_since_idle_work = True, 0  # steps since the last unit of idle work

    @property
    def idle(self) -> bool:
        """True if no sequence waits or runs and no step is on the device."""
        return self._in_flight is None and not self.scheduler.has_work

    def step(self) -> None:
        """Launch step N + 1, then process the tokens of step N while the device computes.

        Blocks until step N ends; if there is no work, until a message arrives, at most about a second.
        """
        scheduler = self.scheduler
        for message in self.link.receive(self.idle and not self._has_idle_work, self._plan_digest):
            if isinstance(message, Request):
                scheduler.add(message)
            elif isinstance(message, Abort):
                scheduler.abort(message.id)
            else:
                scheduler.extend(message)
        self._steps_since_idle_work += 1
        overdue = self._has_idle_work and self._steps_since_idle_work >= _IDLE_WORK_AFTER
        batch = None if overdue else scheduler.schedule()
        if self._compare_plans:
            self._plan_digest = digest(batch)
        in_flight, self._in_flight = self._in_flight, self._launch(batch) if batch else None
        if in_flight:
            outputs, done, step_s = self._collect(*in_flight)
        else:
            self._complete()
            outputs, done, step_s = [], None, 0.0
        self.link.send(scheduler.notices() + outputs, scheduler.stats(done, step_s))
        if self._has_idle_work and self._in_flight is None and (overdue or not scheduler.has_work):
            self._has_idle_work, self._steps_since_idle_work = self.executor.idle_work(), 0

    def _launch(self, batch: Batch) -> tuple[Batch, StepT, float] | None:
        """Launch `batch`. Return it with its step and launch time in seconds; None if the device was out of memory."""
        try:
            return batch, self.executor.launch(batch), perf_counter()
        except OutOfMemory as error:
            self._retract([batch], error)
            return None

    def _complete(self) -> None:
        """Complete the step that was just launched: the tokens of the previous step are on the host now."""
        if self._in_flight:
            batch, step, _ = self._in_flight
            try:
                self.executor.complete(step)
            except OutOfMemory as error:
                self._in_flight = None
                self._retract([batch], error)

    def _collect(self, batch: Batch, step: StepT, launch_time: float) -> tuple[list[Output], Batch | None, float]:
        """Wait for a step. Return its outputs, its batch and its duration in seconds.

        Return no outputs, None and 0 if the device was out of memory.
        """
        try:
            result = self.executor.collect(step)
        except OutOfMemory as error:
            batches = [batch]
            if self._in_flight:
                next_batch, step, _ = self._in_flight
                self._in_flight = None
                with suppress(OutOfMemory):
                    self.executor.collect(step)
                batches.append(next_batch)
            self._retract(batches, error)
            return [], None, 0.0
        now = perf_counter()
        self._complete()
        step_s = now - max(launch_time, self._last_collected)  # a step starts when the previous one has ended
        self._last_collected = now
        return self.scheduler.update(batch, result), batch, step_s

    def _retract(self, batches: list[Batch], error: OutOfMemory) -> None:
        self.scheduler.retract(batches)
        _log.warning("A step of %d tokens found no memory on the device: %s", batches[0].num_tokens, error)


def digest(batch: Batch | None) -> bytes:
    """Return a 16-byte digest of a plan. Two ranks compare digests to detect different plans."""
    content = blake2b(digest_size=16)
    if batch:
        for array in (batch.slots, batch.starts, batch.counts, batch.samples, batch.blocks, batch.host_tokens):
            content.update(array.tobytes() + b"|")
        content.update(",".join(str(seq.id) for seq in batch.sequences).encode())
        content.update(",".join(str(seq.id) for seq in batch.admitted).encode())
    return content.digest()
