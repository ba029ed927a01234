"""The CUDA backend against the torch backend: on a GPU if there is one, else under Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_cuda import DEVICE, ON_GPU, CudaDriver, altered, cuda_job, torch, write_random
from support_jobs import job_of
from support_models import Driver, make_checkpoint, steps
from support_slow import mostly_slow

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda.backend import CudaBackend
from tokenmill.backends.cuda.prepare import fused, refusal
from tokenmill.backends.cuda.products.base import Operands, Scratch
from tokenmill.backends.cuda.products.dense import Dense
from tokenmill.backends.torch.backend import TorchBackend
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.scheduler import Scheduler, SchedulerLimits
from tokenmill.models.base import program_of
from tokenmill.runtime.assembly import Assembled
from tokenmill.runtime.executor import Executor
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import EngineInfo, SamplingParams, StoppingParams

torch.set_num_threads(1)
EVERYTHING = [
    "gpt2", "gpt_bigcode", "gpt_neo", "opt_norms_behind", "falcon_grouped", "starcoder2_window", "phi3",
    "apertus", "hunyuan_v1_dense", "ministral3", "olmo", "persimmon",
    "exaone4", "gemma2", "gemma3_text", "olmo2", "llama_tied_with_biases", "llama_dynamic", "llama_yarn",
    "mistral_window", "qwen2_window", "qwen3",
]  # fmt: skip


def some_of(names: list[str], count: int) -> list[str]:
    return names if ON_GPU else names[-count:]


def torch_driver(folder: Path, **attention: object) -> Driver:
    source = open_checkpoint(local_source(folder))
    return Driver(altered(program_of(source.config), **attention), source)


def assert_same(folder: Path, rows_of_steps: list[list[tuple[int, list[int]]]], **how: object) -> None:
    """Assert that the logits of every step are equal, in float32."""
    driver = CudaDriver(folder, **how)  # type: ignore[arg-type]
    attention = {name: how[name] for name in ("window", "softcap") if name in how}
    expected = torch_driver(folder, **attention)
    for rows in rows_of_steps:
        np.testing.assert_allclose(driver.feed(rows), expected.feed(rows), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", mostly_slow(some_of(EVERYTHING, 3), ["qwen3"]))
def test_logits_of_mixed_steps_equal_the_torch_backends(family: str, tmp_path: Path) -> None:
    write_random(tmp_path, family, num_hidden_layers=3 if ON_GPU else 2)
    assert_same(tmp_path, steps() if ON_GPU else steps()[:4])


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256] if ON_GPU else mostly_slow([16, 80], []))
def test_heads_of_any_size(head_dim: int, tmp_path: Path) -> None:
    write_random(tmp_path, "qwen3", head_dim=head_dim, num_attention_heads=6, num_hidden_layers=2 if ON_GPU else 1)
    assert_same(tmp_path, steps() if ON_GPU else steps()[:3])


@pytest.mark.parametrize("family", mostly_slow(["glm", "gpt_neox", "ernie4_5"], ["ernie4_5"]))
def test_a_part_of_a_head_is_rotated_and_pairs_are_halves_or_neighbours(family: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family, num_hidden_layers=1)
    assert_same(tmp_path, steps()[:3])


@pytest.mark.slow
def test_scores_are_capped(tmp_path: Path) -> None:
    write_random(tmp_path, "llama", num_hidden_layers=2 if ON_GPU else 1)
    assert_same(tmp_path, steps()[:3], softcap=3.0, window=9)


@pytest.mark.slow
def test_long_contexts_are_split_and_added_up(tmp_path: Path) -> None:
    write_random(tmp_path, "llama", num_hidden_layers=1, max_position_embeddings=1024)
    ids = np.random.default_rng(0).integers(0, 128, 700 if ON_GPU else 400).tolist()
    limits = StepLimits(1024, 4, 1024, 16)
    driver, expected = CudaDriver(tmp_path, limits=limits, num_blocks=128), torch_driver(tmp_path)
    expected = Driver.of(tmp_path, limits=limits, num_blocks=128)
    for rows in ([(0, ids), (1, ids[:130])], [(0, [5]), (1, [6])], [(1, [7, 8, 9]), (0, [1])]):
        np.testing.assert_allclose(driver.feed(rows), expected.feed(rows), atol=2e-4, rtol=1e-3)


def engine_of(folder: Path, kind: str, num_blocks: int, limits: StepLimits, **how: Any) -> OfflineEngine:
    source = open_checkpoint(local_source(folder))
    program = program_of(source.config)
    backend: Any
    if kind == "cuda":
        backend = CudaBackend(cuda_job(program, source, limits, **how))
    else:
        backend = TorchBackend(job_of(program, source, limits))
    backend.allocate(num_blocks)
    if kind == "cuda" and ON_GPU:
        backend.warm_up()
    scheduler = Scheduler(
        BlockPool(num_blocks, limits.block_size),
        SchedulerLimits(limits.max_batch_tokens, limits.max_batch_size, limits.max_total_tokens, limits.block_size),
    )
    info = EngineInfo("tiny", "float32", "cpu", "torch", num_blocks, limits.block_size, 128, 63, 64, 1, 1)
    parts = Assembled(scheduler, Executor(backend, limits.max_batch_size), info)
    parts._resources.callback(backend.close)
    return OfflineEngine(parts)


def answers(engine: OfflineEngine, prompts: list[list[int]], params: list[SamplingParams], counts: list[int]):
    ids = [engine.submit(p, s, StoppingParams(n)) for p, s, n in zip(prompts, params, counts, strict=True)]
    return [[t for o in engine.outputs(i) for t in o.token_ids] for i in ids]


@pytest.mark.parametrize("family", ["llama", "mistral_window", "qwen3_yarn_tied"] if ON_GPU else ["mistral_window"])
def test_a_crowd_that_is_chunked_shared_and_preempted_gets_the_torch_backends_text(family: str, tmp_path: Path) -> None:
    write_random(tmp_path, family, num_hidden_layers=2 if ON_GPU else 1)
    rng = np.random.default_rng(1)
    size = 10 if ON_GPU else 3
    head = rng.integers(0, 128, 21).tolist()
    prompts = [head[: rng.integers(0, 22)] + rng.integers(0, 128, rng.integers(1, 9)).tolist() for _ in range(size)]
    counts = [int(n) for n in rng.integers(5, 30 if ON_GPU else 12, size)]
    params = [SamplingParams(temperature=float(i % 3) / 2, seed=i) for i in range(size)]
    limits = StepLimits(11, 5, 64, 4)
    blocks = 22 if ON_GPU else 12
    with engine_of(tmp_path, "cuda", blocks, limits) as engine:
        found = answers(engine, prompts, params, counts)
        assert engine.stats.preemptions > 0
        assert engine.stats.cached_tokens > 0
    with engine_of(tmp_path, "torch", blocks, limits) as engine:
        assert found == answers(engine, prompts, params, counts)


def test_logits_that_are_not_finite_are_told(tmp_path: Path) -> None:
    write_random(tmp_path, "llama", num_hidden_layers=1)
    driver = CudaDriver(tmp_path)
    matrices = driver._weights.matrices
    matrices[next(w for w in matrices if w.name == "lm_head.weight")]._matrix[77] = float("nan")
    assert driver.run(driver.inputs([(0, [1, 2, 3])])).result().token_ids == [-1]  # type: ignore[arg-type]


def test_what_it_cannot_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    write_random(tmp_path, "llama")
    program = program_of(open_checkpoint(local_source(tmp_path)).config)
    assert refusal(program, "bfloat16") == ""
    assert "heads of 300" in refusal(altered(fused(program), head_dim=300), "")


@pytest.mark.parametrize("rows", [1, 2, 16, 33, 64, 90, 150])
@pytest.mark.parametrize("act", ["", "silu"])
@pytest.mark.parametrize("outputs, columns", [(128, 512), (96, 128), (200, 256)])
def test_products_of_few_rows_are_products(rows: int, act: str, outputs: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    x, weight, bias = (
        torch.randn(shape, generator=draw).to(dtype).to(DEVICE)
        for shape in ((rows, columns), (outputs * (2 if act else 1), columns), (outputs * (2 if act else 1),))
    )
    whole, gated = (torch.full((rows, n), float("nan"), dtype=dtype, device=DEVICE) for n in (len(weight), outputs))
    operands = Operands(x, whole, bias, act, gated if act else None)
    product = Dense(weight).product(operands, Scratch(256, x.device), False)
    assert product.fits(rows) == (rows <= 32 or bool(act))
    assert product.applies_act(rows) == bool(act)
    out = gated if act else whole
    for _ in range(2):  # the second run finds counters as the first one did
        product.run(rows)
    expected = x.float() @ weight.float().T + bias.float()
    if act:
        gate, up = expected.chunk(2, -1)
        expected = torch.nn.functional.silu(gate) * up
    rough = 100 if ON_GPU else 1
    np.testing.assert_allclose(out.float().cpu(), expected.cpu(), rtol=2e-4 * rough, atol=1e-3 * rough)


def test_one_row_is_normed_before_and_added_to_behind() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight, norm, other = (torch.randn(s, generator=draw).to(DEVICE) for s in ((1, 128), (48, 128), (128,), (1, 48)))
    out = torch.empty(1, 48, device=DEVICE)
    Dense(weight).product(Operands(x, out * 0), Scratch(64, x.device), False).one((x, norm, 1e-5), (other, out))
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * norm
    np.testing.assert_allclose(out.cpu(), (other + normed @ weight.T).cpu(), rtol=1e-4, atol=1e-4)
