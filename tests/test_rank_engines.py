"""Engines of several ranks, as threads, give the tokens of one rank: quantized weights, experts, an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support_encoded
import torch
from support_models import Driver, make_checkpoint
from support_quantized import quantize_folder
from support_ranks import engines_of_ranks, of_ranks
from support_slow import mostly_slow
from test_quant_stored import CASES
from test_quant_whole import LINEAR, MIXED, mixed

from tokenmill.backends.kind import BackendOptions
from tokenmill.models.base import program_of
from tokenmill.parallel.group import Group
from tokenmill.runtime.assembly import EngineOptions, assemble
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import SamplingParams, StoppingParams

torch.set_num_threads(1)
UNEVEN = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 131}
"""Sizes that 4 ranks do not divide: the second query head of two places is empty."""
OFTEN = ("mixed",)


def options(**given: Any) -> EngineOptions:
    return EngineOptions(
        backend=BackendOptions(backend="torch", device="cpu", **given), block_size=4, max_batch_tokens=13,
        max_batch_size=4, max_total_tokens=64, memory_limit=512 << 20,
    )  # fmt: skip


def answers(engine: OfflineEngine) -> list[list[int]]:
    """Return the tokens of greedy and sampled requests that share steps."""
    rng, asked = np.random.default_rng(2), []
    for i in range(4):
        sampling = SamplingParams(temperature=(0.0, 1.0)[i % 2], top_p=0.9, seed=i, repetition_penalty=1.1)
        asked.append(engine.submit(rng.integers(1, 128, 5 + 3 * i).tolist(), sampling, StoppingParams(8)))
    return [[t for output in engine.outputs(request) for t in output.token_ids] for request in asked]


def one_rank(folder: Path, ask: Any = answers, **given: Any) -> Any:
    with OfflineEngine(assemble(local_source(folder), options(**given), Group(), lambda _: None)) as engine:
        return ask(engine)


@pytest.mark.parametrize("name", mostly_slow([*CASES, "mixed"], OFTEN))
def test_quantized_weights_that_ranks_share_give_the_tokens_of_one_rank(name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", **UNEVEN)
    about, write = (MIXED, mixed) if name == "mixed" else CASES[name]
    quantize_folder(tmp_path, about, mixed if name == "mixed" else lambda m: write if m.endswith(LINEAR) else None)
    assert engines_of_ranks(local_source(tmp_path), 4, options(), answers) == one_rank(tmp_path)


@pytest.mark.parametrize("method", mostly_slow(["int4", "fp8", "eetq"], ("fp8",)))
def test_weights_that_ranks_quantize_give_the_tokens_of_one_rank(method: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", **UNEVEN)
    wants = options(quantize=method)
    assert engines_of_ranks(local_source(tmp_path), 3, wants, answers) == one_rank(tmp_path, quantize=method)


@pytest.mark.parametrize("whole", [False, True])
def test_experts_that_ranks_share_or_have_whole_give_the_tokens_of_one_rank(whole: bool, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen2_moe", **UNEVEN | {"num_experts": 5})
    wants = options(expert_parallel=whole)
    assert engines_of_ranks(local_source(tmp_path), 3, wants, answers) == one_rank(tmp_path)


@pytest.mark.parametrize("family", mostly_slow(support_encoded.FAMILIES, ("flan-t5",)))
def test_an_encoder_and_a_decoder_that_ranks_share_give_the_tokens_of_one_rank(family: str, tmp_path: Path) -> None:
    support_encoded.save(tmp_path, family)
    prompts = [[*range(3 + i, 12 + 4 * i), support_encoded.START] for i in range(4)]

    def ask(engine: OfflineEngine) -> list[list[int]]:
        return engine.generate(prompts, None, StoppingParams(8))

    assert engines_of_ranks(local_source(tmp_path), 2, options(), ask) == one_rank(tmp_path, ask)


@pytest.mark.parametrize("size", mostly_slow([2, 3, 4], (2,)))
def test_ranks_share_the_embedded_model_whose_heads_they_do_not_divide(size: int, embedded_model: Path) -> None:
    """It has 9 query heads, 3 key-value heads, and matrices in blocks of 32 columns."""
    source = open_checkpoint(local_source(embedded_model))
    program, rows = program_of(source.config), [[(0, list(range(3, 20)))], [(0, [9])]]
    driver = Driver(program, source)
    wanted = [driver.feed([(slot, list(ids)) for slot, ids in some]) for some in rows]
    driver.close()
    for got in of_ranks(program, source, size, rows):
        for found, want in zip(got, wanted, strict=True):
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
