"""Fields of config.json that need more than the name of a key, by GGUF architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from statistics import NormalDist
from typing import Any

from tokenmill.errors import ModelError, Unsupported
from tokenmill.weights.gguf_reader import Reader
from tokenmill.weights.gguf_rope import rope_scaling

_ARBITRARY = 1 << 20
"""Length that llama.cpp's converter writes for a model whose length nothing limits"""

_LENGTH = 1 << 17  # of such a model here
_STILL = 1e20  # a frequency divided by more does not rotate
_MAVERICK = 128  # experts of the Llama 4 that has no norms of queries and keys
_XIELU = {"beta": 0.5, "eps": -1e-6}  # constants of xIELU


def _gemma2(read: Reader) -> dict[str, Any]:
    """Return the scale of attention's scores, which in llama.cpp follows from the size of the model."""
    heads, hidden = read.number("attention.head_count"), read.number("embedding_length")
    largest = {"gemma2": 46, "gemma3": 62}[read.architecture]  # layers of the 27B models
    head_dim = read.number("attention.key_length", hidden // heads)
    return {"query_pre_attn_scalar": hidden // heads if read.number("block_count") == largest else head_dim}


def _multi_query(read: Reader) -> dict[str, Any]:
    return {"multi_query": read.number("attention.head_count_kv", read.number("attention.head_count")) == 1}


def _falcon(read: Reader) -> dict[str, Any]:
    """Return the generation: a model with one key-value head is of the first one."""
    grouped = read.number("attention.head_count_kv", read.number("attention.head_count")) > 1
    read("tensor_data_layout", "")
    return {"multi_query": not grouped, "new_decoder_architecture": grouped, "num_ln_in_parallel_attn": 1}


def _gpt_oss(read: Reader) -> dict[str, Any]:
    """Return YaRN's scaling with a ramp whose ends are not rounded, as the model was trained."""
    scaling = rope_scaling(read, {})
    return {"rope_scaling": {**scaling, "truncate": False} if scaling else {"rope_type": "default"}}


def _olmo3(read: Reader) -> dict[str, Any]:
    """Return the kinds of layers."""
    pattern = read("attention.sliding_window_pattern", [])
    if not isinstance(pattern, list):
        raise ModelError(f"{read.path}: 'olmo2.attention.sliding_window_pattern' is {pattern!r}, not a list by layer.")
    kinds = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    return {"layer_types": kinds or None}


def _mpt(read: Reader) -> dict[str, Any]:
    slope, clip = read.real("attention.max_alibi_bias", 0.0), read.real("attention.clamp_kqv", 0.0)
    return {"attn_config": {"alibi": slope > 0, "alibi_bias_max": slope or 8.0, "clip_qkv": clip or None}}


def _dbrx(read: Reader) -> dict[str, Any]:
    """Return the objects that attention and experts have of their own."""
    heads = read.number("attention.head_count")
    return {
        "attn_config": {"clip_qkv": read.real("attention.clamp_kqv", 0.0) or None,
                        "kv_n_heads": read.number("attention.head_count_kv", heads)},
        "ffn_config": {"ffn_hidden_size": read.number("feed_forward_length"),
                       "moe_num_experts": read.number("expert_count"), "moe_top_k": read.number("expert_used_count")},
    }  # fmt: skip


def _apertus(read: Reader) -> dict[str, Any]:
    """Return the trained numbers of the activation, of each layer."""
    found: dict[str, Any] = {}
    for name in ("alpha_p", "alpha_n", *_XIELU):
        numbers = read.numbers_of_layers(f"xielu.{name}")
        wrong = [n for n in numbers if abs(n - _XIELU.get(name, n)) > 1e-2 * abs(n)]
        if wrong:
            raise Unsupported("GGUF key", f"xielu.{name}", (), f"It has {wrong[0]!r}; only {_XIELU[name]} is computed.")
        found[f"xielu_{name}"] = numbers
    return found


def _gemma3n(read: Reader) -> dict[str, Any]:
    """Return the streams, the layers with a window, and the shares of gates that are zero.

    The file has these shares as the deviations from the mean that they are of.
    """
    layers, pattern = read.number("block_count"), read("attention.sliding_window_pattern")
    deviations = read("activation_sparsity_scale", [-inf] * layers)
    for key, given, kind in (
        ("attention.sliding_window_pattern", pattern, bool), ("activation_sparsity_scale", deviations, float),
    ):  # fmt: skip
        if not isinstance(given, list) or len(given) != layers or not all(isinstance(each, kind) for each in given):
            raise ModelError(f"{read.path}: 'gemma3n.{key}' is {given!r}, not {layers} values, one for each layer.")
    low_rank, table = (read.shapes.get(f"{name}.weight", (0,)) for name in ("blk.0.laurel_l", "per_layer_token_embd"))
    return {
        "altup_num_inputs": read.number("altup.num_inputs"),
        "hidden_size_per_layer_input": read.number("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": table[0],
        "laurel_rank": low_rank[0],
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern],
        "activation_sparsity_pattern": [NormalDist().cdf(n) for n in deviations],
        "intermediate_size": read.by_layer("feed_forward_length"),
        "altup_correct_scale": read.has_tensor(r"blk\.\d+\.altup_correct_scale\.weight"),
    }


def _gemma4(read: Reader) -> dict[str, Any]:
    """Return the kinds of layers, and the sizes that those with a window and the others have of their own."""
    layers, shared = read.number("block_count"), read.count("attention.shared_kv_layers")
    pattern = read("attention.sliding_window_pattern")
    if not isinstance(pattern, list) or len(pattern) != layers or not all(isinstance(each, bool) for each in pattern):
        raise ModelError(f"{read.path}: 'gemma4.attention.sliding_window_pattern' is {pattern!r}, not a list by layer.")
    if shared >= layers:
        raise ModelError(f"{read.path}: 'gemma4.attention.shared_kv_layers' is {shared}, of {layers} layers.")
    kv, widths = read.by_layer("attention.head_count_kv"), read.by_layer("feed_forward_length")
    width, wide = widths[0], widths[-1] == 2 * widths[0]
    if widths != [width] * (layers - shared) + [width * (1 + wide)] * shared:
        raise ModelError(f"{read.path}: 'gemma4.feed_forward_length' is {widths}; expected one width, or twice as much "
                         f"in the last {shared} layers.")  # fmt: skip
    full, near = [i for i in range(layers) if not pattern[i]], [i for i in range(layers) if pattern[i]]
    one = any(f"blk.{i}.attn_k.weight" in read.shapes and f"blk.{i}.attn_v.weight" not in read.shapes for i in full)
    return {
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern],
        "num_attention_heads": read.number("attention.head_count"),
        "num_key_value_heads": kv[near[0]] if near else kv[0],
        "num_global_key_value_heads": kv[full[0]] if full else None,
        "attention_k_eq_v": one,
        "intermediate_size": width,
        "use_double_wide_mlp": wide,
        "hidden_size_per_layer_input": read.count("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": read.shapes.get("per_layer_token_embd.weight", (1,))[0],
        "num_kv_shared_layers": shared,
        "rope_theta": read("rope.freq_base", 1e6),
        "rope_local_base_freq": read("rope.freq_base_swa", 1e4),
        **_two_heads(read),
        **_gemma4_experts(read),
    }


def _gemma4_experts(read: Reader) -> dict[str, Any]:
    """Return the fields of experts beside the feed-forward layers, if there are any."""
    if not read.count("expert_count"):
        return {}
    return {
        "enable_moe_block": True,
        "num_experts": read.number("expert_count"),
        "top_k_experts": read.number("expert_used_count"),
        "moe_intermediate_size": read.number("expert_feed_forward_length"),
    }


def _two_heads(read: Reader) -> dict[str, Any]:
    """Return Gemma 4's sizes of heads, and the share of the larger ones that is rotated. ModelError if they differ."""
    found = {}
    for end, field in (("", "global_head_dim"), ("_swa", "head_dim")):
        size = found[field] = read.number(f"attention.key_length{end}")
        for key in (f"attention.value_length{end}", f"rope.dimension_count{end}"):
            if read.number(key, size) != size:
                raise ModelError(f"{read.path}: 'gemma4.{key}' is {read(key)}, but these heads have {size} numbers.")
    factors = read.factors.get("rope_freqs.weight")
    share = 0.25 if factors is None else sum(factor < _STILL for factor in factors) / len(factors)
    return {**found, "partial_rotary_factor": share}


def _llama4(read: Reader) -> dict[str, Any]:
    """Return what llama.cpp has in its code: which layers rotate, the chunks of attention, the growth of queries."""
    return {
        "use_qk_norm": read.number("expert_count") != _MAVERICK,
        "num_local_experts": read.number("expert_count"),
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
    }


def _ministral3(read: Reader) -> dict[str, Any]:
    """Return the growth of queries by position, which begins at the length before YaRN's scaling."""
    mscale = read.real("rope.scaling.yarn_log_multiplier", 0.0)
    beta = {"llama_4_scaling_beta": read("attention.temperature_scale"), **({"mscale": 1.0, "mscale_all_dim": mscale}
                                                                         if mscale else {})}  # fmt: skip
    return {"rope_scaling": {**(rope_scaling(read, {}) or {}), **beta}, "sliding_window": None}


def _latent(read: Reader) -> dict[str, Any]:
    """Return the sizes of attention to compressed rows, in files with absorbed matrices and in older ones."""
    heads, rotated = read.number("attention.head_count"), read.number("rope.dimension_count")
    absorbed = "_mla" if read.has("attention.key_length_mla") else ""
    read.ignore("attention.head_count_kv", "attention.key_length", "attention.value_length")
    groups, mscale = read("expert_group_count", 1), read.real("rope.scaling.yarn_log_multiplier", 0.0) * 10
    scaling = rope_scaling(read, {})
    if scaling and mscale:
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": read.number("feed_forward_length"),
        "kv_lora_rank": read.number("attention.kv_lora_rank"),
        "q_lora_rank": read.number("attention.q_lora_rank") if read.has("attention.q_lora_rank") else None,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": read.number(f"attention.key_length{absorbed}") - rotated,
        "v_head_dim": read.number(f"attention.value_length{absorbed}"),
        "rope_theta": read("rope.freq_base", 10000.0),
        "rope_scaling": scaling,
        "n_group": groups,
        "topk_group": read("expert_group_used_count", 1),
        "topk_method": "group_limited_greedy" if groups != 1 else "greedy",
        "norm_topk_prob": read("expert_weights_norm", False),
        "routed_scaling_factor": read("expert_weights_scale", 1.0),
    }


def _kimi_linear(read: Reader) -> dict[str, Any]:
    """Return the sizes of attention to compressed rows, in layers with key-value heads, and of the delta rule."""
    counts = read.by_layer("attention.head_count_kv")
    delta = next((i for i, count in enumerate(counts) if not count), 0)
    rows = read.shapes.get(f"blk.{delta}.ssm_beta.weight", (read.number("attention.head_count"),))
    return _latent(read) | {"num_expert_group": read("expert_group_count", 1), "linear_attn_config": {
        "full_attn_layers": [i + 1 for i, count in enumerate(counts) if count],
        "head_dim": read.number("kda.head_dim"),
        "num_heads": rows[0],
        "short_conv_kernel_size": read.number("ssm.conv_kernel"),
    }}  # fmt: skip


def _scan(read: Reader, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the sizes of a mixer of Mamba. `names`: field of config.json -> size."""
    inner, steps = read.number("ssm.inner_size"), read.number("ssm.time_step_rank")
    if steps > inner:
        raise ModelError(f"{read.path}: '{read.architecture}.ssm.time_step_rank' is {steps}, of {inner} columns.")
    sizes = {
        "inner": inner,
        "steps": steps,
        "head": inner // steps,
        "expand": inner / read.number("embedding_length"),
        "state": read.number("ssm.state_size"),
        "kernel": read.number("ssm.conv_kernel"),
        "groups": read.number("ssm.group_count", 1),
        "conv_bias": read.has_tensor(r"blk\.\d+\.ssm_conv1d\.bias"),
        "bias": read.has_tensor(r"blk\.\d+\.ssm_in\.bias"),
    }
    return {field: sizes[size] for field, size in names.items()}


def _length(read: Reader) -> int:
    """Return the maximum length of a sequence, for a model that may have none."""
    found = read.number("context_length")
    return _LENGTH if found == _ARBITRARY else found


def _mamba(read: Reader) -> dict[str, Any]:
    names = {"expand": "expand", "state_size": "state", "conv_kernel": "kernel", "use_conv_bias": "conv_bias",
             "use_bias": "bias"}  # fmt: skip
    second = {"num_heads": "steps", "head_dim": "head", "n_groups": "groups"}
    first = {"time_step_rank": "steps"}
    read.ignore("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    own = second if read.architecture == "mamba2" else first
    return {"max_position_embeddings": _length(read), **_scan(read, names | own)}


_HYBRID = {
    "mamba_n_heads": "steps", "mamba_d_head": "head", "mamba_n_groups": "groups", "mamba_d_state": "state",
    "mamba_d_conv": "kernel", "mamba_expand": "expand", "mamba_conv_bias": "conv_bias", "mamba_proj_bias": "bias",
}  # fmt: skip


def _periodic(read: Reader, what: str, layers: Sequence[int], count: int) -> tuple[int, int]:
    """Return period and offset of some layers. ModelError if they are not every so many of all `count` layers."""
    period = layers[1] - layers[0] if len(layers) > 1 else count
    if not layers or [i for i in range(count) if i % period == layers[0]] != list(layers) or layers[0] >= period:
        raise ModelError(
            f"{read.path}: the layers with {what} are {list(layers)} of {count}, not every so many. Convert the model "
            "again from its original."
        )
    return period, layers[0]


def _jamba(read: Reader) -> dict[str, Any]:
    """Return sizes, and the layers with attention and with experts, which come at equal distances."""
    counts = read.by_layer("attention.head_count_kv")
    sparse = [i for i in range(len(counts)) if f"blk.{i}.ffn_gate_inp.weight" in read.shapes]
    period, offset = _periodic(read, "attention", [i for i, n in enumerate(counts) if n], len(counts))
    every, first = _periodic(read, "experts", sparse, len(counts)) if sparse else (1, 0)
    names = {"mamba_d_state": "state", "mamba_d_conv": "kernel", "mamba_expand": "expand", "mamba_dt_rank": "steps",
             "mamba_conv_bias": "conv_bias", "mamba_proj_bias": "bias"}  # fmt: skip
    experts = {"expert_layer_period": every, "expert_layer_offset": first}
    experts |= {} if sparse else {"num_experts": 1, "num_experts_per_tok": 1}
    return {"attn_layer_period": period, "attn_layer_offset": offset, **experts, **_scan(read, names)}


def _granite(read: Reader) -> dict[str, Any]:
    read.ignore("rope.dimension_count", "rope.freq_base", "expert_shared_feed_forward_length")
    dense = read.shapes.get("blk.0.ffn_up.weight")
    return {
        "max_position_embeddings": _length(read),
        "layer_types": ["attention" if n else "mamba" for n in read.by_layer("attention.head_count_kv")],
        **({"shared_intermediate_size": dense[0]} if dense else {}),
        **_scan(read, _HYBRID),
    }


def _nemotron_h(read: Reader) -> dict[str, Any]:
    """Return the kind of each layer: attention if it has key-value heads, else feed-forward if that has a width."""
    counts, widths = read.by_layer("attention.head_count_kv"), read.by_layer("feed_forward_length")
    inner = "moe" if read.has("expert_count") else "mlp"
    kinds = ["attention" if n else inner if w else "mamba" for n, w in zip(counts, widths, strict=True)]
    names = {"mamba_num_heads": "steps", "mamba_head_dim": "head", "n_groups": "groups", "ssm_state_size": "state",
             "conv_kernel": "kernel", "use_conv_bias": "conv_bias", "use_bias": "bias"}  # fmt: skip
    return {"layers_block_type": kinds, "max_position_embeddings": _length(read), **_scan(read, names)}


def _falcon_h1(read: Reader) -> dict[str, Any]:
    """Return the sizes. The converter multiplies the weights by the model's factors."""
    normalized, biased = (read.has_tensor(rf"blk\.\d+\.ssm_{name}") for name in (r"norm\.weight", r"out\.bias"))
    return {"mamba_d_ssm": read.number("ssm.inner_size"), "mamba_rms_norm": normalized, "projectors_bias": biased,
            **_scan(read, _HYBRID)}  # fmt: skip


def _lfm2(read: Reader) -> dict[str, Any]:
    """Return the kind of each layer."""
    return {
        "layer_types": ["full_attention" if n else "conv" for n in read.by_layer("attention.head_count_kv")],
        "conv_L_cache": read.number("shortconv.l_cache"),
        "use_expert_bias": read.has_tensor(r"blk\.\d+\.exp_probs_b\.bias"),
    }


def _delta(read: Reader) -> dict[str, Any]:
    """Return the sizes of the delta rule."""
    names = {"linear_num_value_heads": "steps", "linear_value_head_dim": "head", "linear_num_key_heads": "groups",
             "linear_key_head_dim": "state", "linear_conv_kernel_dim": "kernel"}  # fmt: skip
    return _scan(read, names)


SPECIAL: Mapping[str, Callable[[Reader], dict[str, Any]]] = {
    "gemma2": _gemma2, "gemma3": _gemma2, "starcoder": _multi_query, "falcon": _falcon, "gpt-oss": _gpt_oss,
    "falcon with two norms": lambda read: {**_falcon(read), "num_ln_in_parallel_attn": 2},
    "olmo2 with windows": _olmo3, "llama4": _llama4, "gemma3n": _gemma3n, "gemma4": _gemma4, "mpt": _mpt, "dbrx": _dbrx,
    "apertus": _apertus, "mistral3 with temperature": _ministral3,
    "deepseek2": _latent, "deepseek2 with sigmoid": _latent,
    "mamba": _mamba, "mamba with norms": _mamba, "mamba2": _mamba, "jamba": _jamba, "granitehybrid": _granite,
    "granitehybrid with experts": _granite, "nemotron_h": _nemotron_h, "nemotron_h_moe": _nemotron_h,
    "falcon-h1": _falcon_h1, "lfm2": _lfm2, "lfm2moe": _lfm2, "qwen3next": _delta, "qwen35": _delta,
    "qwen35moe": _delta, "kimi-linear": _kimi_linear,
}  # fmt: skip
"""Architecture -> function that computes more fields of config.json"""
