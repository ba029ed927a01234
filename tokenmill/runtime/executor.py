"""Runs plans on a backend. Shared by every model and feature: features go elsewhere, none is named here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tokenmill.backends.base import Backend, Masks, Step, StepResult
from tokenmill.engine.sequence import Batch
from tokenmill.runtime.inputs import StepBuilder


class Guiding(Protocol):
    """What the host has to say to a step's sampling once it knows the tokens of the step before; on rank 0."""

    def waits(self, batch: Batch) -> bool:
        """Whether it has anything to say to this step, which is launched next."""

    def masks(self, batch: Batch) -> Masks:
        """What it says to a step that waits, when all steps before were observed."""

    def observe(self, batch: Batch, token_ids: list[int]) -> None:
        """A step has sampled these, as of `StepResult`; steps come in their order."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on the device."""

    batch: Batch
    step: Step
    late: bool


class Executor:
    """An `engine.Executor` over a backend whose cache is allocated. The backend stays the caller's to close."""

    def __init__(self, backend: Backend, max_batch_size: int, guiding: Guiding | None = None) -> None:
        self._backend, self._guiding = backend, guiding
        self._builder = StepBuilder(max_batch_size)

    def launch(self, batch: Batch) -> Launched:
        """Start a step behind those before it and return at once. Raises what `Backend.run` does."""
        late = self._guiding is not None and self._guiding.waits(batch)
        return Launched(batch, self._backend.run(self._builder.build(batch, late)), late)

    def complete(self, step: Launched) -> None:
        """Start the sampling of a step that had to wait for the tokens before it. Raises what `Step.sample` does."""
        if step.late and self._guiding is not None:
            step.step.sample(self._guiding.masks(step.batch))

    def collect(self, step: Launched) -> StepResult:
        """Wait for a step. Raises what went wrong in it."""
        result = step.step.result()
        if self._guiding is not None:
            self._guiding.observe(step.batch, result.token_ids)
        return result

    def idle_work(self) -> bool:
        """Do a piece of the work that the backend has put off; True while more remains."""
        return self._backend.idle_work()
