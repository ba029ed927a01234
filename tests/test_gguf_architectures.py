"""Architectures of GGUF files: a model that is written as llama.cpp's converter does equals transformers' of the same
weights."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support_models import LONGROPE, Driver, make_checkpoint, steps
from test_gguf import interleaved
from test_gguf_config import assert_equal_to, write

from tokenmill.errors import ModelError, Unsupported
from tokenmill.weights.gguf_architectures import ARCHITECTURES

torch.set_num_threads(1)
ARCH = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
EPS = {
    "norm_eps": "attention__layer_norm_epsilon",
    "rms_norm_eps": "attention__layer_norm_rms_epsilon", "layer_norm_eps": "attention__layer_norm_epsilon",
    "layer_norm_epsilon": "attention__layer_norm_epsilon", "norm_epsilon": "attention__layer_norm_epsilon",
}  # fmt: skip
"""Field of config.json -> key"""
COUNTS = {
    "attention_multiplier": "attention__scale", "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
    "num_experts": "expert_count", "num_local_experts": "expert_count", "n_routed_experts": "expert_count",
    "moe_num_experts": "expert_count", "moe_k": "expert_used_count",
    "num_experts_per_tok": "expert_used_count", "moe_intermediate_size": "expert_feed_forward_length",
}  # fmt: skip
ROUTED = {
    "expert_gating_func": 2, "expert_shared_count": 1, "expert_weights_scale": 2.5,
    "expert_weights_norm": True, "leading_dense_block_count": 1,
}  # fmt: skip
HEADS_OF_32 = {"attention__key_length": 32, "attention__value_length": 32}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("llama", "mixtral", {}, {}),
    "qwen2moe": ("qwen2moe", "qwen2_moe", {}, {
        "expert_shared_feed_forward_length": 32, "feed_forward_length": 128}),
    "qwen3moe": ("qwen3moe", "qwen3_moe", {}, HEADS_OF_32),
    "olmoe": ("olmoe", "olmoe", {}, {}),
    "dots1": ("dots1", "dots1", {"routed_scaling_factor": 2.5, "sliding_window": None, "n_shared_experts": 1},
              ROUTED),
    "glm4moe": ("glm4moe", "glm4_moe", {"routed_scaling_factor": 2.5, "first_k_dense_replace": 1,
                                        "partial_rotary_factor": 0.5},
                {**ROUTED, "rope__dimension_count": 8}),
    "minimax-m2": ("minimax-m2", "minimax_m2", {"intermediate_size": 32},
                   {**HEADS_OF_32, "expert_gating_func": 2, "rope__dimension_count": 16, "feed_forward_length": 32,
                    "expert_feed_forward_length": 32}),
    "gpt2": ("gpt2", "gpt2", {}, {"feed_forward_length": 256}),
    "starcoder": ("starcoder", "gpt_bigcode", {}, {"feed_forward_length": 256, "attention__head_count_kv": 1}),
    "bloom": ("bloom", "bloom", {"hidden_size": 64, "n_head": 4, "n_layer": 3},
              {"feed_forward_length": 256, "attention__head_count_kv": 4}),
    "gemma": ("gemma", "gemma", {"head_dim": 32, "tie_word_embeddings": True}, HEADS_OF_32),
    "gemma2": ("gemma2", "gemma2", {"query_pre_attn_scalar": 16, "layer_types": None, "tie_word_embeddings": True}, {
        "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0, "attention__sliding_window": 8}),
    "gemma3": ("gemma3", "gemma3_text", {"query_pre_attn_scalar": 16, "layer_types": None, "num_hidden_layers": 7}, {
        "block_count": 7, "attention__sliding_window": 8, "rope__scaling__factor": 8.0,
        "rope__scaling__type": "linear", "rope__freq_base": 1e6}),
    "olmo2": ("olmo2", "olmo2", {}, {}),
    "smollm3": ("smollm3", "smollm3", {"use_sliding_window": False, "num_hidden_layers": 4,
                                       "no_rope_layer_interval": 4}, {"block_count": 4}),
    "seed_oss": ("seed_oss", "seed_oss", {"attention_out_bias": False, "mlp_bias": False}, HEADS_OF_32),
    "granite": ("granite", "granite", {}, {
        "attention__scale": 0.4, "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0}),
    "arcee": ("arcee", "arcee", {}, {}),
    "ernie4_5": ("ernie4_5", "ernie4_5", {}, HEADS_OF_32),
    "hunyuan-dense": ("hunyuan-dense", "hunyuan_v1_dense", {"rope_parameters": None, "rope_scaling": None}, {}),
    "exaone4": ("exaone4", "exaone4", {"layer_types": None, "num_hidden_layers": 5},
                {"block_count": 5, "attention__sliding_window": 8}),
    "glm4": ("glm4", "glm4", {}, {**HEADS_OF_32, "rope__dimension_count": 8}),
    "starcoder2": ("starcoder2", "starcoder2", {}, {}),
    "phi2": ("phi2", "phi", {"tie_word_embeddings": False}, {"rope__dimension_count": 8}),
    "phi3": ("phi3", "phi3", {"sliding_window": 8}, {"attention__sliding_window": 8}),
    "stablelm": ("stablelm", "stablelm", {"rope_parameters": None, "partial_rotary_factor": 0.5},
                 {"rope__dimension_count": 8, "use_parallel_residual": False}),
    "nemotron": ("nemotron", "nemotron", {"partial_rotary_factor": 0.5},
                 {**HEADS_OF_32, "rope__dimension_count": 16}),
    "command-r": ("command-r", "cohere", {"tie_word_embeddings": True}, {"logit_scale": 0.0625}),
    "cohere2": ("cohere2", "cohere2", {"tie_word_embeddings": True, "sliding_window_pattern": 4, "layer_types": None,
                                       "num_hidden_layers": 5},
                {"logit_scale": 0.0625, "attention__sliding_window": 8, "block_count": 5}),
    "falcon": ("falcon", "falcon", {}, {"attention__head_count_kv": 1, "feed_forward_length": 256}),
    "falcon-40b": ("falcon", "falcon_grouped", {"bias": False}, {"feed_forward_length": 256}),
    "falcon2": ("falcon", "falcon_grouped_one_norm", {}, {"feed_forward_length": 96}),
    "ernie4_5-moe": ("ernie4_5-moe", "ernie4_5_moe", {}, {
        "leading_dense_block_count": 1, "expert_shared_count": 2, "interleave_moe_layer_step": 1}),
    "phimoe": ("phimoe", "phimoe", {"sliding_window": None, "router_jitter_noise": 0.01}, {}),
    "hunyuan-moe": ("hunyuan-moe", "hunyuan_v1_moe", {"moe_topk": 2, "rope_scaling": None}, {
        "expert_used_count": 2, "expert_feed_forward_length": 128}),
    "phi3-longrope": ("phi3", "phi3_longrope", {"sliding_window": None}, {
        "rope__scaling__original_context_length": 128, "rope__dimension_count": 8,
        "rope__scaling__attn_factor": float(np.sqrt(1 + np.log(2) / np.log(128)))}),
    "gpt-oss": ("gpt-oss", "gpt_oss", {"swiglu_limit": 7.0, "layer_types": None, "intermediate_size": 32}, {
        "attention__sliding_window": 8, "rope__scaling__type": "yarn", "rope__scaling__factor": 32.0,
        "rope__scaling__original_context_length": 4096, "expert_feed_forward_length": 32, "rope__freq_base": 150000.0}),
    "granitemoe": ("granitemoe", "granitemoe", {}, {}),
    "gptneox": ("gptneox", "gpt_neox", {}, {
        "rope__dimension_count": 8, "use_parallel_residual": True, "attention__head_count_kv": 4}),
}  # fmt: skip


def told(config: Any) -> dict[str, Any]:
    """Return keys of what the classes of configurations have different defaults for."""
    fields = config.to_dict()
    rope = fields.get("rope_parameters") or {}
    eps = next((name, float(fields[name])) for name in EPS if name in fields)
    experts = {key: fields[name] for name, key in COUNTS.items() if name in fields}
    rms = {"attention__layer_norm_rms_epsilon": None}
    return {"rope__freq_base": rope.get("rope_theta"), **rms, EPS[eps[0]]: eps[1], **experts}


def as_llama_cpp_stores(name: str, array: np.ndarray, architecture: str, heads: int, kv: int) -> np.ndarray:
    """Return what the converter makes of one tensor of transformers."""
    kind = ARCHITECTURES.get(f"{architecture} with experts", ARCHITECTURES[architecture])
    if architecture in ("llama", "granite", "granitemoe", "smollm3", "arcee"):
        array = interleaved(array, heads) if ".q_proj." in name else array
        array = interleaved(array, kv) if ".k_proj." in name else array
    if architecture in ("bloom", "gptneox", "falcon") and "query_key_value" in name:
        kv = heads if architecture != "falcon" else kv
        groups = array.reshape(kv, heads // kv + 2, -1, *array.shape[1:])
        array = np.concatenate([part.reshape(-1, *array.shape[1:]) for part in np.split(groups, [-2, -1], 1)])
    if architecture == "gpt2" and re.search(r"c_(attn|fc|proj)\.weight", name):
        array = array.T
    if architecture.startswith(("gemma", "nemotron")) and name.endswith("norm.weight"):
        array = array + 1
    assert kind.above_one == architecture.startswith(("gemma", "nemotron"))
    return np.ascontiguousarray(array[0] if name.endswith("shared_expert_gate.weight") else array)


def both(scope: str, name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Return gate and up of a tensor that holds them for all experts."""
    if name == "input_linear.weight":
        parts = zip(("experts.w1.weight", "experts.w3.weight"), np.split(array, 2, 1), strict=True)
    else:
        end = ".bias" if name.endswith("bias") else ".weight"
        turned = array if end == ".bias" else array.swapaxes(1, 2)
        parts = zip((f"gate_proj{end}", f"up_proj{end}"), (turned[:, 0::2], turned[:, 1::2]), strict=True)
    return ((scope + part, np.ascontiguousarray(values)) for part, values in parts)


def converted(folder: Path, architecture: str, heads: int = 4, kv: int = 2) -> dict[str, Any]:
    """Return a checkpoint's tensors under GGUF's names, with experts stacked."""
    names, layers = gguf.get_tensor_name_map(ARCH[architecture], 7), defaultdict[str, dict[int, np.ndarray]](dict)
    made: dict[str, Any] = {}
    for name, array in load_file(folder / "model.safetensors").items():
        split = re.fullmatch(r"(.*)(gate_up_proj|gate_up_proj_bias|input_linear\.weight)", name)
        if split:
            made |= dict(both(split[1], split[2], array))
            continue
        if "experts.down_proj" in name and not name.endswith(".weight"):
            turned = array if name.endswith("_bias") else array.swapaxes(1, 2)
            end = ".bias" if turned is array else ".weight"
            made[name.removesuffix("_bias") + end] = np.ascontiguousarray(turned)
            continue
        expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name)
        if expert:
            layers[f"{expert[1]}.{expert[3]}"][int(expert[2])] = array
        else:
            made[name] = as_llama_cpp_stores(name, array, architecture, heads, kv)
    made |= {name: np.stack([experts[i] for i in sorted(experts)]) for name, experts in layers.items()}
    renamed = {}
    for name, array in made.items():
        short = name.removeprefix("transformer.") if architecture == "bloom" else name
        theirs = names.get_name(short, (".weight", ".bias"))
        if name.endswith("e_score_correction_bias"):
            theirs = f"{names.get_name(name.removesuffix('_bias'))}.bias"
        assert theirs, name
        theirs += ".weight" if theirs.endswith("attn_sinks") else ""
        renamed[theirs] = array, None
    return renamed


@pytest.mark.parametrize("case", CASES)
def test_a_model_of_each_architecture_equals_transformers(tmp_path: Path, case: str) -> None:
    architecture, family, changes, keys = CASES[case]
    model = make_checkpoint(tmp_path / "hf", family, **changes)
    kv = keys.get("attention__head_count_kv", 2)
    tensors = converted(tmp_path / "hf", architecture, kv=kv)
    if "longrope" in case:
        tensors |= {f"rope_factors_{name}.weight": (np.array(LONGROPE[f"{name}_factor"], np.float32), None)
                    for name in ("long", "short")}  # fmt: skip
    path = write(tmp_path / "m.gguf", architecture, tensors, **(told(model.config) | keys))
    assert_equal_to(model, path)


@pytest.mark.parametrize("case", ["mixtral", "qwen2moe", "gpt2", "gptneox"])
def test_quantized_tensors_are_their_numbers_in_stacks_and_in_other_orders_of_rows_too(
    tmp_path: Path, case: str
) -> None:
    architecture, family, changes, keys = CASES[case]
    model = make_checkpoint(tmp_path / "hf", family, **changes)
    coded, floats, kind = {}, {}, gguf.GGMLQuantizationType.Q8_0
    for name, (array, _) in converted(tmp_path / "hf", architecture).items():
        coded[name] = floats[name] = array, None
        if array.ndim > 1:
            coded[name] = gguf.quants.quantize(array, kind), kind
            floats[name] = gguf.quants.dequantize(coded[name][0], kind), None
    coded, floats = (
        Driver.of(write(tmp_path / f"{name}.gguf", architecture, tensors, **(told(model.config) | keys)))
        for name, tensors in (("coded", coded), ("floats", floats))
    )
    for rows in steps():
        np.testing.assert_array_equal(coded.feed(rows), floats.feed(rows))


def test_layers_that_guess_further_tokens_are_not_read(tmp_path: Path) -> None:
    architecture, family, changes, keys = CASES["glm4moe"]
    model = make_checkpoint(tmp_path / "hf", family, **changes)
    tensors = converted(tmp_path / "hf", architecture)
    tensors |= {"blk.3.attn_norm.weight": (np.ones(64, np.float32), None), "blk.3.nextn.eh_proj.weight": (
        np.ones((64, 128), np.float32), None)}  # fmt: skip
    keys = {**told(model.config), **keys, "block_count": 4}
    with pytest.raises(ModelError, match=r"no tensor 'model\.layers\.3"):
        Driver.of(write(tmp_path / "a.gguf", architecture, tensors, **keys))
    assert_equal_to(model, write(tmp_path / "b.gguf", architecture, tensors, **keys, nextn_predict_layers=1))


def test_experts_of_another_routing_are_refused(tmp_path: Path) -> None:
    architecture, family, changes, keys = CASES["qwen3moe"]
    model = make_checkpoint(tmp_path / "hf", family, **changes)
    tensors = converted(tmp_path / "hf", architecture)
    keys = {**told(model.config), **keys, "expert_gating_func": 2}
    path = write(tmp_path / "m.gguf", architecture, tensors, **keys)
    with pytest.raises(Unsupported, match=r"'qwen3moe\.expert_gating_func'.*It is 2"):
        Driver.of(path)
