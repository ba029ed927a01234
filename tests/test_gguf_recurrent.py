"""GGUF's architectures with a state per sequence: a model as llama.cpp's converter writes it equals transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support_gguf import converted, sizes, told
from support_models import Driver, steps, write_model
from support_slow import mostly_slow
from support_states import STATES
from test_gguf_config import assert_equal_to, write

from tokenmill.errors import StartError
from tokenmill.models.base import program_of
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source

torch.set_num_threads(1)
EPS = {"attention__layer_norm_rms_epsilon": 1e-5, "attention__layer_norm_epsilon": None}
NO_HEADS = {
    "attention__head_count": 0, "attention__head_count_kv": None, "feed_forward_length": 0, "block_count": 2,
    "context_length": 1 << 20, "attention__key_length": None, "attention__value_length": None, **EPS,
}  # fmt: skip
MIDDLE = {"attention__head_count_kv": [0, 2, 0]}
FOLDED = dict.fromkeys(("embedding_scale", "attention__scale", "residual_scale", "logit_scale"))
DELTA = {"full_attention_interval": 2, "rope__dimension_count": 4}
SECTIONS = {"rope__dimension_sections": [1, 1, 0, 0]}
NO_EXPERTS = dict.fromkeys(("expert_count", "expert_used_count", "expert_feed_forward_length",
                            "expert_shared_feed_forward_length"))  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "mamba": ("mamba", "mamba", {}, NO_HEADS | {"ssm__dt_b_c_rms": False}),
    "mamba_with_biases": ("mamba", "mamba_with_biases", {}, NO_HEADS),
    "falcon_mamba": ("mamba", "falcon_mamba", {"mixer_rms_eps": 1e-5}, NO_HEADS | {"ssm__dt_b_c_rms": True}),
    "mamba2": ("mamba2", "mamba2", {}, NO_HEADS),
    "jamba": ("jamba", "jamba", {}, MIDDLE),
    "jamba_dense": ("jamba", "jamba", {"num_experts": 1}, MIDDLE | {"expert_count": 1}),
    "granitehybrid": ("granitehybrid", "granitemoehybrid", {"position_embedding_type": None}, MIDDLE | {
        "rope__scaling__finetuned": False}),
    "granitehybrid_dense": ("granitehybrid", "granitemoehybrid_dense", {}, MIDDLE | {
        "expert_count": 0, "expert_used_count": 0}),
    "nemotron_h": ("nemotron_h", "nemotron_h", {"time_step_min": 1e-9}, NO_EXPERTS | {
        "block_count": 4, "attention__head_count_kv": [0, 0, 2, 0], "feed_forward_length": [0, 48, 0, 0],
        "attention__layer_norm_rms_epsilon": 1e-5}),
    "nemotron_h_moe": ("nemotron_h_moe", "nemotron_h_experts", {"time_step_min": 1e-9}, {
        "block_count": 4, "attention__head_count_kv": [0, 0, 2, 0], "feed_forward_length": [0, 24, 0, 24],
        "attention__layer_norm_rms_epsilon": 1e-5, "expert_group_count": 2, "expert_group_used_count": 1,
        "expert_weights_norm": True, "expert_weights_scale": 1.5, "expert_shared_count": 1}),
    "falcon-h1": ("falcon-h1", "falcon_h1", {}, FOLDED),
    "falcon-h1_normalized": ("falcon-h1", "falcon_h1_normalized_last", {"projectors_bias": False}, FOLDED),
    "lfm2": ("lfm2", "lfm2", {"block_auto_adjust_ff_dim": False}, MIDDLE | EPS),
    "lfm2moe": ("lfm2moe", "lfm2_moe", {"tie_word_embeddings": True}, MIDDLE | EPS | {
        "leading_dense_block_count": 1, "expert_gating_func": 2, "expert_weights_scale": 2.0}),
    "kimi-linear": ("kimi-linear", "kimi_linear", {"first_k_dense_replace": 0}, EPS | {
        "attention__head_count_kv": [0, 1, 0], "attention__kv_lora_rank": 16, "attention__key_length": 32,
        "attention__value_length": 16, "attention__key_length_mla": 24, "attention__value_length_mla": 16,
        "rope__dimension_count": 16, "kda__head_dim": 16, "ssm__conv_kernel": 4, "expert_count": 4,
        "expert_used_count": 2, "expert_shared_count": 1, "leading_dense_block_count": 0, "expert_gating_func": 2,
        "expert_weights_scale": 2.446}),
    "qwen3next": ("qwen3next", "qwen3_next", {"norm_topk_prob": True}, DELTA),
    "qwen35": ("qwen35", "qwen3_5", {"linear_num_value_heads": 4}, DELTA | SECTIONS),
    "qwen35moe": ("qwen35moe", "qwen3_5_moe", {}, DELTA | SECTIONS),
}  # fmt: skip
QUICK = ("mamba2", "jamba", "granitehybrid", "nemotron_h_moe", "lfm2moe", "qwen35moe")
"""Cases that run without --slow."""


def made(folder: Path, case: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Write a checkpoint. Return transformers' model, the file's tensors, and its keys."""
    architecture, family, changes, keys = CASES[case]
    model_type, fields = STATES[family]
    model = write_model(folder, model_type, fields | changes)
    return model, converted(folder, architecture), told(model.config) | sizes(model.config) | keys


@pytest.mark.parametrize("case", mostly_slow(CASES, QUICK))
def test_a_model_of_each_architecture_equals_transformers(tmp_path: Path, case: str) -> None:
    model, tensors, keys = made(tmp_path / "hf", case)
    assert_equal_to(model, write(tmp_path / "m.gguf", CASES[case][0], tensors, **keys))


@pytest.mark.parametrize("case", ["qwen35moe", "granitehybrid", "jamba"])
def test_quantized_tensors_are_their_numbers_in_other_orders_of_rows_and_columns(tmp_path: Path, case: str) -> None:
    _, tensors, keys = made(tmp_path / "hf", case)
    kind, coded, floats = gguf.GGMLQuantizationType.Q8_0, dict(tensors), dict(tensors)
    for name, (array, _) in tensors.items():
        if array.ndim > 1 and array.shape[-1] % 32 == 0 and name.endswith(".weight"):
            coded[name] = gguf.quants.quantize(array, kind), kind
            floats[name] = gguf.quants.dequantize(coded[name][0], kind), None
    paths = [write(tmp_path / f"{i}.gguf", CASES[case][0], each, **keys) for i, each in enumerate((coded, floats))]
    first, second = (Driver.of(path) for path in paths)
    for rows in steps():
        np.testing.assert_array_equal(first.feed(rows), second.feed(rows))


@pytest.mark.parametrize(
    "case, keys, words",
    [
        ("jamba", {"attention__head_count_kv": [2, 0, 2]}, None),
        ("jamba", {"attention__head_count_kv": [2, 2, 0]}, r"layers with attention are \[0, 1\] of 3, not every so"),
        ("jamba", {"attention__head_count_kv": [0, 0, 0]}, r"head_count_kv = \[\]|layers with attention are \[\]"),
        ("lfm2", {"attention__head_count_kv": [0, 2]}, r"head_count_kv' is a list of 2 numbers for 3 layers"),
        ("lfm2", {"attention__head_count_kv": [0, 2, -1]}, r"head_count_kv' is -?\w+|head_count_kv = "),
        ("nemotron_h", {"feed_forward_length": [0, 48, 0]}, r"feed_forward_length' is a list of 3 numbers for 4"),
        ("mamba2", {"ssm__time_step_rank": 128}, r"ssm.time_step_rank' is 128, of 64 columns"),
        ("mamba2", {"ssm__inner_size": None}, r"lacks the key 'mamba2.ssm.inner_size'"),
        ("granitehybrid", {"rope__scaling__finetuned": True}, r"architecture 'granitehybrid with rotation'"),
        ("qwen3next", {"ssm__group_count": 3}, r"3 key heads for 4 value heads"),
        ("kimi-linear", {"attention__head_count_kv": [0, 1]}, r"head_count_kv' is \[0, 1\]"),
        ("kimi-linear", {"expert_group_count": 3, "expert_feed_forward_length": 32}, r"3 groups|n_group"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, case: str, keys: dict[str, Any], words: str | None
) -> None:
    embed = {"token_embd.weight": (np.zeros((7, 32), np.float32), None)}
    given = EPS | {"embedding_length": 32, "ssm__inner_size": 64, "ssm__state_size": 8, "ssm__conv_kernel": 4,
                   "ssm__time_step_rank": 4, "ssm__group_count": 2, "shortconv__l_cache": 3}  # fmt: skip
    path = write(tmp_path / "m.gguf", CASES[case][0], embed, **(given | CASES[case][3] | keys))
    if words is None:
        assert open_checkpoint(local_source(path)).config["attn_layer_period"] == 2
        return
    with pytest.raises(StartError, match=words):
        program_of(open_checkpoint(local_source(path)).config)
