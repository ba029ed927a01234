"""Executor: run planned steps on a backend.

This file is shared by all models and features, and names none. The code of a feature belongs elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tokenmill.backends.base import Backend, Masks, Step, StepResult
from tokenmill.engine.sequence import Batch
from tokenmill.runtime.inputs import StepBuilder


class Masking(Protocol):
    """Interface to logits masks that the host computes from the tokens of earlier steps. Used on rank 0."""

    def defers(self, batch: Batch) -> bool:
        """Return True if this step, which is launched next, must wait for `masks` before it samples."""

    def masks(self, batch: Batch) -> Masks:
        """Return the masks of a deferred step. Called after `observe` of all earlier steps."""

    def observe(self, batch: Batch, token_ids: list[int]) -> None:
        """Record the sampled tokens of a step, as in `StepResult`. Called for each step, in their order."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on the device."""

    batch: Batch
    step: Step
    deferred: bool


class Executor:
    """Implementation of `engine.Executor` on a backend whose cache is allocated. The caller closes the backend."""

    def __init__(self, backend: Backend, max_batch_size: int, masking: Masking | None = None) -> None:
        self._backend, self._masking = backend, masking
        self._builder = StepBuilder(max_batch_size)

    def launch(self, batch: Batch) -> Launched:
        """See `engine.Executor`. Raise the errors of `Backend.run`."""
        deferred = self._masking is not None and self._masking.defers(batch)
        return Launched(batch, self._backend.run(self._builder.build(batch, deferred)), deferred)

    def complete(self, step: Launched) -> None:
        """See `engine.Executor`: start the sampling of a deferred step. Raise the errors of `Step.sample`."""
        if step.deferred and self._masking is not None:
            step.step.sample(self._masking.masks(step.batch))

    def collect(self, step: Launched) -> StepResult:
        """See `engine.Executor`. Raise the errors of `Step.result`."""
        result = step.step.result()
        if self._masking is not None:
            self._masking.observe(step.batch, result.token_ids)
        return result

    def idle_work(self) -> bool:
        """See `engine.Executor`."""
        return self._backend.idle_work()
