"""The loop: take messages, plan a step, launch it, read back the one before.

Shared by every model and feature: features go elsewhere, none is named here.
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
"""After this many consecutive steps, run one piece of pending idle work even if the engine is busy."""

_log = logging.getLogger(__name__)


class Executor(Protocol[StepT]):
    """What runs a step on the device."""

    def launch(self, batch: Batch) -> StepT:
        """Start a step behind those before it and return at once. OutOfMemory: nothing was started."""

    def complete(self, step: StepT) -> None:
        """Start what of a step had to wait until the one before was collected. OutOfMemory: it will not run.

        Called once for each step, before the next launch, unless the one before found no memory.
        """

    def collect(self, step: StepT) -> StepResult:
        """Wait for a step. Called once for each, in the order of the launches.

        OutOfMemory: it did not run, nor did or will those launched behind it, which say the same.
        """

    def idle_work(self) -> bool:
        """Do a piece of work that was put off, a tenth of a second at most; True while more remains.

        Called only while no step is on the device.
        """


class Link(Protocol):
    """Where messages come from and outputs go: the same messages on every rank, in the same order."""

    def receive(self, block: bool, plan: bytes = b"") -> Sequence[ToScheduler]:
        """The messages that the next step begins with. Waits for one, a second at most, if `block`.

        `plan` is the digest of the plan before, compared over the ranks; b"": do not compare.
        """

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """Hand on what a step gave; never blocks. Called every turn, also with nothing to say."""


class Engine(Generic[StepT]):
    """One rank's engine. `step` is called for ever; between two calls at most one step is on the device."""

    def __init__(
        self, scheduler: Scheduler, executor: Executor[StepT], link: Link, *, compare_plans: bool = False
    ) -> None:
        self.scheduler, self.executor, self.link = scheduler, executor, link
        self._in_flight: tuple[Batch, StepT, float] | None = None
        self._compare_plans = compare_plans
        self._plan = b""
        self._last_collected = 0.0
        self._has_idle_work, self._steps_since = True, 0  # steps since the last piece of it

    @property
    def idle(self) -> bool:
        """True if nothing is to be done until the next message."""
        return self._in_flight is None and not self.scheduler.has_work

    def step(self) -> None:
        """One turn. The device works on step N + 1 while the host handles the tokens of step N."""
        scheduler = self.scheduler
        for message in self.link.receive(self.idle and not self._has_idle_work, self._plan):
            if isinstance(message, Request):
                scheduler.add(message)
            elif isinstance(message, Abort):
                scheduler.abort(message.id)
            else:
                scheduler.extend(message)
        self._steps_since += 1
        overdue = self._has_idle_work and self._steps_since >= _IDLE_WORK_AFTER
        batch = None if overdue else scheduler.schedule()
        if self._compare_plans:
            self._plan = digest(batch)
        flying, self._in_flight = self._in_flight, self._launch(batch) if batch else None
        if flying:
            outputs, done, step_s = self._collect(*flying)
        else:
            self._complete()
            outputs, done, step_s = [], None, 0.0
        self.link.send(scheduler.notices() + outputs, scheduler.stats(done, step_s))
        if self._has_idle_work and self._in_flight is None and (overdue or not scheduler.has_work):
            self._has_idle_work, self._steps_since = self.executor.idle_work(), 0

    def _launch(self, batch: Batch) -> tuple[Batch, StepT, float] | None:
        """The batch on the device since when; None if it found no memory there."""
        try:
            return batch, self.executor.launch(batch), perf_counter()
        except OutOfMemory as error:
            self._take_back([batch], error)
            return None

    def _complete(self) -> None:
        """Let the step that was just launched go on, now that the tokens before it are known."""
        if self._in_flight:
            batch, step, _ = self._in_flight
            try:
                self.executor.complete(step)
            except OutOfMemory as error:
                self._in_flight = None
                self._take_back([batch], error)

    def _collect(self, batch: Batch, step: StepT, launch_time: float) -> tuple[list[Output], Batch | None, float]:
        """What came of a step, the step, its seconds; nothing if it found no memory."""
        try:
            result = self.executor.collect(step)
        except OutOfMemory as error:
            batches = [batch]
            if self._in_flight:
                behind, step, _ = self._in_flight
                self._in_flight = None
                with suppress(OutOfMemory):
                    self.executor.collect(step)
                batches.append(behind)
            self._take_back(batches, error)
            return [], None, 0.0
        now = perf_counter()
        self._complete()
        step_s = now - max(launch_time, self._last_collected)  # a step begins when the one before has ended
        self._last_collected = now
        return self.scheduler.update(batch, result), batch, step_s

    def _take_back(self, batches: list[Batch], error: OutOfMemory) -> None:
        self.scheduler.retract(batches)
        _log.warning("A step of %d tokens found no memory on the device: %s", batches[0].num_tokens, error)


def digest(batch: Batch | None) -> bytes:
    """16 bytes that differ if two ranks plan differently."""
    content = blake2b(digest_size=16)
    if batch:
        for array in (batch.slots, batch.starts, batch.counts, batch.samples, batch.blocks, batch.host_tokens):
            content.update(array.tobytes() + b"|")
        content.update(",".join(str(seq.id) for seq in batch.sequences).encode())
        content.update(",".join(str(seq.id) for seq in batch.admitted).encode())
    return content.digest()
