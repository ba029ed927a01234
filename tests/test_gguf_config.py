"""GGUF keys and tensors as llama.cpp reads them: the same results as transformers', or a refusal by name."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support_models import Driver, make_checkpoint, reference, steps
from test_gguf import finish, of_transformers

from tokenmill.errors import ModelError, StartError, Unsupported
from tokenmill.program.rope import RopeTable
from tokenmill.weights.checkpoint import model_config, open_checkpoint
from tokenmill.weights.source import local_source

torch.set_num_threads(1)
KEYS: dict[str, Any] = {
    "block_count": 3, "context_length": 256, "embedding_length": 64, "feed_forward_length": 128,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-6,
}  # fmt: skip
EMBED = {"token_embd.weight": (np.zeros((7, 64), np.float32), None)}


def write(path: Path, architecture: str, tensors: dict[str, Any], **keys: Any) -> Path:
    """Write a file of these tensors and KEYS, changed by `keys`. None: leave out the key. `__`: a dot.

    Keys that begin with xielu are written without the architecture.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (KEYS | {key.replace("__", "."): value for key, value in keys.items()}).items():
        name = key if key.startswith("xielu.") else f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    finish(writer, tensors)
    return path


def config_of(folder: Path, architecture: str = "llama", tensors: Any = EMBED, **keys: Any) -> dict[str, Any]:
    return model_config(local_source(write(folder / "m.gguf", architecture, tensors, **keys)))


def assert_equal_to(model: Any, path: Path) -> None:
    backend = Driver.of(path)
    for rows, want in zip(steps(), reference(model, steps()), strict=True):
        np.testing.assert_allclose(backend.feed(rows), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def tensors_of(model: Any, architecture: str) -> dict[str, Any]:
    tensors = of_transformers(model, 4, 2, architecture == "llama")
    if model.config.tie_word_embeddings:
        del tensors["output.weight"]
    return tensors


@pytest.mark.parametrize(
    "architecture, kept",
    [
        ("llama", r"attn_[qkv]"),
        ("llama", r"attn_q"),
        ("llama", r"1\.attn_[kv]"),
        ("llama", r"attn_output"),
        ("llama", r"ffn_down"),
        ("llama", r"(ffn_up|2\.attn_k)"),
        ("qwen2", r"attn_[qv]"),
        ("qwen2", r"0\.attn_[qkv]"),
        ("qwen3", r"attn_[qkv]"),
    ],
)
def test_biases_that_a_file_leaves_out_are_none(tmp_path: Path, architecture: str, kept: str) -> None:
    family = {"llama": "llama_tied_with_biases"}.get(architecture, architecture)
    more = {"attention_bias": True} if architecture == "qwen3" else {}
    model = make_checkpoint(tmp_path / "hf", family, num_attention_heads=4, head_dim=16, **more)
    tensors = tensors_of(model, architecture)
    left_out = {name for name in tensors if name.endswith(".bias") and not re.search(rf"{kept}\.bias$", name)}
    assert left_out
    tensors = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    parts = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj",
             "ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}  # fmt: skip
    for name, parameter in model.named_parameters():
        theirs = {f"blk.{i}.{a}.bias" for i in range(3) for a, b in parts.items() if f"s.{i}." in name and b in name}
        if name.endswith(".bias") and theirs & left_out:
            parameter.data.zero_()
    assert_equal_to(model, write(tmp_path / "m.gguf", architecture, tensors, attention__key_length=16))


def test_biases_of_a_qwen2_that_has_none_at_all_are_missed(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "hf", "qwen2")
    tensors = {name: a for name, a in tensors_of(model, "qwen2").items() if not name.endswith(".bias")}
    with pytest.raises(ModelError, match=r"no tensor 'model.layers.0.self_attn.q_proj.bias'"):
        Driver.of(write(tmp_path / "m.gguf", "qwen2", tensors))


def test_keys_that_are_left_out_or_lists_of_one_number_by_layer_are_read_as_llama_cpp_does(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "hf", "llama")
    tensors = tensors_of(model, "llama")
    plain = write(tmp_path / "plain.gguf", "llama", tensors)
    assert_equal_to(model, plain)
    lists = {"attention__head_count": [4] * 3, "attention__head_count_kv": [2] * 3, "feed_forward_length": [128] * 3}
    full = {"rope__freq_base": 1e4, "attention__key_length": 16, "attention__value_length": 16, "vocab_size": 128,
            "rope__dimension_count": 16, "rope__scaling__type": "none", "attention__causal": True,
            "expert_used_count": 0, "attention__scale": 0.0, "logit_scale": 1.0}  # fmt: skip
    for name, keys in (("lists", lists), ("full", full)):
        path = write(tmp_path / f"{name}.gguf", "llama", tensors, **keys)
        assert open_checkpoint(local_source(path)).config == open_checkpoint(local_source(plain)).config
        assert_equal_to(model, path)
    config = config_of(tmp_path, attention__head_count_kv=None)
    assert (config["num_key_value_heads"], config["rope_theta"], config["tie_word_embeddings"]) == (4, 1e4, True)


@pytest.mark.parametrize(
    "architecture, keys, words",
    [
        ("llama", {"rope__dimension_count": 8}, r"'llama.rope.dimension_count' is 8, but heads have 16 numbers"),
        ("qwen2", {"rope__dimension_count": 8}, r"'qwen2.rope.dimension_count' is 8, but heads have 16 numbers"),
        ("qwen3", {"rope__dimension_count": 8, "attention__key_length": 32}, r"is 8, but heads have 32 numbers"),
        ("llama", {"attention__value_length": 32}, r"value_length' is 32, but heads have 16"),
        ("llama", {"attention__head_count": [4, 4, 2]}, r"llama.attention.head_count = \[4, 4, 2\].*one shape"),
        ("qwen3", {"feed_forward_length": [128, 64, 128]}, r"feed_forward_length = \[128, 64, 128\]"),
        ("llama", {"attention__head_count_kv": [2, 2]}, r"a list of 2 numbers for 3 layers"),
        ("llama", {"attention__head_count": 0}, r"'llama.attention.head_count' is 0, not a whole number above 0"),
        ("llama", {"attention__head_count": "4"}, r"is '4', not a whole number"),
        ("llama", {"embedding_length": None}, r"lacks the key 'llama.embedding_length'"),
        ("llama", {"attention__sliding_window": 8}, r"'llama.attention.sliding_window' is not supported.*safetensors"),
        ("qwen2", {"attention__sliding_window": 8}, r"'qwen2.attention.sliding_window' is not supported"),
        ("llama", {"attention__scale": 0.5}, r"'llama.attention.scale' is not supported. It is 0.5"),
        ("llama", {"attention__causal": False}, r"'llama.attention.causal' is not supported"),
        ("llama", {"logit_scale": 0.25}, r"'llama.logit_scale' is not supported"),
        ("llama", {"embedding_scale": 12.0}, r"embedding_scale"),
        ("qwen2", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping"),
        ("qwen3", {"attention__clamp_kqv": 8.0}, r"clamp_kqv"),
        ("llama", {"use_parallel_residual": True}, r"use_parallel_residual"),
        ("llama", {"rope__scaling__yarn_log_multiplier": 0.1}, r"yarn_log_multiplier"),
        ("llama", {"rope__dimension_sections": [8, 4, 4, 0]}, r"dimension_sections"),
        ("llama", {"rope__scaling__type": "longrope"}, r"'longrope' is not supported. Supported: linear, none, yarn"),
        ("llama", {"rope__scaling__type": "yarn", "rope__scaling__factor": -2.0}, r"-2.0, not a number above 0"),
        ("llama", {"rope__scaling__attn_factor": 0.5}, r"attn_factor.*without yarn"),
    ],
)
def test_keys_that_change_numbers_in_a_way_that_is_not_computed_are_refused_by_name(
    tmp_path: Path, architecture: str, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(StartError, match=words):
        config_of(tmp_path, architecture, **keys)


def test_a_key_that_is_not_known_is_named_and_one_of_no_effect_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        config_of(tmp_path, attention__sliding_window=256, rope__scaling__finetuned=True, pooling_type=0)
    assert not caplog.records
    config_of(tmp_path, wholly_new=7)
    assert "keys that are not known here, and not heeded: llama.wholly_new." in caplog.text


def ggml_angles(
    dim: int, base: float, scale: float, original: int, kind: str, factors: Any = 1.0, betas: Any = (32, 1)
) -> np.ndarray:
    """Return radians per position of ggml's rope kernel: by pair, interpolated and ramped."""
    pair = np.arange(dim // 2)
    extrapolated = base ** (-2.0 * pair / dim) / factors
    interpolated = scale * extrapolated
    if kind != "yarn":
        return interpolated
    low, high = (dim * np.log(original / (beta * 2 * np.pi)) / (2 * np.log(base)) for beta in betas)
    low, high = max(0, np.floor(low)), min(dim - 1, np.ceil(high))
    mix = 1 - np.clip((pair - low) / max(0.001, high - low), 0, 1)
    return interpolated * (1 - mix) + extrapolated * mix


@pytest.mark.parametrize(
    "keys, kind, scale, length",
    [
        ({}, "none", 1.0, 256),
        ({"rope__scaling__factor": 4.0}, "linear", 0.25, 256),  # without a type it is linear
        ({"rope__scale_linear": 2.0}, "linear", 0.5, 256),
        ({"rope__scaling__factor": 4.0, "rope__scale_linear": 2.0}, "linear", 0.25, 256),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, "none", 1.0, 256),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0,
          "rope__scaling__original_context_length": 256}, "linear", 0.25, 1024),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0,
          "rope__scaling__original_context_length": 64}, "linear", 0.25, 256),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0,
          "rope__scaling__original_context_length": 64}, "yarn", 0.25, 256),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0,
          "rope__scaling__original_context_length": 256}, "yarn", 0.25, 1024),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__yarn_beta_fast": 8.0,
          "rope__scaling__yarn_beta_slow": 2.0, "rope__scaling__original_context_length": 64}, "yarn", 0.25, 256),
    ],
)  # fmt: skip
def test_rope_scaling_keys_turn_as_ggmls_kernel_and_lengthen_the_context_once(
    tmp_path: Path, keys: dict[str, Any], kind: str, scale: float, length: int
) -> None:
    config = config_of(tmp_path, **keys)
    table = RopeTable.of(16, config["rope_theta"], config["max_position_embeddings"], config["rope_scaling"])
    betas = (keys.get("rope__scaling__yarn_beta_fast", 32.0), keys.get("rope__scaling__yarn_beta_slow", 1.0))
    original = keys.get("rope__scaling__original_context_length", 256)
    want = ggml_angles(16, 1e4, scale, original, kind, betas=betas)
    np.testing.assert_allclose(table.inverse_frequencies(), want, rtol=1e-6)
    assert table.longest == length
    assert table.magnitude() == pytest.approx(1 + 0.1 * np.log(1 / scale) if kind == "yarn" else 1.0)


def test_a_tensor_of_rope_factors_divides_besides_a_linear_factor(tmp_path: Path) -> None:
    factors = np.array([1, 1, 2, 4, 8, 8, 8, 8], np.float32)
    tensors = {**EMBED, "rope_freqs.weight": (factors, None)}
    for keys, scale in (({}, 1.0), ({"rope__scaling__factor": 2.0}, 0.5), ({"rope__scaling__type": "none"}, 1.0)):
        config = config_of(tmp_path, tensors=tensors, **keys)
        got = RopeTable.of(16, 1e4, 256, config["rope_scaling"]).inverse_frequencies()
        np.testing.assert_allclose(got, ggml_angles(16, 1e4, scale, 256, "linear", factors), rtol=1e-6)
    with pytest.raises(Unsupported, match=r"yarn beside rope_freqs.weight"):
        config_of(tmp_path, tensors=tensors, rope__scaling__type="yarn", rope__scaling__factor=2.0)


@pytest.mark.parametrize(
    "architecture, name, rows",
    [
        ("qwen2", "rope_freqs.weight", 8),
        ("llama", "blk.0.attn_q_norm.weight", 16),
        ("llama", "blk.1.attn_sinks.weight", 4),
        ("llama", "blk.7.attn_norm.weight", 64),
        ("qwen2", "blk.0.attn_output.bias", 64),
        ("qwen3", "blk.0.ffn_down.bias", 64),
        ("llama", "output.bias", 128),
        ("llama", "blk.0.attn_output.scale", 1),
        ("qwen3", "cls.output.weight", 2),
        ("llama", "rope_factors_long.weight", 8),
    ],
)
def test_a_tensor_that_the_model_does_not_read_is_refused_as_by_llama_cpp(
    tmp_path: Path, architecture: str, name: str, rows: int
) -> None:
    model = make_checkpoint(tmp_path / "hf", architecture, num_attention_heads=4, head_dim=16)
    tensors = {**tensors_of(model, architecture), name: (np.ones(rows, np.float32), None)}
    with pytest.raises(ModelError, match=r"have a tensor '[\w.]+', which the \w+ model that .* does not read"):
        Driver.of(write(tmp_path / "m.gguf", architecture, tensors, attention__key_length=16))
