"""Deferred steps on real backends: masks, forced tokens, and unconstrained rows beside them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_constraints import Ready
from support_cuda import ON_GPU, CudaDriver, torch, write_random
from support_jobs import job_of
from support_text import byte_level

from tokenmill.backends.base import Admitted, Masks, StepInputs, StepLimits
from tokenmill.backends.cpu import isa
from tokenmill.backends.kind import BackendOptions
from tokenmill.backends.torch.backend import TorchBackend
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.scheduler import Scheduler, SchedulerLimits
from tokenmill.errors import GenerationError, OutOfMemory
from tokenmill.models.base import program_of
from tokenmill.parallel.group import Group
from tokenmill.runtime.assembly import Assembled, EngineOptions, assemble
from tokenmill.runtime.constraints import Constraints
from tokenmill.runtime.executor import Executor
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import EngineInfo, GrammarSpec, Request, SamplingParams, StoppingParams

torch.set_num_threads(1)
VOCAB = 128  # of support_models
LIMITS = StepLimits(16, 4, 64, 16)
KINDS = ["torch", "cuda", pytest.param("cpu", marks=pytest.mark.skipif(not isa.available(), reason="no kernels"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    write_random(made, "llama", num_hidden_layers=1)
    return made


def backend_of(kind: str, folder: Path) -> Any:
    if kind == "cuda":
        return CudaDriver(folder, num_blocks=24, limits=LIMITS, graphs=(2, 4), warm=ON_GPU)
    source = open_checkpoint(local_source(folder))
    program = program_of(source.config)
    if kind == "torch":
        backend: Any = TorchBackend(job_of(program, source, LIMITS))
    else:
        from support_cpu import kernel_folder

        from tokenmill.backends.cpu.backend import CpuBackend

        backend = CpuBackend(job_of(program, source, LIMITS, kernel_cache=str(kernel_folder()), cpu_threads=1))
    backend.allocate(24)
    return backend


def engine_of(backend: Any, grammars: Any) -> OfflineEngine:
    limits = backend.limits
    constraints = Constraints(VOCAB, grammars)
    scheduler = Scheduler(
        BlockPool(backend.num_blocks, 16),
        SchedulerLimits(limits.max_batch_tokens, limits.max_batch_size, limits.max_total_tokens, 16),
    )
    info = EngineInfo("tiny", "float32", "cpu", "x", backend.num_blocks, 16, VOCAB, 63, 64, 16, 4)
    parts = Assembled(scheduler, Executor(backend, limits.max_batch_size, constraints), info, constraints)
    parts._resources.callback(backend.close)
    return OfflineEngine(parts)


def answer(engine: OfflineEngine, request_id: int) -> tuple[list[int], str]:
    try:
        outputs = list(engine.outputs(request_id))
    except GenerationError:
        return [], "error"
    return [t for o in outputs for t in o.token_ids], outputs[-1].finish_reason


def asked(rng: random.Random) -> dict[str, Any]:
    params = SamplingParams(
        temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(1000), top_p=rng.choice([1.0, 0.8]),
        repetition_penalty=rng.choice([1.0, 1.3]), logprobs=rng.choice([-1, -1, 1]), raw_logprobs=rng.random() < 0.5,
    )  # fmt: skip
    spec, stopping = None, StoppingParams(rng.randint(1, 24), stop_ids=rng.choice([(), (0,)]))
    kind = rng.choice(["free", "grammar", "after", "budget"])
    if kind in ("grammar", "after"):
        spec = GrammarSpec("fake", str(rng.randrange(1000)), ((7,), (9,), (60,)) if kind == "after" else ())
    if kind == "budget":
        stopping = StoppingParams(24, force_after=rng.randint(1, 9), forced_ids=(100, 101, 102), unless=((7,),))
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))]
    return {"prompt_ids": prompt, "sampling": params, "stopping": stopping, "grammar": spec}


@pytest.mark.parametrize("kind", [KINDS[0], pytest.param("cuda", marks=pytest.mark.slow), KINDS[2]])
def test_a_crowd_with_rules_gets_what_each_gets_alone(kind: str, folder: Path) -> None:
    rng = random.Random(1)
    requests = [asked(rng) for _ in range(40)]
    if kind == "cuda" and not ON_GPU:
        thought = StoppingParams(6, force_after=2, forced_ids=(100, 101, 102), unless=((7,),))
        spec = GrammarSpec("fake", "5")
        requests = [
            {"prompt_ids": [5, 6], "stopping": thought},
            {"prompt_ids": [8], "stopping": StoppingParams(4), "grammar": spec},
        ]
    with engine_of(backend_of(kind, folder), Ready(random.Random())) as engine:
        alone = [answer(engine, engine.submit(**r)) for r in requests]
        assert engine.stats.forced_tokens > 0
    with engine_of(backend_of(kind, folder), Ready(random.Random())) as engine:
        ids = [engine.submit(**r) for r in requests]
        crowd = [answer(engine, i) for i in ids]
        assert engine.stats.blocks_used == 0 or engine.step()
    if kind == "torch":  # not batch-invariant: float32 makes the differences too small to change a token here
        assert sum(a == b for a, b in zip(alone, crowd, strict=True)) >= len(crowd) - 2
    else:
        assert crowd == alone
    thoughts = [tokens for r, (tokens, _) in zip(requests, crowd, strict=True) if r["stopping"].force_after]
    assert thoughts
    for tokens in thoughts:
        assert 7 in tokens[:9] or (100, 101, 102) in zip(tokens, tokens[1:], tokens[2:], strict=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_deferred_step_waits_for_its_masks_and_is_given_up_without(kind: str, folder: Path) -> None:
    backend = backend_of(kind, folder)
    request = Request(1, (5, 6, 7), SamplingParams(), StoppingParams(9))
    admitted = (Admitted(0, request, np.array([5, 6, 7], np.int32)),)
    row = [np.array([n], np.int32) for n in (0, 0, 3, 0)]
    inputs = StepInputs(*row, admitted, np.array([(0, 0, 0, 3)], np.int32), deferred=True)
    step = backend.run(inputs)
    step.sample(Masks(np.array([0], np.int32), np.array([[0, 0, 1 << 9, 0]], np.uint32)))
    assert step.result().token_ids == [64 + 9]
    host_tokens = np.array([(0, 3, 11), (0, 4, 12)], np.int32)
    row = [np.array([n], np.int32) for n in (0, 3, 2, 0)]
    mixed = backend.run(StepInputs(*row, host_tokens=host_tokens)).result().token_ids
    fresh = (Admitted(0, request, np.array([5, 6, 7, 11, 12], np.int32)),)
    row = [np.array([n], np.int32) for n in (0, 0, 5, 0)]
    again = replace(inputs, counts=np.array([5], np.int32), admitted=fresh, deferred=False)
    assert backend.run(again).result().token_ids == mixed, "tokens from the host were computed, not sampled ones"
    with pytest.raises(OutOfMemory):
        backend.run(replace(again, deferred=True)).result()
    backend.run(replace(again, deferred=True))
    backend.close()


def test_answers_follow_a_grammar_over_the_models_own_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    write_random(tmp_path, "llama", num_hidden_layers=1, vocab_size=608)
    tokenizer = byte_level()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    options = BackendOptions(backend="torch", dtype="float32")
    wants = EngineOptions(backend=options, max_total_tokens=200, grammars=True, memory_limit=1 << 28)
    schema = {"type": "object", "properties": {"color": {"enum": ["red", "green"]}}, "required": ["color"],
              "additionalProperties": False}  # fmt: skip
    spec = GrammarSpec("json_schema", json.dumps(schema, separators=(",", ":")))
    with OfflineEngine(assemble(local_source(tmp_path), wants, Group(), lambda _: None)) as engine:
        for stop_ids in ((2,), ()):
            params = [SamplingParams(temperature=1.0, seed=i) for i in range(5)]
            ids = [engine.submit([5, 6], p, StoppingParams(150, stop_ids=stop_ids), grammar=spec) for p in params]
            for request_id in ids:
                tokens, reason = answer(engine, request_id)
                assert json.loads(tokenizer.decode(tokens))["color"] in ("red", "green")
                assert reason == "stop"
        refused = engine.submit([5, 6], grammar=GrammarSpec("regex", "(a"))
        with pytest.raises(GenerationError, match="not closed"):
            list(engine.outputs(refused))
