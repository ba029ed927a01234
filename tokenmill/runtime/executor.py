"""Runs plans on a backend. Shared by every model and feature: features go elsewhere, none is named here."""

from __future__ import annotations

from tokenmill.backends.base import Backend, Step, StepResult
from tokenmill.engine.sequence import Batch
from tokenmill.runtime.inputs import StepBuilder


class Executor:
    """An `engine.Executor` over a backend whose cache is allocated. The backend stays the caller's to close."""

    def __init__(self, backend: Backend, max_batch_size: int) -> None:
        self._backend = backend
        self._builder = StepBuilder(max_batch_size)

    def launch(self, batch: Batch) -> Step:
        """Start a step behind those before it and return at once."""
        return self._backend.run(self._builder.build(batch))

    def collect(self, step: Step) -> StepResult:
        """Wait for a step. Raises what went wrong in it."""
        return step.result()
