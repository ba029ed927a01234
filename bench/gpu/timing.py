"""Time of launches on a GPU, and how far results are off."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def off(found: Tensor, want: Tensor) -> float:
    """Return the relative error."""
    return float((found.float() - want.float()).norm() / want.float().norm())


def graph_us(run: Callable[[int], None], repeats: int = 20, rounds: int = 5) -> float:
    """Return the median microseconds of a call in a CUDA graph of `repeats` calls with the numbers 0, 1, …"""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats):
            run(i)
    return median_us(graph.replay, rounds) / repeats


def median_us(run: Callable[[], object], rounds: int = 5) -> float:
    """Return the median microseconds of a call, after one that does not count."""
    found = []
    for _ in range(rounds + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    return float(np.median(found[1:]))
