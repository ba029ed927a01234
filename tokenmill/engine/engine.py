"""The loop: take messages, plan a step, launch it, read back the one before.

Shared by every model and feature: features go elsewhere, none is named here.
"""

from __future__ import annotations

from hashlib import blake2b
from time import perf_counter
from typing import Generic, Protocol, TypeVar

from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.sequence import Batch, StepResult
from tokenmill.wire.messages import Output, Request, Stats, ToEngine

StepT = TypeVar("StepT")


class Executor(Protocol[StepT]):
    """What runs a step on the device."""

    def launch(self, batch: Batch) -> StepT:
        """Start a step behind those before it and return at once."""

    def collect(self, step: StepT) -> StepResult:
        """Wait for a step. Called once for each, in the order of the launches."""


class Link(Protocol):
    """Where messages come from and outputs go: the same messages on every rank, in the same order."""

    def receive(self, block: bool, plan: bytes = b"") -> list[ToEngine]:
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

    @property
    def idle(self) -> bool:
        """True if nothing is to be done until the next message."""
        return self._in_flight is None and not self.scheduler.has_work

    def step(self) -> None:
        """One turn. The device works on step N + 1 while the host handles the tokens of step N."""
        scheduler = self.scheduler
        for message in self.link.receive(self.idle, self._plan):
            if isinstance(message, Request):
                scheduler.add(message)
            else:
                scheduler.abort(message.id)
        batch = scheduler.schedule()
        if self._compare_plans:
            self._plan = digest(batch)
        launched = (batch, self.executor.launch(batch), perf_counter()) if batch else None
        outputs = scheduler.notices()
        done, step_s = None, 0.0
        if self._in_flight:
            done, step, launch_time = self._in_flight
            result = self.executor.collect(step)
            now = perf_counter()
            step_s = now - max(launch_time, self._last_collected)  # a step begins when the one before has ended
            self._last_collected = now
            outputs += scheduler.update(done, result)
        self._in_flight = launched
        self.link.send(outputs, scheduler.stats(done, step_s))


def digest(batch: Batch | None) -> bytes:
    """16 bytes that differ if two ranks plan differently."""
    content = blake2b(digest_size=16)
    if batch:
        for array in (batch.slots, batch.starts, batch.counts, batch.samples, batch.blocks):
            content.update(array.tobytes() + b"|")
        content.update(",".join(str(seq.id) for seq in batch.sequences).encode())
        content.update(",".join(str(seq.id) for seq in batch.admitted).encode())
    return content.digest()
