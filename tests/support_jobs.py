"""Jobs that make a backend of a program, for tests that choose the backend themselves. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenmill.backends.base import StepLimits
from tokenmill.backends.kind import BackendOptions, Job, Placement
from tokenmill.parallel.group import Group
from tokenmill.parallel.mesh import Mesh
from tokenmill.program.value import Program
from tokenmill.quant.base import Reader, reader_of
from tokenmill.wire.messages import Progress


def job_of(
    program: Program,
    source: Any,
    limits: StepLimits,
    *,
    read: Reader | None = None,
    group: Group | None = None,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    report: Callable[[Progress], None] = lambda progress: None,
    **options: Any,
) -> Job:
    """Return the job of a backend. `options`: of BackendOptions."""
    mesh = mesh or Mesh()
    group = group or mesh.tensor
    placement = Placement(device, limits.block_size, group.size)
    read = read or reader_of(source)
    return Job(program, source, read, limits, group, BackendOptions(**options), placement, dtype, report, mesh)
