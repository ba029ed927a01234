"""Backends selected by name, created as the engine creates them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenmill import plugins
from tokenmill.backends.base import Backend, StepLimits
from tokenmill.backends.kind import BackendOptions, Job, Placement
from tokenmill.parallel.group import Group
from tokenmill.program.value import Program
from tokenmill.quant.base import reader_of
from tokenmill.runtime.choice import Choice, make_backend
from tokenmill.weights.checkpoint import Checkpoint

LIMITS = StepLimits(64, 4, 64, 16)


def choice_of(name: str, reason: str = "", device: str = "cpu") -> Choice:
    """Return the choice of a backend, as `runtime.choice.choose` does."""
    return Choice(plugins.find("backends", name).KIND, Placement(device, LIMITS.block_size, 1), reason)


def make(
    choice: Choice, program: Program, source: Checkpoint, report: Callable[[Any], None] = print, **options: Any
) -> Backend:
    """Return the backend of a choice, in float32."""
    given = BackendOptions(**options)
    read = reader_of(source, given.quantize)
    return make_backend(choice, Job(program, source, read, LIMITS, Group(), given, choice.placement, "float32", report))
