"""Runs plans on a backend. Shared by every model and feature: features go elsewhere, none is named here."""

from __future__ import annotations

from collections.abc import Callable

from tokenmill.backends.base import Backend, Step, StepResult
from tokenmill.engine.sequence import Batch
from tokenmill.runtime.inputs import StepBuilder


class Executor:
    """An `engine.Executor` over a backend whose cache is allocated. The backend stays the caller's to close."""

    def __init__(self, backend: Backend, max_batch_size: int) -> None:
        self._backend = backend
        self._builder = StepBuilder(max_batch_size)
        self._rest: Callable[[], bool] = getattr(backend, "rest", lambda: False)

    def launch(self, batch: Batch) -> Step:
        """Start a step behind those before it and return at once. Raises what `Backend.run` does."""
        return self._backend.run(self._builder.build(batch))

    def collect(self, step: Step) -> StepResult:
        """Wait for a step. Raises what went wrong in it."""
        return step.result()

    def rest(self) -> bool:
        """Do a piece of the work that the backend has put off; True while more remains."""
        return self._rest()
