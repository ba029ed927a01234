"""Whole engines of several stages of real models give each request what one rank gives it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_cpu import kernel_folder
from support_cuda import write_random
from support_jobs import job_of
from support_ranks import Meeting, Rank, run_threads
from support_stages import Threads, told
from support_text import byte_level
from test_ranks import alone, running, save, serve
from test_ranks import requests as requests_of_ranks

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cpu import isa
from tokenmill.backends.kind import BackendOptions
from tokenmill.backends.torch.backend import TorchBackend
from tokenmill.config import Settings
from tokenmill.models.base import program_of
from tokenmill.parallel.group import Group
from tokenmill.program.cost import weights_of
from tokenmill.program.stage import stage
from tokenmill.runtime.assembly import Assembled, EngineOptions, assemble
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import Abort, GrammarSpec, Ready, Request, SamplingParams, StoppingParams, ToEngine

torch.set_num_threads(1)
VOCAB, ABORTED = 608, 3
SCHEMA = json.dumps({
    "type": "object", "properties": {"a": {"enum": [1, 23]}, "b": {"enum": ["x", "yz"]}}, "required": ["a", "b"],
    "additionalProperties": False,
}, separators=(",", ":"))  # fmt: skip


def history() -> list[list[ToEngine]]:
    """Return requests of all kinds a few at a time, and an abort."""
    rng = np.random.default_rng(3)
    head = rng.integers(3, VOCAB, 14).tolist()
    script: list[list[ToEngine]] = []
    for i in range(10):
        prompt = head[: rng.integers(0, 15)] + rng.integers(3, VOCAB, rng.integers(1, 6)).tolist()
        sampling = SamplingParams(
            temperature=(0.0, 0.8, 1.0)[i % 3], top_p=(1.0, 0.9)[i % 2], repetition_penalty=(1.0, 1.2)[i % 2], seed=i,
            logprobs=(-1, 2)[i % 4 == 0], prompt_logprobs=(-1, 1)[i % 5 == 0],
        )  # fmt: skip
        forced = {"force_after": 3, "forced_ids": (3, 4, 5)} if i % 3 == 1 else {}
        stopping = StoppingParams(int(rng.integers(8, 24)), 0, (int(rng.integers(VOCAB)), 2), **forced)
        grammar = GrammarSpec("json_schema", SCHEMA) if i % 3 == 2 else None
        script += [[Request(i, tuple(prompt), sampling, stopping, grammar=grammar)], *([] for _ in range(i % 3))]
    script[8].append(Abort(ABORTED))
    return script


def engines(folder: Path, num_stages: int, tensor: int, backend: str = "torch", **options: Any) -> list[Assembled]:
    """Return the parts of all ranks of an engine, made at the same time on threads."""
    own = BackendOptions(backend=backend, kernel_cache=str(kernel_folder()), cpu_threads=1)
    wants = EngineOptions(
        backend=own, block_size=4 if backend == "torch" else 16, max_batch_tokens=13, max_batch_size=6,
        max_total_tokens=48, grammars=True, num_stages=num_stages, **options,
    )  # fmt: skip
    meeting = Meeting(num_stages * tensor)
    groups: list[Group] = [Rank(rank, meeting) for rank in range(meeting.size)] if meeting.size > 1 else [Group()]
    made: list[Any] = [None] * len(groups)

    def make(rank: int) -> None:
        try:
            made[rank] = assemble(local_source(folder), wants, groups[rank], lambda _: None)
        except BaseException as error:  # noqa: BLE001  the main thread raises it
            made[rank] = error
            meeting.barrier.abort()

    run_threads(make, len(groups))
    for found in made:
        if isinstance(found, BaseException):
            raise found
    return made


def served(parts: list[Assembled]) -> tuple[dict[int, Any], Threads]:
    """Return what clients get of the history, but of the request that is aborted, and the engine."""
    engine = Threads(parts, history())
    try:
        outputs = engine.run()
    finally:
        for part in parts:
            part.close()
    return {i: told(outputs[i]) for i in outputs if i != ABORTED}, engine


def check_equal(found: dict[int, Any], wanted: dict[int, Any]) -> None:
    """Assert that clients get the same tokens, and log-probabilities that differ by rounding only."""
    assert {i: answer[:2] for i, answer in found.items()} == {i: answer[:2] for i, answer in wanted.items()}
    for i, (_, _, *details) in found.items():
        for got, want in zip(details, wanted[i][2:], strict=True):
            assert [detail.logprob for detail in got] == pytest.approx([d.logprob for d in want], abs=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of four layers with a tokenizer."""
    made = tmp_path_factory.mktemp("model")
    write_random(made, "llama", num_hidden_layers=4, vocab_size=VOCAB)
    byte_level().save(str(made / "tokenizer.json"))
    (made / "generation_config.json").write_text('{"eos_token_id": 2}')
    return made


@pytest.fixture(scope="module")
def wanted(folder: Path) -> dict[int, Any]:
    """Return what one rank gives."""
    return served(engines(folder, 1, 1))[0]


def limit_of(folder: Path, num_stages: int, num_blocks: int) -> int:
    """Return the memory limit that leaves every rank so many blocks, or a few more."""
    source = open_checkpoint(local_source(folder))
    whole = program_of(source.config)
    limits = StepLimits(13, 6, 48, 4)
    own = 0
    for index in range(num_stages):
        backend = TorchBackend(job_of(stage(whole, index, num_stages), source, limits))
        own = max(own, backend.step_bytes() + num_blocks * backend.block_bytes())
        backend.close()
    weights = sum(weight.size for i in range(num_stages) for weight in weights_of(stage(whole, i, num_stages))) * 4
    return weights + num_stages * own + 10


def test_two_stages_give_each_request_what_one_rank_gives_it(folder: Path, wanted: dict[int, Any]) -> None:
    parts = engines(folder, 2, 1, memory_limit=limit_of(folder, 2, 14))
    assert len({part.info.num_blocks for part in parts}) == 1
    found, engine = served(parts)
    check_equal(found, wanted)
    stats = engine.link.stats
    assert min(stats.preemptions, stats.cached_tokens, stats.forced_tokens) > 0


@pytest.mark.skipif(not isa.available(), reason="no kernels")
@pytest.mark.parametrize("num_stages, tensor", [(2, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_stages_of_the_cpu_engine_give_what_one_rank_gives(folder: Path, num_stages: int, tensor: int) -> None:
    wanted, _ = served(engines(folder, 1, 1, "cpu"))
    found, _ = served(engines(folder, num_stages, tensor, "cpu"))
    if tensor == 1:
        assert found == wanted, "to the last bit"
    else:
        check_equal(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("num_stages, tensor", [(3, 1), (2, 2)])
def test_more_stages_and_stages_of_several_ranks_give_what_one_rank_gives(
    num_stages: int, tensor: int, folder: Path, wanted: dict[int, Any]
) -> None:
    found, _ = served(engines(folder, num_stages, tensor))
    check_equal(found, wanted)


@pytest.mark.slow
def test_stages_as_processes_say_token_for_token_what_one_says_alone(tmp_path: Path, run_dir: Path) -> None:
    save(tmp_path)
    expected = alone(tmp_path)
    settings = Settings(
        num_shard=2, pipeline_parallel_size=2, block_size=4, max_batch_size=6, max_batch_prefill_tokens=13,
        max_total_tokens=64, debug_plans=True, backend="torch", share_devices=True,
    )  # fmt: skip
    with running(settings, tmp_path, run_dir) as engine:
        assert [m.info is None for m in engine.wait_for(Ready)] == [False, True, True, True]
        outputs, _ = serve(engine.connect(), requests_of_ranks())
        assert {i: [t for o in outputs[i] for t in o.token_ids] for i in expected} == expected
        for child in engine.children:
            child.stop()
        assert engine.wait_for_end() == [0, 0, 0, 0]
