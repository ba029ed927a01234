"""Architectures of GGUF files: a model that is written as llama.cpp's converter does equals transformers' of the same
weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support_gguf import activation, converted, told
from support_models import LATENT, LONGROPE, YARN, Driver, make_checkpoint, steps
from support_slow import mostly_slow
from test_gguf_config import assert_equal_to, write

from tokenmill.errors import ModelError, StartError, Unsupported

torch.set_num_threads(1)
ROUTED = {
    "expert_gating_func": 2, "expert_shared_count": 1, "expert_weights_scale": 2.5,
    "expert_weights_norm": True, "leading_dense_block_count": 1,
}  # fmt: skip
HEADS_OF_32 = {"attention__key_length": 32, "attention__value_length": 32}
RANK, ROTATED = LATENT["kv_lora_rank"], LATENT["qk_rope_head_dim"]
LATENT_KEYS = {
    "attention__kv_lora_rank": RANK, "attention__key_length": RANK + ROTATED, "attention__value_length": RANK,
    "attention__key_length_mla": LATENT["qk_nope_head_dim"] + ROTATED,
    "attention__value_length_mla": LATENT["v_head_dim"], "rope__dimension_count": ROTATED,
    "attention__head_count_kv": 1, "expert_shared_count": 1, "leading_dense_block_count": 1,
}  # fmt: skip
GEMMA4 = {
    "block_count": 4, "attention__sliding_window": 8, "attention__sliding_window_pattern": [True, False, True, False],
    "attention__key_length": 32, "attention__value_length": 32, "rope__dimension_count": 32,
    "attention__key_length_swa": 16, "attention__value_length_swa": 16, "rope__dimension_count_swa": 16,
    "rope__freq_base_swa": 10000.0,
}  # fmt: skip
YARN_KEYS = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 64}
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
    "internlm2": ("internlm2", "llama", {}, {}),
    "qwen2vl": ("qwen2vl", "qwen2", {}, {"rope__dimension_sections": [4, 2, 2, 0]}),
    "qwen3vlmoe": ("qwen3vlmoe", "qwen3_moe", {}, {**HEADS_OF_32, "n_deepstack_layers": 3}),
    "mistral3": ("mistral3", "ministral3", {}, {
        "rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 8,
        "attention__temperature_scale": 0.3}),
    "granitemoeshared": ("granitemoe", "granitemoeshared", {}, {"expert_shared_feed_forward_length": 32}),
    "olmo": ("olmo", "olmo", {}, {"attention__layer_norm_epsilon": 1e-5}),
    "olmo3": ("olmo2", "olmo3", {}, {**YARN_KEYS, "attention__sliding_window": 8, "attention__sliding_window_pattern": [
        True, False, True]}),
    "mpt": ("mpt", "mpt", {}, {"feed_forward_length": 256, "attention__head_count_kv": 4,
                               "attention__max_alibi_bias": 8.0}),
    "apertus": ("apertus", "apertus", {"rope_scaling": {"rope_type": "default"}}, {}),
    "deepseek2": ("deepseek2", "deepseek_v2", {}, {
        **LATENT_KEYS, "expert_group_count": 4, "expert_group_used_count": 2, "expert_weights_scale": 3.0,
        "attention__q_lora_rank": LATENT["q_lora_rank"], "expert_shared_count": 2}),
    "deepseek2-lite": ("deepseek2", "deepseek_v2_greedy", {
        "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}, {
        **LATENT_KEYS, **YARN_KEYS, "expert_shared_count": 2, "rope__scaling__yarn_log_multiplier": 0.0707,
        "leading_dense_block_count": 0}),
    "deepseek3": ("deepseek2", "deepseek_v3", {
        "attention_bias": False, "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}, {
        **LATENT_KEYS, **YARN_KEYS, "expert_group_count": 4, "expert_group_used_count": 2, "expert_gating_func": 2,
        "attention__q_lora_rank": LATENT["q_lora_rank"], "expert_weights_scale": 2.5, "expert_weights_norm": True,
        "rope__scaling__yarn_log_multiplier": 0.1}),
    "llama4": ("llama4", "llama4_text", {
        "attention_chunk_size": 8192, "no_rope_layers": None, "no_rope_layer_interval": 4, "floor_scale": 8192,
        "num_hidden_layers": 4}, {
        "block_count": 4, "expert_feed_forward_length": 128, "feed_forward_length": 96,
        "interleave_moe_layer_step": 2}),
    "gemma3n": ("gemma3n", "gemma3n_text", {"vocab_size_per_layer_input": 128, "altup_num_inputs": 4}, {
        "block_count": 4, "attention__sliding_window": 8, "feed_forward_length": [64, 96, 64, 128],
        "embedding_length": 32, "altup__num_inputs": 4, "altup__active_idx": 0, "embedding_length_per_layer_input": 16,
        "attention__sliding_window_pattern": [True, False, True, False], "attention__shared_kv_layers": 2,
        "activation_sparsity_scale": [-np.inf, 0.8416212, -np.inf, 0.2533471], "final_logit_softcapping": 30.0,
        "attention__key_length": 16, "attention__value_length": 16}),
    "dbrx": ("dbrx", "dbrx", {}, {
        "feed_forward_length": 32, "expert_count": 4, "expert_used_count": 2, "attention__clamp_kqv": 1.0,
        "attention__layer_norm_epsilon": 1e-5, "attention__layer_norm_rms_epsilon": None}),
    "gemma4": ("gemma4", "gemma4_text", {}, GEMMA4 | {
        "embedding_length_per_layer_input": 16, "attention__shared_kv_layers": 2,
        "feed_forward_length": [128, 128, 256, 256]}),
    "gemma4-moe": ("gemma4", "gemma4_experts", {}, GEMMA4 | {
        "embedding_length_per_layer_input": 0, "attention__shared_kv_layers": 0, "final_logit_softcapping": 3.0,
        "attention__head_count_kv": [2, 1, 2, 1], "expert_count": 4, "expert_used_count": 2,
        "expert_feed_forward_length": 32}),
    "gemma4-one": ("gemma4", "gemma4_text", {
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "num_global_key_value_heads": 1,
        "attention_k_eq_v": True, "final_logit_softcapping": 3.0}, GEMMA4 | {
        "embedding_length_per_layer_input": 0, "attention__shared_kv_layers": 0, "final_logit_softcapping": 3.0,
        "attention__head_count_kv": [2, 1, 2, 1]}),
    "gptneox": ("gptneox", "gpt_neox", {}, {
        "rope__dimension_count": 8, "use_parallel_residual": True, "attention__head_count_kv": 4}),
}  # fmt: skip
QUICK = (
    "mixtral", "qwen2moe", "minimax-m2", "gpt2", "bloom", "gemma3", "cohere2", "falcon-40b", "gpt-oss", "phi3-longrope",
    "apertus", "deepseek3", "mistral3", "olmo3",
)
"""Cases that run without --slow."""



@pytest.mark.parametrize("case", mostly_slow(CASES, QUICK))
def test_a_model_of_each_architecture_equals_transformers(tmp_path: Path, case: str) -> None:
    architecture, family, changes, keys = CASES[case]
    model = make_checkpoint(tmp_path / "hf", family, **changes)
    kv = keys.get("attention__head_count_kv", 2)
    kv = kv if isinstance(kv, int) else 2
    tensors = converted(tmp_path / "hf", architecture, kv=kv)
    if "longrope" in case:
        tensors |= {f"rope_factors_{name}.weight": (np.array(LONGROPE[f"{name}_factor"], np.float32), None)
                    for name in ("long", "short")}  # fmt: skip
    if architecture == "gemma4":
        tensors |= {"rope_freqs.weight": (np.array([1.0] * 4 + [1e30] * 12, np.float32), None)}
    keys = {**told(model.config), **keys, **activation(tmp_path / "hf")}
    assert_equal_to(model, write(tmp_path / "m.gguf", architecture, tensors, **keys))


@pytest.mark.parametrize(
    "case",
    ["mixtral", "qwen2moe", "gpt2", "gptneox", "deepseek3", "granitemoeshared",
     pytest.param("gemma4-moe", marks=pytest.mark.slow)],
)  # fmt: skip
def test_quantized_tensors_are_their_numbers_in_stacks_and_in_other_orders_of_rows_too(
    tmp_path: Path, case: str
) -> None:
    architecture, family, changes, keys = CASES[case]
    model = make_checkpoint(tmp_path / "hf", family, **changes)
    coded, floats, kind = {}, {}, gguf.GGMLQuantizationType.Q8_0
    for name, (array, _) in converted(tmp_path / "hf", architecture).items():
        coded[name] = floats[name] = array, None
        if array.ndim > 1 and array.shape[-1] % 32 == 0:
            coded[name] = gguf.quants.quantize(array, kind), kind
            floats[name] = gguf.quants.dequantize(coded[name][0], kind), None
    coded, floats = (
        Driver.of(write(tmp_path / f"{name}.gguf", architecture, tensors, **(told(model.config) | keys)))
        for name, tensors in (("coded", coded), ("floats", floats))
    )
    for rows in steps():
        np.testing.assert_array_equal(coded.feed(rows), floats.feed(rows))


def test_compressed_attention_of_older_files_is_read_too(tmp_path: Path) -> None:
    architecture, family, changes, keys = CASES["deepseek2-lite"]
    model = make_checkpoint(tmp_path / "hf", family, **changes)
    tensors = converted(tmp_path / "hf", architecture)
    for name, array in load_file(tmp_path / "hf" / "model.safetensors").items():
        if name.endswith("kv_b_proj.weight"):
            block = f"blk.{name.split('.')[2]}"
            tensors[f"{block}.attn_kv_b.weight"] = array, None
            del tensors[f"{block}.attn_k_b.weight"], tensors[f"{block}.attn_v_b.weight"]
    keys = {**told(model.config), **keys, "attention__key_length_mla": None, "attention__value_length_mla": None,
            "attention__key_length": keys["attention__key_length_mla"], "attention__head_count_kv": 4,
            "attention__value_length": keys["attention__value_length_mla"]}  # fmt: skip
    assert_equal_to(model, write(tmp_path / "m.gguf", architecture, tensors, **keys))


def test_norms_are_stored_in_any_type(tmp_path: Path) -> None:
    architecture, family, changes, keys = CASES["gemma"]
    model = make_checkpoint(tmp_path / "hf", family, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data = (parameter.data + 1).half().float() - 1
    tensors = converted(tmp_path / "hf", architecture)
    half = {name: (array.astype(np.float16) if "norm" in name else array, kind) for name, (array, kind) in
            tensors.items()}  # fmt: skip
    assert_equal_to(model, write(tmp_path / "m.gguf", architecture, half, **(told(model.config) | keys)))


@pytest.mark.parametrize("keys, words", [
    ({"attention__sliding_window_pattern": [True, False]}, r"window_pattern' is \[True, False\], not a list by"),
    ({"attention__shared_kv_layers": 4}, r"shared_kv_layers' is 4, of 4 layers"),
    ({"feed_forward_length": [128, 128, 256, 128]}, r"feed_forward_length' is \[128, .*twice as much in the last 2"),
    ({"attention__value_length_swa": 32}, r"value_length_swa' is 32, but these heads have 16"),
])  # fmt: skip
def test_a_gemma_4_whose_layers_do_not_fit_is_refused(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    tensors = {"token_embd.weight": (np.zeros((7, 64), np.float32), None)}
    with pytest.raises(ModelError, match=words):
        Driver.of(write(tmp_path / "m.gguf", "gemma4", tensors, **(CASES["gemma4"][3] | keys)))


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"xielu.beta": [0.5, 0.5, 0.75]}, r"'xielu.beta' is not supported. It has 0.75; only 0.5"),
        ({"xielu.alpha_n": [0.5, 0.5]}, r"'xielu.alpha_n' is \[0.5, 0.5\], not 3 numbers"),
    ],
)
def test_an_activation_of_other_constants_is_refused(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    right = {"xielu.alpha_p": [0.8] * 3, "xielu.alpha_n": [0.8] * 3, "xielu.beta": [0.5] * 3, "xielu.eps": [-1e-6] * 3}
    tensors = {"token_embd.weight": (np.zeros((7, 64), np.float32), None)}
    path = write(tmp_path / "m.gguf", "apertus", tensors, **(right | keys))
    with pytest.raises(StartError, match=words):
        Driver.of(path)


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
