"""Two ranks equal one, for every family. The ranks are threads here; test_program.py has some as processes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_models import FAMILIES, Driver, make_checkpoint, reference, steps
from torch import Tensor

from tokenmill.errors import Unsupported
from tokenmill.models.base import program_of
from tokenmill.program.shard import shard
from tokenmill.program.value import Program
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source

torch.set_num_threads(1)


class Meeting:
    """Place where the ranks' threads exchange tensors."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.brought: list[Any] = [None] * size

    def all(self, rank: int, x: Any) -> list[Any]:
        self.brought[rank] = x
        self.barrier.wait()
        found = list(self.brought)
        self.barrier.wait()
        return found


class Threads:
    """A `Group` whose ranks are threads of this process."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self.meeting = rank, meeting.size, meeting

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self.meeting.all(self.rank, x)).sum(0)

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self.meeting.all(self.rank, x), -1)

    def broadcast(self, x: Tensor) -> Tensor:
        return x.copy_(self.meeting.all(self.rank, x)[0])

    def minimum(self, n: int) -> int:
        return min(self.meeting.all(self.rank, n))

    def close(self) -> None:
        pass


def logits_of_rank(folder: Path, rank: int, meeting: Meeting) -> list[np.ndarray]:
    source = open_checkpoint(local_source(folder))
    try:
        backend = Driver(program_of(source.config), source, group=Threads(rank, meeting))  # type: ignore[arg-type]
        return [backend.feed(rows) for rows in steps()[:3]]
    except BaseException:
        meeting.barrier.abort()
        raise


def refusal(program: Program) -> str:
    """Return why two ranks cannot share a program; "" if they can."""
    try:
        shard(program, 2)
    except Unsupported as refused:
        return str(refused)
    return ""


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_equal_transformers(family: str, tmp_path: Path) -> None:
    want = reference(make_checkpoint(tmp_path, family), steps()[:3])
    if refused := refusal(program_of(open_checkpoint(local_source(tmp_path)).config)):
        assert "norm over the whole row" in refused
        assert "leave `--num-shard` out" in refused
        return
    meeting = Meeting(2)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(logits_of_rank, tmp_path, rank, meeting) for rank in range(2)]
        for run in runs:
            for got, expected in zip(run.result(), want, strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max() / 10)
