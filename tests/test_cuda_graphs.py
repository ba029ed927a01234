"""CUDA graphs of decode steps: which sizes, when, and that a capture has no side effects.

Graphs are real only on a GPU; elsewhere a substitute repeats the recorded launches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support_cuda import ON_GPU, CudaDriver, torch, write_random
from support_models import Driver

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda.graphs import Graphs
from tokenmill.backends.cuda.shapes import Contexts, variants

torch.set_num_threads(1)


class Recorded:
    """Substitute for torch.cuda.CUDAGraph: replays by running the launches again."""

    def __init__(self) -> None:
        self.run: Callable[[], None] | None = None
        self.replays = 0

    def replay(self) -> None:
        assert self.run is not None
        self.run()
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Graphs]:
    """Return a function that makes `Graphs` as on a GPU."""

    @contextlib.contextmanager
    def record(graph: Recorded, pool: object) -> Iterator[None]:
        yield

    def make(most: int, wanted: tuple[int, ...] | None = None) -> Graphs:
        made = Graphs(SimpleNamespace(real=True), most, wanted)  # type: ignore[arg-type]
        capture = made.capture

        def capture_and_keep(size: int, contexts: Contexts, run: Callable[[], None]) -> None:
            capture(size, contexts, run)
            made._captured[size, contexts].run = run  # type: ignore[attr-defined]

        made.capture = capture_and_keep  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", record)
    return make


def capture_all(made: Graphs, sizes: list[int]) -> None:
    for size, contexts in made.missing(sizes):
        made.capture(size, contexts, lambda: None)


def test_the_largest_and_powers_of_two_come_first_and_nothing_is_padded_to_much_more(graphs: Any) -> None:
    made = graphs(200)
    assert made.first == [200, 128, 64, 32, 16, 8, 4, 2, 1]
    capture_all(made, made.first)
    assert [made.padded(rows) for rows in (1, 3, 65, 129, 200)] == [1, 4, 128, 200, 200]
    assert all(made.padded(rows) <= 2 * rows for rows in range(1, 201))
    later = list(made.later)
    assert later == sorted(later, reverse=True)
    assert 24 in later
    for size, contexts in made.missing(made.later):
        before = made.padded(size)
        made.capture(size, contexts, lambda: None)
        complete = contexts == variants(size, False)[-1]
        assert made.padded(size) == (size if complete else before), "a size is used when all its variants are there"
    assert not made.missing(made.later)
    assert len(made) == len(made._captured)


def test_sizes_that_are_asked_for_are_all_captured_first_and_no_others(graphs: Any) -> None:
    made = graphs(64, (24, 3, 500))
    assert (made.first, made.later) == ([64, 24, 3], [])
    capture_all(made, made.first)
    assert [made.padded(rows) for rows in (1, 3, 4, 24, 25, 64)] == [3, 3, 24, 24, 64, 64]
    assert graphs(64, ()).first == []


def test_where_there_are_no_graphs_there_is_nothing_to_do() -> None:
    made = Graphs(SimpleNamespace(real=False), 64, None)  # type: ignore[arg-type]
    assert not made.first
    assert not made.later
    assert made.padded(7) == 0


@pytest.fixture
def driver(tmp_path: Path, request: pytest.FixtureRequest) -> CudaDriver:
    write_random(tmp_path, "llama", num_hidden_layers=1)
    limits = StepLimits(64, 13, 128, 16)
    if ON_GPU:
        return CudaDriver(tmp_path, limits=limits, num_blocks=64, graphs=None, warm=True)
    made = CudaDriver(tmp_path, limits=limits, num_blocks=64)
    made._graphs = request.getfixturevalue("graphs")(13)
    for rows, contexts in made._graphs.missing(made._graphs.first):
        made._capture(rows, contexts)
    return made


@pytest.mark.slow
def test_a_capture_between_steps_changes_no_state_and_no_result(driver: CudaDriver, tmp_path: Path) -> None:
    expected = Driver.of(tmp_path, limits=driver.limits, num_blocks=64)
    rng = np.random.default_rng(0)
    driver._graphs.later = [12, 11, 10, 9, 7, 6, 5, 3] if ON_GPU else [9, 3]
    missing = len(driver._graphs.missing(driver._graphs.later))
    driver.feed(prompts := [(slot, rng.integers(0, 128, 3 + slot).tolist()) for slot in range(9)])
    expected.feed(prompts)
    more, steps = True, 0
    while more:
        padding = driver._slots.padding
        caches = [cache[:, :-16].clone() for cache in driver._memory._cache.values()]
        before = [driver._slots.tokens[:padding].clone(), driver._slots.tables.clone(), *caches]
        more = driver.idle_work()
        caches = [cache[:, :-16] for cache in driver._memory._cache.values()]
        for then, now in zip(before, [driver._slots.tokens[:padding], driver._slots.tables, *caches], strict=True):
            assert torch.equal(then, now)
        rows = [(slot, [int(rng.integers(128))]) for slot in rng.permutation(9)[: rng.integers(1, 10)].tolist()]
        np.testing.assert_allclose(driver.feed(rows), expected.feed(rows), atol=2e-4, rtol=1e-3)
        steps += 1
    assert steps == missing
    assert not driver.idle_work()
    assert ON_GPU or sum(graph.replays for graph in driver._graphs._captured.values()) == steps  # type: ignore[attr-defined]
    assert [driver._graphs.padded(rows) for rows in (3, 9)] == [3, 9]


@pytest.mark.slow
def test_graphs_that_find_no_memory_are_given_up(
    driver: CudaDriver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **how: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    driver._graphs.later = [12, 9]
    while driver._graphs.padded(9) != 12:
        assert driver.idle_work()
    left = len(driver._graphs.missing(driver._graphs.later))
    monkeypatch.setattr(driver._graphs, "capture", full)
    assert not driver.idle_work()
    assert f"{left} more graphs" in caplog.text
    assert not driver.idle_work()
    assert driver._graphs.padded(9) == 12
