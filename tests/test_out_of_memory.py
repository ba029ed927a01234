"""Backends that run out of memory at any point of a step: no request's tokens change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_cuda import ON_GPU, cuda_job, torch, write_random
from support_jobs import job_of
from support_slow import mostly_slow

from tokenmill.backends.base import StepInputs, StepLimits
from tokenmill.backends.cuda.backend import CudaBackend
from tokenmill.backends.torch.backend import TorchBackend
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.limits import SchedulerLimits
from tokenmill.engine.scheduler import Scheduler
from tokenmill.errors import GenerationError, OutOfMemory
from tokenmill.models.base import program_of
from tokenmill.runtime.assembly import Assembled
from tokenmill.runtime.executor import Executor
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import EngineInfo, SamplingParams, StoppingParams

torch.set_num_threads(1)
LIMITS = StepLimits(24, 5, 64, 4)
Fault = Callable[[StepInputs], bool]


def backend_of(kind: str, folder: Path) -> Any:
    source = open_checkpoint(local_source(folder))
    program = program_of(source.config)
    backend: Any
    if kind == "cuda":
        backend = CudaBackend(cuda_job(program, source, LIMITS))
    else:
        backend = TorchBackend(job_of(program, source, LIMITS))
    backend.allocate(30)
    return backend


def engine_of(backend: Any) -> OfflineEngine:
    limits = SchedulerLimits(LIMITS.max_batch_tokens, LIMITS.max_batch_size, LIMITS.max_total_tokens, LIMITS.block_size)
    info = EngineInfo("tiny", "float32", "cpu", "torch", 30, LIMITS.block_size, 128, 63, 64, 1, 1)
    parts = Assembled(Scheduler(BlockPool(30, 4), limits), Executor(backend, LIMITS.max_batch_size), info)
    parts._resources.callback(backend.close)
    return OfflineEngine(parts)


class Faults:
    """Wrapper that makes a method of a backend raise torch's error, before or after it has done its work.

    `place`: "part.method" or "method". `least`: minimum tokens of a step that may fail.
    """

    def __init__(self, backend: Any, place: str, rate: float, seed: int = 0, least: int = 1) -> None:
        self.rng, self.rate, self.least, self.count = np.random.default_rng(seed), rate, least, 0
        *owner, name = place.split(".")
        part = getattr(backend, owner[0]) if owner else backend
        self.work, self.may_fail = getattr(part, name), False
        setattr(part, name, self)
        start = "_step" if isinstance(backend, TorchBackend) else "_run"
        self.step = getattr(backend, start)
        setattr(backend, start, self.begin)

    def begin(self, inputs: StepInputs) -> Any:
        self.may_fail = int(inputs.counts.sum()) >= self.least
        return self.step(inputs)

    def __call__(self, *args: Any, **how: Any) -> Any:
        when = self.rng.random() / self.rate if self.rate and self.may_fail else 1.0
        if when < 0.5:
            self.fail()
        result = self.work(*args, **how)
        if 0.5 <= when < 1:
            self.fail()
        return result

    def fail(self) -> None:
        self.count += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


def answers(engine: OfflineEngine, seed: int, requests: int = 7, longest: int = 12) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    head = rng.integers(0, 128, 12).tolist()
    ids = []
    for i in range(requests):
        prompt = head[: rng.integers(0, 13)] + rng.integers(0, 128, rng.integers(1, 9)).tolist()
        params = SamplingParams(temperature=float(i % 2), seed=i, top_k=5 if i % 3 == 0 else 0)
        ids.append(engine.submit(prompt, params, StoppingParams(int(rng.integers(3, longest)))))
    return [[t for o in engine.outputs(i) for t in o.token_ids] for i in ids]


PLACES = {
    "torch": ["_slots.apply", "_interpreter.body", "_sample"],
    "cuda": ["_slots.apply", "_forward", "_sampler.sample"],
}


CASES = [(kind, place) for kind in PLACES for place in PLACES[kind]]


@pytest.mark.parametrize("kind, place", mostly_slow(CASES, [(kind, PLACES[kind][0]) for kind in PLACES]))
def test_a_step_without_memory_changes_no_token(kind: str, place: str, tmp_path: Path) -> None:
    write_random(tmp_path, "llama", num_hidden_layers=1)
    fast = kind == "torch" or ON_GPU
    requests, longest = (7, 12) if fast else (2, 6)
    with engine_of(backend_of("torch", tmp_path)) as engine:
        wanted = [answers(engine, seed, requests, longest) for seed in range(6 if fast else 1)]
    for seed, tokens in enumerate(wanted):
        backend = backend_of(kind, tmp_path)
        faults = Faults(backend, place, 0.25, seed, least=2)
        with engine_of(backend) as engine:
            assert answers(engine, seed, requests, longest) == tokens
            assert 0 < engine.stats.retracted == faults.count
            assert engine.stats.blocks_used == engine.stats.running == 0


def test_a_step_behind_one_without_memory_does_not_run(tmp_path: Path) -> None:
    write_random(tmp_path, "llama", num_hidden_layers=1)
    backend = backend_of("torch", tmp_path)
    faults = Faults(backend, "_slots.apply", 1.0)
    inputs = StepInputs(*(np.array([n], np.int32) for n in (0, 0, 1, 0)))
    first = backend.run(inputs)
    first._future.exception()
    faults.rate = 0.0
    second, third = backend.run(inputs), backend.run(inputs)
    for step in (first, second, third):
        with pytest.raises(OutOfMemory):
            step.result()
    assert len(backend.run(inputs).result().token_ids) == 1, "all have been told: the next one runs"
    backend.close()


def test_with_several_ranks_it_stays_an_error_that_ends_the_engine(tmp_path: Path) -> None:
    write_random(tmp_path, "llama", num_hidden_layers=1)
    backend = backend_of("torch", tmp_path)
    Faults(backend, "_slots.apply", 1.0)
    backend._has_peers = True
    with pytest.raises(torch.OutOfMemoryError):
        backend.run(StepInputs(*(np.array([n], np.int32) for n in (0, 0, 1, 0)))).result()
    backend.close()


def test_a_request_that_never_finds_memory_ends_with_a_message(tmp_path: Path) -> None:
    write_random(tmp_path, "llama", num_hidden_layers=1)
    backend = backend_of("torch", tmp_path)
    faults = Faults(backend, "_sample", 1.0)
    with engine_of(backend) as engine:
        with pytest.raises(GenerationError, match="no memory"):
            list(engine.outputs(engine.submit([1, 2, 3, 4, 5])))
        faults.rate = 0.0
        assert len(engine.generate([[1, 2, 3]], None, StoppingParams(4))[0]) == 4
