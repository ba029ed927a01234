"""llama.cpp's converter in small: the tensors and keys that it makes of a checkpoint of transformers."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

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
_SIZES = {
    "embedding_length": ("hidden_size",), "feed_forward_length": ("intermediate_size",),
    "attention__key_length": ("head_dim",), "attention__value_length": ("head_dim",),
    "ssm__state_size": ("state_size", "mamba_d_state", "ssm_state_size", "linear_key_head_dim"),
    "ssm__conv_kernel": ("conv_kernel", "mamba_d_conv", "linear_conv_kernel_dim"),
    "ssm__time_step_rank": (
        "num_heads", "time_step_rank", "mamba_dt_rank", "mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"),
    "ssm__group_count": ("n_groups", "mamba_n_groups", "linear_num_key_heads"),
    "shortconv__l_cache": ("conv_L_cache",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": (
        "shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"),
    "moe_latent_size": ("moe_latent_size",),
}  # fmt: skip
"""Key -> fields of config.json, of which a model has one."""
PAIRS = ("llama", "granite", "granitemoe", "granitehybrid", "smollm3", "arcee", "internlm2", "mistral3", "olmo")
SECOND_MAMBA = ("mamba2", "granitehybrid", "nemotron_h", "falcon-h1")
SHIFTED = ("gemma", "gemma2", "gemma3", "nemotron", "qwen3next", "qwen35", "qwen35moe")
Named = Iterator[tuple[str, np.ndarray]]


def interleaved(a: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of each head as pairs."""
    return a.reshape(heads, 2, a.shape[0] // heads // 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)


def told(config: Any) -> dict[str, Any]:
    """Return keys of what the classes of configurations have different defaults for."""
    fields = config.to_dict()
    rope = fields.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    eps = {EPS[name]: float(fields[name]) for name in EPS if name in fields}
    experts = {key: fields[name] for name, key in COUNTS.items() if name in fields}
    rms = {"attention__layer_norm_rms_epsilon": None}
    return {"rope__freq_base": rope.get("rope_theta"), **rms, **eps, **experts}


def sizes(config: Any) -> dict[str, Any]:
    """Return the keys of a model with states that are sizes."""
    fields = config.to_dict()
    found = {key: next((fields[n] for n in names if fields.get(n)), None) for key, names in _SIZES.items()}
    hidden, rank = fields["hidden_size"], found["ssm__time_step_rank"]
    head = next((fields[n] for n in ("mamba_head_dim", "linear_value_head_dim") if n in fields), None)
    if fields.get("mamba_d_ssm"):
        inner = fields["mamba_d_ssm"]
    elif head and rank:
        inner = head * rank
    else:
        inner = int(hidden * fields.get("mamba_expand", fields.get("expand", 0)))
    return {**found, "ssm__inner_size": inner or None}


def as_llama_cpp_stores(name: str, array: np.ndarray, architecture: str, heads: int, kv: int) -> np.ndarray:
    """Return what the converter makes of one tensor of transformers."""
    if architecture in PAIRS:
        array = interleaved(array, heads) if ".q_proj." in name else array
        array = interleaved(array, kv) if ".k_proj." in name else array
    if architecture in ("bloom", "gptneox", "falcon") and "query_key_value" in name:
        kv = heads if architecture != "falcon" else kv
        groups = array.reshape(kv, heads // kv + 2, -1, *array.shape[1:])
        array = np.concatenate([part.reshape(-1, *array.shape[1:]) for part in np.split(groups, [-2, -1], 1)])
    if architecture == "gpt2" and re.search(r"c_(attn|fc|proj)\.weight", name):
        array = array.T
    if architecture in SHIFTED and name.endswith("norm.weight") and "linear_attn.norm" not in name:
        array = array + 1
    if name.endswith(".A_log"):
        array = -np.exp(array)
    if architecture == "kimi-linear":
        array = array.reshape(1, len(array), 1, -1) if re.search(r"_conv1d\.weight", name) else array
        array = array.reshape(1, 1, -1, 1) if name.endswith(".A_log") else array
    if re.search(r"\.(conv1d|conv\.conv)\.weight", name):
        array = array[:, 0]
    if architecture in SECOND_MAMBA and name.endswith((".A_log", ".D")):
        array = array[:, None]
    return np.ascontiguousarray(array[0] if name.endswith("shared_expert_gate.weight") else array)


def in_parts(name: str, array: np.ndarray, architecture: str, config: dict[str, Any]) -> Named:
    """Return the tensors into which the converter divides one, by names of transformers or of similar models."""
    if architecture == "llama4" and name.endswith("experts.gate_up_proj"):
        parts = zip(("gate_proj", "up_proj"), np.split(array.swapaxes(1, 2), 2, 1), strict=True)
        yield from ((name.replace("gate_up_proj", f"{part}.weight"), a) for part, a in parts)
    elif match := re.fullmatch(r".*experts\.mlp\.(w1|v1|w2)", name):
        stack = array.reshape(config["ffn_config"]["moe_num_experts"], -1, array.shape[-1])
        yield f"{name}.weight", stack.swapaxes(1, 2) if match[1] == "w2" else stack
    elif architecture == "gemma4" and ".experts." in name:
        yield f"{name}.weight", array
    elif match := re.fullmatch(r"(.*)(gate_up_proj|gate_up_proj_bias)", name):
        end = ".bias" if name.endswith("bias") else ".weight"
        turned = array if end == ".bias" else array.swapaxes(1, 2)
        yield f"{match[1]}gate_proj{end}", turned[:, 0::2]
        yield f"{match[1]}up_proj{end}", turned[:, 1::2]
    elif match := re.fullmatch(r"(.*)block_sparse_moe\.input_linear\.weight", name):
        parts = zip(("w1", "w3"), np.split(array, 2, 1), strict=True)
        yield from ((f"{match[1]}block_sparse_moe.experts.{part}.weight", a) for part, a in parts)
    elif match := re.fullmatch(r"(.*)shared_mlp\.(in|out)put_linear\.weight", name):
        dense = not config.get("num_local_experts")
        module = "mlp." if dense else "mlp.shared_experts."
        names = ("gate_proj", "up_proj") if match[2] == "in" else ("down_proj",)
        parts = zip(names, np.split(array, len(names)), strict=True)
        yield from ((f"{match[1]}{module}{part}.weight", a) for part, a in parts)
    elif "experts.down_proj" in name and not name.endswith(".weight"):
        turned = array if name.endswith("_bias") else array.swapaxes(1, 2)
        yield name.removesuffix("_bias") + (".bias" if turned is array else ".weight"), turned
    elif name.endswith("kv_b_proj.weight"):
        key, value = config["qk_nope_head_dim"], config["v_head_dim"]
        keys, values = np.split(array.reshape(-1, key + value, array.shape[-1]), [key], 1)
        yield name.replace("kv_b_proj", "k_b_proj"), keys.swapaxes(1, 2)
        yield name.replace("kv_b_proj", "v_b_proj"), values
    elif name.endswith("in_proj_qkvz.weight"):
        yield from delta_inputs(name, array, config)
    else:
        yield name, array


def delta_inputs(name: str, array: np.ndarray, config: dict[str, Any]) -> Named:
    """Return queries, keys and values of all heads, and the gates."""
    groups, key = config["linear_num_key_heads"], config["linear_key_head_dim"]
    value = config["linear_num_value_heads"] // groups * config["linear_value_head_dim"]
    parts = np.split(array.reshape(groups, -1, array.shape[1]), np.cumsum([key, key, value]), 1)
    q, k, v, z = (part.reshape(-1, array.shape[1]) for part in parts)
    yield name.replace("in_proj_qkvz", "in_proj_qkv"), np.concatenate([q, k, v])
    yield name.replace("in_proj_qkvz", "in_proj_z"), z


def with_tiled_values(name: str, array: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Return a tensor of Qwen 3.5's delta rule with the first value head of each key head before the second ones."""
    groups, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    value, keys = config["linear_value_head_dim"], 2 * groups * config["linear_key_head_dim"]

    def tiled(a: np.ndarray, size: int) -> np.ndarray:
        return a.reshape(groups, heads // groups, size, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape)

    if ".in_proj_qkv." in name or ".conv1d." in name:
        return np.concatenate([array[:keys], tiled(array[keys:], value)])
    if ".in_proj_z." in name:
        return tiled(array, value)
    if re.search(r"\.(in_proj_[ab]|A_log|dt_bias)", name):
        return tiled(array, 1)
    return tiled(array.T, value).T if ".linear_attn.out_proj." in name else array


def with_falcons_factors(name: str, array: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Return a tensor of Falcon-H1 multiplied by the factors of its place."""
    (gate, down), first = config["mlp_multipliers"], config["attention_in_multiplier"]
    factors = {
        "down_proj": down, "gate_proj": gate, "k_proj": config["key_multiplier"] * first, "q_proj": first,
        "v_proj": first, "o_proj": config["attention_out_multiplier"], "out_proj": config["ssm_out_multiplier"],
        "lm_head": config["lm_head_multiplier"], "embed_tokens": config["embedding_multiplier"],
    }  # fmt: skip
    if ".mamba.in_proj" in name:
        inner, shared = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
        widths = [inner, inner, shared, shared, array.shape[0] - 2 * inner - 2 * shared]
        return array * np.repeat(config["ssm_multipliers"], widths)[:, None] * np.float32(config["ssm_in_multiplier"])
    return array * next((factor for module, factor in factors.items() if module == name.split(".")[-2]), 1.0)


def converted(folder: Path, architecture: str, heads: int = 4, kv: int = 2) -> dict[str, Any]:
    """Return a checkpoint's tensors under GGUF's names, with experts stacked."""
    names, layers = gguf.get_tensor_name_map(ARCH[architecture], 7), defaultdict[str, dict[int, np.ndarray]](dict)
    config, made = json.loads((folder / "config.json").read_text()), {}
    for whole, tensor in load_file(folder / "model.safetensors").items():
        for name, array in in_parts(whole, tensor, architecture, config):
            if architecture in ("qwen35", "qwen35moe"):
                array = with_tiled_values(name, array, config)
            if architecture == "falcon-h1":
                array = with_falcons_factors(name, array, config).astype(np.float32)
            array = as_llama_cpp_stores(name, array, architecture, heads, kv)
            groups = config.get("mamba_n_groups", config.get("n_groups", 1))
            if architecture in SECOND_MAMBA and re.search(r"\.(mixer|mamba)\.norm\.weight", name):
                array = array.reshape(groups, -1)
            expert = re.fullmatch(r"(.*\.)(?:feed_forward|mlp|mixer|block_sparse_moe)\.experts\.(\d+)\.(.*)", name)
            stream = re.fullmatch(r"(model\.altup_\w+)\.(\d+)\.weight", name)
            if stream:
                layers[f"{stream[1]}.weight"][int(stream[2])] = array
            elif expert:
                module = "block_sparse_moe" if "block_sparse_moe" in name else "mlp"
                module = "feed_forward" if expert[3][0] == "w" and module == "mlp" else module
                layers[f"{expert[1]}{module}.experts.{expert[3]}"][int(expert[2])] = array
            elif ".act_fn." not in name:
                made[name] = array
    made |= {name: np.stack([experts[i] for i in sorted(experts)]) for name, experts in layers.items()}
    return {stored_name(name, names, architecture): (np.ascontiguousarray(array), None) for name, array in made.items()}


def activation(folder: Path) -> dict[str, list[float]]:
    """Return the keys of a trained activation, a number for each layer."""
    found = defaultdict[str, list[float]](list)
    for name, array in sorted(load_file(folder / "model.safetensors").items()):
        if ".act_fn." in name:
            found[f"xielu.{name.rpartition('.')[2]}"].append(float(array.reshape(())))
    return found


def stored_name(name: str, names: Any, architecture: str) -> str:
    """Return the file's name of a tensor."""
    own = name.removeprefix("transformer.") if architecture == "bloom" else name
    own = f"{own}.weight" if own.endswith(("_output_scale", "layer_scalar")) else own
    own = re.sub(r"\.dt_bias$", ".dt_proj.bias", own)
    own = re.sub(r"\.expert_bias$", ".expert_bias.bias", own)
    own = own.removeprefix("model.") if ".feed_forward.experts.w" in own else own
    own = own.replace("backbone.", "model.") if ".mlp.experts." in own else own
    if architecture == "gemma4" and name.endswith(("router.scale", "per_expert_scale")):
        return f"blk.{name.split('.')[2]}.ffn_{'gate_inp' if name.endswith('router.scale') else 'down_exps'}.scale"
    theirs = names.get_name(own, (".weight", ".bias"))
    if name.endswith("e_score_correction_bias"):
        theirs = f"{names.get_name(name.removesuffix('_bias'))}.bias"
    assert theirs, name
    return f"{theirs}.weight" if theirs.endswith("attn_sinks") else str(theirs)
