"""Every family against transformers, on tiny random checkpoints: paged, chunked, mixed steps equal a dense forward."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_jobs import job_of
from support_models import (
    FAMILIES,
    LLAMA3,
    OFTEN,
    SIZES,
    YARN,
    Driver,
    make_checkpoint,
    prompts,
    reference,
    steps,
)
from support_ranks import of_ranks
from support_slow import mostly_slow

from tokenmill.backends.base import StepLimits
from tokenmill.backends.torch.backend import TorchBackend
from tokenmill.errors import ArgumentError, ModelError, NotEnoughMemory, Unsupported
from tokenmill.models.base import program_of
from tokenmill.program import ops
from tokenmill.program.cost import cache_layout
from tokenmill.program.shard import shard
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import Progress

torch.set_num_threads(1)


SHARED = ("llama", "gpt_bigcode", "falcon", "gemma3_text", "qwen3_moe", "deepseek_v3")
"""A family of each way to share weights."""
MIXTURES = [name for name, (_, fields) in FAMILIES.items() if any("expert" in field for field in fields)]
PLAIN = [name for name, (model_type, _) in FAMILIES.items() if name == model_type]
"""The form of each model type that its class has by default."""


@pytest.fixture(scope="module", params=mostly_slow(FAMILIES, OFTEN))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("family") / request.param
    return folder, make_checkpoint(folder, request.param)


@pytest.mark.parametrize("case", mostly_slow(FAMILIES, PLAIN), indirect=True)
def test_logits_equal_transformers_in_prefill_chunks_decode_and_all_at_once(case: tuple[Path, Any]) -> None:
    folder, model = case
    backend = Driver.of(folder)
    for rows, want in zip(steps(), reference(model, steps()), strict=True):
        np.testing.assert_allclose(backend.feed(rows), want, rtol=1e-4, atol=1e-4 * np.abs(want).max() / 10)
    backend.close()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", mostly_slow(FAMILIES, SHARED), indirect=True)
def test_ranks_share_every_family_whether_they_divide_its_sizes_or_not(case: tuple[Path, Any], size: int) -> None:
    folder, model = case
    source = open_checkpoint(local_source(folder))
    program, wanted = program_of(source.config), reference(model, steps())
    for got in of_ranks(program, source, size, steps()):
        for found, want in zip(got, wanted, strict=True):
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4 * np.abs(want).max() / 10)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", mostly_slow(MIXTURES, ("qwen3_moe", "gpt_oss")), indirect=True)
def test_ranks_may_have_whole_experts(case: tuple[Path, Any], size: int) -> None:
    folder, model = case
    source = open_checkpoint(local_source(folder))
    program, wanted = program_of(source.config), reference(model, steps())
    experts = [op for op in shard(program, size, whole_experts=True).ops if isinstance(op, ops.Experts)]
    whole = [op for op in program.ops if isinstance(op, ops.Experts)]
    assert [len(op.down) for op in experts] == [-(-len(op.down) // size) for op in whole]
    assert [op.down[0].width for op in experts] == [op.down[0].columns for op in whole]
    for got in of_ranks(program, source, size, steps(), expert_parallel=True):
        for found, want in zip(got, wanted, strict=True):
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4 * np.abs(want).max() / 10)


def test_whole_experts_need_experts_and_ranks() -> None:
    with pytest.raises(ArgumentError, match="no layer of this model has experts"):
        shard(program_of({"model_type": "llama", **SIZES}), 2, whole_experts=True)
    with pytest.raises(ArgumentError, match="one rank, which has all experts"):
        shard(program_of({"model_type": "mixtral", **SIZES, "num_local_experts": 2}), 1, whole_experts=True)


@pytest.mark.parametrize("block_size", [1, 7, 32])
def test_the_size_of_a_block_changes_nothing(tmp_path: Path, block_size: int) -> None:
    model = make_checkpoint(tmp_path, "mistral_window")
    backend = Driver.of(tmp_path, limits=StepLimits(256, 4, 256, block_size), num_blocks=200)
    for rows, want in zip(steps(), reference(model, steps()), strict=True):
        np.testing.assert_allclose(backend.feed(rows), want, rtol=1e-4, atol=1e-4)


def test_a_prompt_longer_than_a_run_equals_one_forward(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama", max_position_embeddings=1024)
    ids = np.random.default_rng(5).integers(0, 128, 700).tolist()
    backend = Driver.of(tmp_path, limits=StepLimits(1024, 4, 1024, 16), num_blocks=100)
    rows = [[(0, ids[:3]), (1, ids[:450])], [(1, ids[450:]), (0, [5])]]
    for some, want in zip(rows, reference(model, rows), strict=True):
        np.testing.assert_allclose(backend.feed(some), want, rtol=1e-4, atol=1e-4)


def test_many_sequences_of_all_lengths_share_a_step_as_if_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen2_window")
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 128, n).tolist() for n in rng.integers(1, 120, 24)]
    limits = StepLimits(4096, 24, 256, 16)
    together = Driver.of(tmp_path, limits=limits, num_blocks=400)
    first = together.feed([(i, ids) for i, ids in enumerate(sequences)])
    second = together.feed([(i, [i]) for i in range(len(sequences))])
    for i in (0, 5, 11, 23):
        alone = Driver.of(tmp_path, limits=limits, num_blocks=400)
        np.testing.assert_allclose(alone.feed([(i, sequences[i])])[0], first[i], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(alone.feed([(i, [i])])[0], second[i], rtol=1e-4, atol=1e-4)


def test_dynamic_rope_beyond_the_models_length_equals_transformers_token_by_token(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama_dynamic", max_position_embeddings=32)
    (_, ids, _), cache, want = prompts(), None, []
    with torch.no_grad():
        for chunk in (ids[:30], *[[i] for i in ids[30:]], [3], [4], [5]):
            out = model(torch.tensor([chunk]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            want.append(out.logits[0, -1].numpy())
    backend = Driver.of(tmp_path)
    got = [backend.feed([(0, chunk)])[0] for chunk in (ids[:30], ids[30:], [3], [4], [5])]
    for g, w in zip(got, [want[0], *want[-4:]], strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sharded_files_of_half_precision_are_read_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_checkpoint(tmp_path, "llama", dtype=dtype, shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    backend = Driver.of(tmp_path)
    for rows, want in zip(steps(), reference(model, steps()), strict=True):
        np.testing.assert_allclose(backend.feed(rows), want, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "qwen3", dtype=torch.bfloat16)
    backend = Driver.of(tmp_path, dtype="bfloat16")
    for rows, want in zip(steps(), reference(model, steps()), strict=True):
        assert np.corrcoef(backend.feed(rows).ravel(), want.ravel())[0, 1] > 0.999


def test_the_bytes_of_a_block_and_of_a_step_are_known_before_they_are_needed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", vocab_size=50_000)
    backend = Driver.of(tmp_path, num_blocks=8)
    assert backend.block_bytes() * 8 == sum(cache.nbytes for cache in backend._cache.values())
    assert backend.block_bytes() == 3 * 2 * 2 * 32 * 4 * 16  # layers, key and value, heads, head size, bytes, tokens
    assert backend.step_bytes() > 4 * 128 * 50_000 * 4  # four copies of the logits of 128 rows


@pytest.mark.parametrize("family", ["bloom", "gemma2"])
def test_scores_of_all_heads_count_among_the_bytes_of_a_step(tmp_path: Path, family: str) -> None:
    make_checkpoint(tmp_path, family)
    source = open_checkpoint(local_source(tmp_path))
    program = program_of(source.config)
    plain = replace(
        program,
        ops=tuple(
            replace(op, alibi=(), softcap=0.0) if isinstance(op, ops.Attention) else op
            for op in program.ops
        ),
    )
    with_scores, without = (Driver(p, source).step_bytes() for p in (program, plain))
    assert with_scores - without == 4 * (256 * 256) * 16  # heads, pairs of tokens, bytes of two copies and a softmax


def test_a_cache_that_cannot_be_had_is_said_with_its_size(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    with pytest.raises(NotEnoughMemory, match=r"1125899906842624 blocks needs \d{19,} bytes"):
        Driver.of(tmp_path, num_blocks=8).allocate(1 << 50)


def test_an_unknown_dtype_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    with pytest.raises(ArgumentError, match=r"'int3' is not known\. Allowed: float32, bfloat16, float16"):
        Driver.of(tmp_path, dtype="int3")


def test_loading_reports_every_byte_of_the_file(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    source, seen = open_checkpoint(local_source(tmp_path)), list[Progress]()
    limits = StepLimits(64, 4, 64, 16)
    program = program_of(source.config)
    TorchBackend(job_of(program, source, limits, report=seen.append)).close()
    assert {p.total for p in seen} == {sum(source.nbytes(name) for name in source.names())}
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].done == seen[-1].total


def test_warming_up_leaves_no_trace(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    cold, warm = Driver.of(tmp_path), Driver.of(tmp_path)
    warm.warm_up()
    assert not any(cache.any() for cache in warm._cache.values())
    for rows in steps():
        np.testing.assert_array_equal(cold.feed(rows), warm.feed(rows))


def test_prompt_logprobs_are_those_of_one_forward(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama")
    backend = Driver.of(tmp_path)
    (_, ids, _) = prompts()
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    backend.known, backend.tables = {}, {}
    inputs = backend.inputs([(1, ids)], prompt_logprobs=2)
    payloads = backend.run(inputs).result().payloads
    assert payloads is not None
    assert payloads[0].start == 1
    assert [d.logprob for d in payloads[0].details] == pytest.approx(
        [float(want[i, t]) for i, t in enumerate(ids[1:])], abs=1e-4
    )
    assert [d.top_ids for d in payloads[0].details] == [tuple(row.topk(2).indices.tolist()) for row in want[:-1]]


def test_a_sequence_of_nan_does_not_reach_those_that_use_its_blocks_later(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    clean, dirty = Driver.of(tmp_path), Driver.of(tmp_path)
    for cache in dirty._cache.values():
        cache.fill_(float("nan"))
    for rows in steps():
        np.testing.assert_array_equal(clean.feed(rows), dirty.feed(rows))


@pytest.mark.parametrize(
    "scaling", [LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2}]
)
def test_old_and_new_ways_to_write_rope_scaling_give_the_same_program(scaling: dict[str, Any]) -> None:
    old = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": scaling, **SIZES}
    kind = {k: v for k, v in scaling.items() if k != "type"} | {
        "rope_type": scaling.get("type", scaling.get("rope_type"))
    }
    new = {"model_type": "llama", "rope_parameters": {**kind, "rope_theta": 5e5}, **SIZES}
    assert str(program_of(old)) == str(program_of(new))


def test_a_window_shows_in_the_cache_layout() -> None:
    config = {"model_type": "qwen2", **SIZES, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert [layer.window for layer in cache_layout(program_of(config)).values()] == [0, 8, 8]
    assert [layer.window for layer in cache_layout(program_of(config | {"use_sliding_window": False})).values()] == [
        0
    ] * 3


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"model_type": "unheard"}, Unsupported, "'unheard' is not supported. Supported:"),
        ({"model_type": None}, ModelError, "no model_type"),
        ({"hidden_size": "wide"}, ModelError, "hidden_size"),
        ({"num_hidden_layers": 1 << 40}, ModelError, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, ModelError, "3 key-value heads for 4 heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, ModelError, "5 heads do not divide hidden_size 64"),
        ({"hidden_act": "swish7"}, ModelError, "hidden_act"),
        ({"rope_scaling": {"rope_type": "ntk"}}, Unsupported, "ntk"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, ModelError, "rope_scaling"),
        ({"rope_scaling": 7}, ModelError, "rope_scaling"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_with_its_field(
    change: dict[str, Any], error: type, words: str
) -> None:
    with pytest.raises(error) as found:
        program_of({"model_type": "llama", **SIZES, **change})
    assert words in str(found.value)


def test_a_tensor_of_another_size_is_refused_by_name(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ModelError, match=r"'model.layers.0.mlp.gate_proj.weight' has shape \(128, 64\).*\(96, 64\)"):
        Driver.of(tmp_path)


def test_a_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    source = open_checkpoint(local_source(tmp_path))
    with pytest.raises(ModelError, match=r"no tensor 'model.layers.3.input_layernorm.weight'"):
        Driver(program_of(source.config | {"num_hidden_layers": 4}), source)


def test_the_cache_of_latent_attention_is_one_compressed_row_a_token(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3")
    backend = Driver.of(tmp_path, num_blocks=8)
    assert backend.block_bytes() * 8 == sum(cache.nbytes for cache in backend._cache.values())
    assert backend.block_bytes() == 3 * (32 + 16) * 4 * 16  # layers, latent and rotated key, bytes, tokens
