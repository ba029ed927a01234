"""The CUDA backend against torch, on random programs: each is computed correctly or refused."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from support_cuda import ON_GPU, CudaDriver, cuda_job
from support_programs import Arrays, Draw, logits_of, same, steps

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda.backend import CudaBackend
from tokenmill.backends.cuda.prepare import refusal
from tokenmill.program.value import Program

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


class Drawn(CudaDriver):
    """The backend of a program without a checkpoint on disk."""

    def __init__(self, program: Program, source: Arrays) -> None:
        limits = StepLimits(64, 4, 256, 16)
        CudaBackend.__init__(self, cuda_job(program, source, limits, cuda_graphs=()))
        self.allocate(64)
        self.free = np.random.default_rng(3).permutation(64).tolist()
        self.known, self.tables = {}, {}


@pytest.mark.parametrize("part", range(6))
def test_a_drawn_program_is_computed_or_refused(part: int) -> None:
    refused: Counter[str] = Counter()
    for seed in range(part * 20, part * 20 + 20):
        draw = Draw(seed)
        program = draw.program()
        if why := refusal(program, "float32"):
            refused[why] += 1
            continue
        want = logits_of(program, draw.source())
        backend = Drawn(program, draw.source())
        got = [backend.feed(rows) for rows in steps()]
        backend.close()
        assert same(got, want, 2e-2), f"seed {seed}\n{program}\n--- lowered\n{backend.program}"
    assert refused.total() < 20, refused
