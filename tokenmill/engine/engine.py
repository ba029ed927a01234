"""The engine's loop: receive messages, plan and launch a step, collect the previous step.

This file is shared by all models and features, and names none. The code of a feature belongs elsewhere: in a `Link`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from time import perf_counter
from typing import Generic, NamedTuple, Protocol, TypeVar

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
        """Start the deferred part of a step, which needs the tokens of earlier steps. Does not wait for the device.

        Called once for each step, after all steps that sampled a token it computes were collected, and before the next
        launch; not called if the previous step ran out of memory. Raise OutOfMemory if the step will not run.
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


class _Launched(NamedTuple, Generic[StepT]):
    """A step on the device."""

    batch: Batch
    step: StepT
    launch_time: float  # in seconds, by `perf_counter`


class Engine(Generic[StepT]):
    """The engine of one rank. Its owner calls `step` in a loop.

    Invariant: between two calls of `step`, at most `SchedulerLimits.stride` steps are on the device.
    """

    def __init__(
        self, scheduler: Scheduler, executor: Executor[StepT], link: Link, *, compare_plans: bool = False
    ) -> None:
        self.scheduler, self.executor, self.link = scheduler, executor, link
        self._depth = scheduler.limits.stride
        self._in_flight: deque[_Launched[StepT]] = deque()  # steps on the device, in the order of their launches
        self._compare_plans = compare_plans
        self._plan_digest = b""
        self._last_collected = 0.0
        self._has_idle_work, self._steps_since_idle_work = True, 0  # steps since the last unit of idle work

    @property
    def idle(self) -> bool:
        """True if no sequence waits or runs and no step is on the device."""
        return not self._in_flight and not self.scheduler.has_work

    def step(self) -> None:
        """Launch a step, then process the tokens of the oldest one on the device while the device computes.

        Blocks until that one ends, unless there is room for more steps on the device; if there is no work, until a
        message arrives, at most about a second.
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
        launched = self._launch(batch) if batch else None
        if self._in_flight and (launched is None or len(self._in_flight) >= self._depth):
            outputs, done, step_s = self._collect(launched)
        else:
            self._complete(launched)
            outputs, done, step_s = [], None, 0.0
        self.link.send(scheduler.notices() + outputs, scheduler.stats(done, step_s))
        if self._has_idle_work and not self._in_flight and (overdue or not scheduler.has_work):
            self._has_idle_work, self._steps_since_idle_work = self.executor.idle_work(), 0

    def _launch(self, batch: Batch) -> _Launched[StepT] | None:
        """Launch `batch`. Return the step; None if the device was out of memory."""
        try:
            return _Launched(batch, self.executor.launch(batch), perf_counter())
        except OutOfMemory as error:
            self._retract([batch], error)
            return None

    def _complete(self, launched: _Launched[StepT] | None) -> None:
        """Complete a step that was just launched, and count it as on the device: the tokens it needs are on the host.

        None: no step was launched.
        """
        if launched is not None:
            try:
                self.executor.complete(launched.step)
            except OutOfMemory as error:
                self._retract([launched.batch], error)
            else:
                self._in_flight.append(launched)

    def _collect(self, launched: _Launched[StepT] | None) -> tuple[list[Output], Batch | None, float]:
        """Wait for the oldest step, and complete `launched`. Return its outputs, its batch and its duration in seconds.

        Return no outputs, None and 0 if the device was out of memory.
        """
        batch, step, launch_time = self._in_flight.popleft()
        try:
            result = self.executor.collect(step)
        except OutOfMemory as error:
            later = [*self._in_flight, *([launched] if launched else [])]
            self._in_flight.clear()
            for other in later:
                with suppress(OutOfMemory):
                    self.executor.collect(other.step)
            self._retract([batch, *(other.batch for other in later)], error)
            return [], None, 0.0
        now = perf_counter()
        self._complete(launched)
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
