"""Runs plans on a backend. Shared by every model and feature: features go elsewhere, none is named here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tokenmill.backends.base import Backend, Masks, Step, StepResult
from tokenmill.engine.sequence import Batch
from tokenmill.runtime.inputs import StepBuilder


class Masking(Protocol):
    """Logits masks of a step, made on the host from the tokens of the steps before; on rank 0."""

    def defers(self, batch: Batch) -> bool:
        """True if this step, which is launched next, must wait for `masks` before it samples."""

    def masks(self, batch: Batch) -> Masks:
        """The masks of a deferred step. Called when all steps before it were observed."""

    def observe(self, batch: Batch, token_ids: list[int]) -> None:
        """Take in the tokens that a step sampled, as in `StepResult`. Called for each step, in their order."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on the device."""

    batch: Batch
    step: Step
    deferred: bool


class Executor:
    """An `engine.Executor` over a backend whose cache is allocated. The backend stays the caller's to close."""

    def __init__(self, backend: Backend, max_batch_size: int, masking: Masking | None = None) -> None:
        self._backend, self._masking = backend, masking
        self._builder = StepBuilder(max_batch_size)

    def launch(self, batch: Batch) -> Launched:
        """Start a step behind those before it and return at once. Raises what `Backend.run` does."""
        deferred = self._masking is not None and self._masking.defers(batch)
        return Launched(batch, self._backend.run(self._builder.build(batch, deferred)), deferred)

    def complete(self, step: Launched) -> None:
        """Start the sampling of a step that had to wait for the tokens before it. Raises what `Step.sample` does."""
        if step.deferred and self._masking is not None:
            step.step.sample(self._masking.masks(step.batch))

    def collect(self, step: Launched) -> StepResult:
        """Wait for a step. Raises what went wrong in it."""
        result = step.step.result()
        if self._masking is not None:
            self._masking.observe(step.batch, result.token_ids)
        return result

    def idle_work(self) -> bool:
        """Do a piece of the work that the backend has put off; True while more remains."""
        return self._backend.idle_work()
