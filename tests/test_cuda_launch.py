"""Launches of kernels, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from support_cuda import torch as torch  # Triton under its interpreter, or a skip
from triton.runtime.errors import OutOfResources

from tokenmill.backends.cuda.launch import Site


def test_a_kernel_that_needs_more_shared_memory_than_there_is_keeps_fewer_rounds_in_flight() -> None:
    launched: list[tuple[Any, ...]] = []

    class Kernel:
        """A kernel that fits with two."""

        needs = 2

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, STAGES: int, num_warps: int) -> object:
                if self.needs < STAGES:
                    raise OutOfResources(STAGES << 15, self.needs << 15, "shared memory")
                launched.append((*grid, *arguments, STAGES, num_warps))
                return object()

            return launch

    Site(Kernel())((3,), "x", STAGES=4, num_warps=8)
    assert launched == [(3, "x", 2, 8)]
    Kernel.needs = 0
    with pytest.raises(OutOfResources):
        Site(Kernel())((3,), "x", STAGES=4, num_warps=8)
