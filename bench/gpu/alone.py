"""A rank without the others: a part of a model on one card, and ranks of one process, for measurements."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from bench.gpu.engine import RandomWeights
from bench.gpu.timing import median_us
from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda.backend import CudaBackend
from tokenmill.backends.cuda.collectives.base import Needs
from tokenmill.backends.cuda.collectives.choice import NEVER, Limits
from tokenmill.backends.cuda.collectives.make import GpuCollectives, needs_of
from tokenmill.backends.cuda.collectives.peers import Layout, Peers, Shared
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.shapes import Contexts
from tokenmill.backends.kind import BackendOptions, Job, Placement
from tokenmill.models.base import program_of
from tokenmill.parallel.group import Group
from tokenmill.program.value import Program
from tokenmill.quant.base import reader_of


class Alone(Group):
    """Rank 0 of several, whose peers are not there: it exchanges with itself."""

    def exchange(self, data: bytes = b"") -> list[bytes]:
        """Return its own data, as if of all ranks."""
        return [data] * self.size


def peers_of(ranks: int, needs: Needs, limits: Limits) -> list[Peers]:
    """Return ranks that write to each other's memory in this process; one rank writes to itself."""
    layout = Layout.of(needs, ranks)
    memories = [torch.zeros(layout.nbytes, dtype=torch.uint8, device="cuda") for _ in range(ranks)]
    made = []
    for rank, own in enumerate(memories):
        deltas = torch.tensor([each.data_ptr() - own.data_ptr() for each in memories], device="cuda")
        made.append(Peers(Shared(rank, own, deltas), layout, limits, 5.0))
    return made


def pair(rows: int, width: int) -> list[Peers]:
    """Return two ranks with memory for sums of so many bf16 rows."""
    return peers_of(2, Needs(rows, width * 2, 1, 8, 2), Limits(NEVER, NEVER))


def _collectives(
    program: Program, rows: dict[str, int], dtype: torch.dtype, group: Group, device: Device, batch_invariant: bool
) -> GpuCollectives:
    """Replace `make.collectives_of`: a rank that sums with itself."""
    (own,) = peers_of(1, needs_of(program, rows, dtype), Limits(1 << 20, NEVER))
    return GpuCollectives(group, own, None, None)


def step_ms(config: dict[str, Any], ranks: int, rows: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Yield rows, and milliseconds of a decode step of one rank. Contexts are empty."""
    program, source, limits = program_of(config), RandomWeights(config), StepLimits(1024, max(rows), 1024, 16)
    options = BackendOptions(cuda_graphs=tuple(rows), cpus=os.cpu_count() or 1)
    group, placement = Alone(0, ranks), Placement("cuda", 16, ranks)
    read = reader_of(source)  # type: ignore[arg-type]
    job = Job(program, source, read, limits, group, options, placement, "bfloat16", lambda progress: None)  # type: ignore[arg-type]
    with mock.patch("tokenmill.backends.cuda.ranks.collectives_of", _collectives):
        backend = CudaBackend(job)
    backend.allocate(max(rows) + 64)
    backend.warm_up()
    for count in rows:
        us = median_us(lambda count=count: backend._graphs.replay(count, Contexts.ALIKE), 20)  # type: ignore[misc]
        yield count, us / 1e3
    backend.close()
