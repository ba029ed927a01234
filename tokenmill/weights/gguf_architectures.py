"""Names of GGUF's architectures, as data: their tensors and keys, and transformers' counterparts.

An architecture's tensors are those that llama.cpp's converter writes. Keys that all architectures have are in
`gguf_config`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True, slots=True)
class Found:
    """Tensor of the file. `index`: the matrix of a stack of experts; None: not stacked."""

    name: str
    index: int | None = None


class Architecture(NamedTuple):
    """Counterpart of a `general.architecture` in transformers.

    `names`: a tensor's name in the file, without "blk.N." and mostly without the suffix, -> transformers' name. The
    first {} is the layer, the second one the expert. `fields`: field of config.json -> key, left out if the file lacks
    it. `constants`: fields that no key states. `renamed`: name in config.json of a field that all architectures have.
    """

    model_type: str
    names: Mapping[str, str]
    fields: Mapping[str, str] = {}
    constants: Mapping[str, Any] = {}
    renamed: Mapping[str, str] = {}
    norm: str = "layer_norm_rms_epsilon"  # key of the norms' epsilon
    eps: str = "rms_norm_eps"  # and its field
    pairs: bool = False  # rows of a head's queries and keys are adjacent pairs, not halves
    by_head: bool = False  # transformers stores query, key and value of one head after another; the file, all queries
    above_one: bool = False  # transformers stores the weights of norms minus one
    partial: bool = False  # a part of a head may be rotated
    windows: bool = False  # `attention.sliding_window` is used
    joined: tuple[str, ...] = ()  # ends of names of tensors that are gate and up of all experts in one
    alternate: bool = False  # in which their rows alternate
    sigmoid: bool = False  # experts are weighed by the sigmoid of their scores, not by the softmax
    scores_bias: str = ""  # field that is True if the products of queries, keys and values have a bias
    factors: tuple[str, ...] = ()  # tensors that `gguf_config` reads

    def theirs(self, name: str) -> str | None:
        """Return transformers' name of a tensor of the file, {} being the expert; None if there is no such tensor."""
        layer = re.match(r"blk\.(\d+)\.", name)
        own = name[layer.end() :] if layer else name
        stem, dot, suffix = own.rpartition(".")
        found = self.names.get(own) or (f"{self.names[stem]}{dot}{suffix}" if stem in self.names else None)
        if found is None or ("{}" in found) != (layer is not None):
            return None
        return found if layer is None else found.replace("{}", layer[1], 1)

    def ours(self, name: str) -> Found | None:
        """Return the file's tensor that has transformers' name `name`; None if there is no such tensor."""
        numbers, suffix = _NUMBER.findall(name), ""
        template = _NUMBER.sub(".{}", name)
        stems = {there: here for here, there in self.names.items()}
        if template not in stems:
            suffix = next((end for end in _SUFFIXES if template.endswith(end)), "")
            template = template.removesuffix(suffix)
        if template not in stems or not (suffix or "." in stems[template]):
            return None
        own = stems[template] + suffix
        index = int(numbers[1]) if len(numbers) > 1 else None
        return Found(f"blk.{numbers[0]}.{own}" if numbers else own, index)


def _within(layer: str, **names: str) -> dict[str, str]:
    return {stem: f"{layer}.{{}}.{name}" for stem, name in names.items()}


_BODY = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = _within(
    "model.layers", attn_q="self_attn.q_proj", attn_k="self_attn.k_proj", attn_v="self_attn.v_proj",
    attn_output="self_attn.o_proj",
)  # fmt: skip
_GATED = _within("model.layers", ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj")
_NORMS = _within("model.layers", attn_norm="input_layernorm", ffn_norm="post_attention_layernorm")
_HEAD_NORMS = _within("model.layers", attn_q_norm="self_attn.q_norm", attn_k_norm="self_attn.k_norm")
_FOUR_NORMS = _within(
    "model.layers", attn_norm="input_layernorm", post_attention_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm", post_ffw_norm="post_feedforward_layernorm",
)  # fmt: skip
_AFTER = _within(
    "model.layers", post_attention_norm="post_attention_layernorm", post_ffw_norm="post_feedforward_layernorm"
)
_EXPERTS = _within(
    "model.layers", ffn_gate_inp="mlp.gate", ffn_gate_exps="mlp.experts.{}.gate_proj",
    ffn_up_exps="mlp.experts.{}.up_proj", ffn_down_exps="mlp.experts.{}.down_proj",
)  # fmt: skip
_SHARED = _within(
    "model.layers", ffn_gate_shexp="mlp.shared_experts.gate_proj", ffn_up_shexp="mlp.shared_experts.up_proj",
    ffn_down_shexp="mlp.shared_experts.down_proj",
)  # fmt: skip
_CORRECTION = {"exp_probs_b.bias": "model.layers.{}.mlp.gate.e_score_correction_bias"}
_LLAMA = _BODY | _ATTENTION | _GATED | _NORMS
_MIXTRAL = _within(
    "model.layers", ffn_gate_inp="block_sparse_moe.gate", ffn_gate_exps="block_sparse_moe.experts.{}.w1",
    ffn_up_exps="block_sparse_moe.experts.{}.w3", ffn_down_exps="block_sparse_moe.experts.{}.w2",
)  # fmt: skip
_SPARSE = {"num_experts_per_tok": "expert_used_count", "moe_intermediate_size": "expert_feed_forward_length"}
_ROUTED = {
    **_SPARSE,
    "n_routed_experts": "expert_count",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}
_MULTIPLIERS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_LLAMA3, _LONGROPE = ("rope_freqs.weight",), ("rope_factors_long.weight", "rope_factors_short.weight")
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    **_within(
        "transformer.h", attn_norm="ln_1", ffn_norm="ln_2", attn_qkv="attn.c_attn", attn_output="attn.c_proj",
        ffn_up="mlp.c_fc", ffn_down="mlp.c_proj",
    ),
}  # fmt: skip
_OF_GPT2 = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
}  # fmt: skip


def _fused(layer: str, attention: str, mlp: str = "mlp", **more: str) -> dict[str, str]:
    return _within(
        layer, attn_qkv=f"{attention}.query_key_value", attn_output=f"{attention}.dense",
        ffn_up=f"{mlp}.dense_h_to_4h", ffn_down=f"{mlp}.dense_4h_to_h", **more,
    )  # fmt: skip


_FALCON = {
    "token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f", "output": "lm_head",
    **_fused("transformer.h", "self_attention"),
}  # fmt: skip
_OF_FALCON = {"num_key_value_heads": "num_kv_heads", "intermediate_size": "ffn_hidden_size", "use_bias": "bias"}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _LLAMA, pairs=True, factors=_LLAMA3),
    "llama with experts": Architecture(
        "mixtral", _BODY | _ATTENTION | _NORMS | _MIXTRAL, pairs=True, factors=_LLAMA3,
        fields={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
    ),
    "qwen2": Architecture("qwen2", _LLAMA),
    "qwen3": Architecture("qwen3", _LLAMA | _HEAD_NORMS),
    "qwen2moe": Architecture(
        "qwen2_moe",
        _BODY | _ATTENTION | _NORMS | _EXPERTS | _within(
            "model.layers", ffn_gate_inp_shexp="mlp.shared_expert_gate", ffn_gate_shexp="mlp.shared_expert.gate_proj",
            ffn_up_shexp="mlp.shared_expert.up_proj", ffn_down_shexp="mlp.shared_expert.down_proj",
        ),
        fields={**_SPARSE, "num_experts": "expert_count",
                "shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
        constants={"norm_topk_prob": False}, scores_bias="qkv_bias",
    ),
    "qwen3moe": Architecture(
        "qwen3_moe", _BODY | _ATTENTION | _NORMS | _HEAD_NORMS | _EXPERTS,
        fields={**_SPARSE, "num_experts": "expert_count"}, constants={"norm_topk_prob": True},
    ),
    "olmoe": Architecture(
        "olmoe", _BODY | _ATTENTION | _NORMS | _HEAD_NORMS | _EXPERTS,
        fields={"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
        constants={"norm_topk_prob": False},
    ),
    "dots1": Architecture(
        "dots1", _LLAMA | _HEAD_NORMS | _EXPERTS | _SHARED | _CORRECTION, fields=_ROUTED, sigmoid=True,
        constants={"n_group": 1, "topk_group": 1},
    ),
    "glm4moe": Architecture(
        "glm4_moe",
        _BODY | _ATTENTION | _GATED | _HEAD_NORMS | _EXPERTS | _SHARED | _CORRECTION | _within(
            "model.layers", attn_norm="input_layernorm", post_attention_norm="post_attention_layernorm"),
        fields=_ROUTED, partial=True, sigmoid=True,
    ),
    "minimax-m2": Architecture(
        "minimax_m2",
        _BODY | _ATTENTION | _NORMS | _HEAD_NORMS | _MIXTRAL
        | {"exp_probs_b.bias": "model.layers.{}.block_sparse_moe.e_score_correction_bias"},
        fields={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
                "intermediate_size": "expert_feed_forward_length"},
        partial=True, sigmoid=True,
    ),
    "phimoe": Architecture(
        "phimoe", _BODY | _ATTENTION | _NORMS | _MIXTRAL, windows=True,
        fields={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
        factors=_LONGROPE,
    ),
    "hunyuan-moe": Architecture(
        "hunyuan_v1_moe",
        _BODY | _ATTENTION | _NORMS | _EXPERTS | _within(
            "model.layers", ffn_gate_inp="mlp.gate.wg", ffn_gate_shexp="mlp.shared_mlp.gate_proj",
            ffn_up_shexp="mlp.shared_mlp.up_proj", ffn_down_shexp="mlp.shared_mlp.down_proj",
            attn_q_norm="self_attn.query_layernorm", attn_k_norm="self_attn.key_layernorm"),
        fields={"num_experts": "expert_count", "moe_topk": "expert_used_count",
                "intermediate_size": "expert_feed_forward_length"},
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        _BODY | _ATTENTION | _within(
            "model.layers", attn_norm="input_layernorm", post_attention_norm="post_attention_layernorm",
            ffn_gate_inp="mlp.router") | {
            "attn_sinks.weight": "model.layers.{}.self_attn.sinks",
            "ffn_gate_exps.weight": "model.layers.{}.mlp.experts.gate_up_proj",
            "ffn_up_exps.weight": "model.layers.{}.mlp.experts.gate_up_proj",
            "ffn_down_exps.weight": "model.layers.{}.mlp.experts.down_proj",
            "ffn_gate_exps.bias": "model.layers.{}.mlp.experts.gate_up_proj_bias",
            "ffn_up_exps.bias": "model.layers.{}.mlp.experts.gate_up_proj_bias",
            "ffn_down_exps.bias": "model.layers.{}.mlp.experts.down_proj_bias"},
        fields={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
                "intermediate_size": "expert_feed_forward_length"},
        windows=True, joined=("experts.gate_up_proj", "experts.gate_up_proj_bias"), alternate=True,
    ),
    "granitemoe": Architecture(
        "granitemoe",
        _BODY | _ATTENTION | _NORMS | _within(
            "model.layers", ffn_gate_inp="block_sparse_moe.router.layer",
            ffn_gate_exps="block_sparse_moe.input_linear", ffn_up_exps="block_sparse_moe.input_linear",
            ffn_down_exps="block_sparse_moe.output_linear"),
        fields={**_MULTIPLIERS, "num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
        pairs=True, factors=_LLAMA3, joined=("input_linear.weight",),
    ),
    "granite": Architecture("granite", _LLAMA, fields=_MULTIPLIERS, pairs=True, factors=_LLAMA3),
    "smollm3": Architecture("smollm3", _LLAMA, constants={"no_rope_layer_interval": 4}, pairs=True),
    "arcee": Architecture(
        "arcee", _BODY | _ATTENTION | _NORMS | _within("model.layers", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj"),
        constants={"hidden_act": "relu2"}, pairs=True, factors=_LLAMA3,
    ),
    "seed_oss": Architecture(
        "seed_oss", _BODY | _ATTENTION | _GATED | _within(
            "model.layers", attn_norm="input_layernorm", post_attention_norm="post_attention_layernorm"),
    ),
    "ernie4_5": Architecture("ernie4_5", _LLAMA),
    "hunyuan-dense": Architecture("hunyuan_v1_dense", _LLAMA | _within(
        "model.layers", attn_q_norm="self_attn.query_layernorm", attn_k_norm="self_attn.key_layernorm")),
    "exaone4": Architecture(
        "exaone4", _BODY | _ATTENTION | _GATED | _AFTER | _HEAD_NORMS, windows=True, factors=_LLAMA3,
        constants={"sliding_window_pattern": 4},
    ),
    "olmo2": Architecture("olmo2", _BODY | _ATTENTION | _GATED | _AFTER | _HEAD_NORMS),
    "phi3": Architecture(
        "phi3", _BODY | _NORMS | _within("model.layers", attn_qkv="self_attn.qkv_proj", attn_output="self_attn.o_proj",
                                         ffn_up="mlp.gate_up_proj", ffn_down="mlp.down_proj"),
        partial=True, windows=True, factors=_LONGROPE,
    ),
    "glm4": Architecture(
        "glm4",
        _BODY | _ATTENTION | _within(
            "model.layers", attn_norm="input_layernorm", post_attention_norm="post_self_attn_layernorm",
            ffn_norm="post_attention_layernorm", post_ffw_norm="post_mlp_layernorm", ffn_up="mlp.gate_up_proj",
            ffn_down="mlp.down_proj"),
        partial=True,
    ),
    "gemma": Architecture("gemma", _LLAMA, above_one=True, constants={"hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": Architecture(
        "gemma2", _BODY | _ATTENTION | _GATED | _FOUR_NORMS, fields=_CAPS, above_one=True, windows=True,
        constants={"hidden_activation": "gelu_pytorch_tanh"},
    ),
    "gemma3": Architecture(
        "gemma3_text", _BODY | _ATTENTION | _GATED | _FOUR_NORMS | _HEAD_NORMS, above_one=True, windows=True,
        fields={**_CAPS, "rope_local_base_freq": "rope.freq_base_swa",
                "sliding_window_pattern": "attention.sliding_window_pattern"},
        constants={"hidden_activation": "gelu_pytorch_tanh", "sliding_window_pattern": 6,
                   "rope_local_base_freq": 10000.0, "final_logit_softcapping": None, "attn_logit_softcapping": None},
    ),
    "command-r": Architecture(
        "cohere", _BODY | _ATTENTION | _GATED | _within("model.layers", attn_norm="input_layernorm"),
        fields={"logit_scale": "logit_scale"}, norm="layer_norm_epsilon", eps="layer_norm_eps",
    ),
    "cohere2": Architecture(
        "cohere2", _BODY | _ATTENTION | _GATED | _within("model.layers", attn_norm="input_layernorm"),
        fields={"logit_scale": "logit_scale"}, constants={"sliding_window_pattern": 4}, windows=True,
        norm="layer_norm_epsilon", eps="layer_norm_eps",
    ),
    "stablelm": Architecture(
        "stablelm", _LLAMA, fields={"use_parallel_residual": "use_parallel_residual"}, scores_bias="use_qkv_bias",
        norm="layer_norm_epsilon", eps="layer_norm_eps", partial=True,
    ),
    "nemotron": Architecture(
        "nemotron",
        _BODY | _ATTENTION | _NORMS | _within("model.layers", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj"),
        norm="layer_norm_epsilon", eps="norm_eps", above_one=True, partial=True,
    ),
    "phi2": Architecture(
        "phi",
        {"token_embd": "model.embed_tokens", "output_norm": "model.final_layernorm", "output": "lm_head",
         **_ATTENTION, **_within("model.layers", attn_norm="input_layernorm", attn_output="self_attn.dense",
                                 ffn_up="mlp.fc1", ffn_down="mlp.fc2")},
        norm="layer_norm_epsilon", eps="layer_norm_eps", partial=True,
    ),
    "falcon": Architecture(
        "falcon", _FALCON | _within("transformer.h", attn_norm="input_layernorm"), renamed=_OF_FALCON,
        norm="layer_norm_epsilon", eps="layer_norm_epsilon", by_head=True,
    ),
    "falcon with two norms": Architecture(
        "falcon", _FALCON | _within("transformer.h", attn_norm="ln_mlp", attn_norm_2="ln_attn"), renamed=_OF_FALCON,
        norm="layer_norm_epsilon", eps="layer_norm_epsilon", by_head=True,
    ),
    "ernie4_5-moe": Architecture(
        "ernie4_5_moe", _LLAMA | _EXPERTS | _SHARED
        | {"exp_probs_b.bias": "model.layers.{}.mlp.moe_statics.e_score_correction_bias"},
        fields={"moe_num_experts": "expert_count", "moe_k": "expert_used_count",
                "moe_intermediate_size": "expert_feed_forward_length",
                "moe_num_shared_experts": "expert_shared_count", "moe_layer_start_index": "leading_dense_block_count",
                "moe_layer_interval": "interleave_moe_layer_step"},
    ),
    "starcoder2": Architecture(
        "starcoder2",
        _BODY | _ATTENTION | _NORMS | _within("model.layers", ffn_up="mlp.c_fc", ffn_down="mlp.c_proj"),
        norm="layer_norm_epsilon", eps="norm_epsilon", windows=True,
    ),
    "gpt2": Architecture("gpt2", _GPT2, renamed=_OF_GPT2, norm="layer_norm_epsilon", eps="layer_norm_epsilon"),
    "starcoder": Architecture(
        "gpt_bigcode", _GPT2, renamed=_OF_GPT2, norm="layer_norm_epsilon", eps="layer_norm_epsilon",
    ),
    "bloom": Architecture(
        "bloom",
        {"token_embd": "transformer.word_embeddings", "token_embd_norm": "transformer.word_embeddings_layernorm",
         "output_norm": "transformer.ln_f", "output": "lm_head",
         **_fused("transformer.h", "self_attention", attn_norm="input_layernorm", ffn_norm="post_attention_layernorm")},
        renamed={"num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                 "max_position_embeddings": "seq_length"},
        norm="layer_norm_epsilon", eps="layer_norm_epsilon", by_head=True,
    ),
    "gptneox": Architecture(
        "gpt_neox",
        {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out",
         **_fused("gpt_neox.layers", "attention", attn_norm="input_layernorm", ffn_norm="post_attention_layernorm")},
        fields={"use_parallel_residual": "use_parallel_residual"},
        norm="layer_norm_epsilon", eps="layer_norm_eps", by_head=True, partial=True,
    ),
}  # fmt: skip
"""general.architecture, in some cases with what distinguishes two kinds of files -> counterpart"""


def architecture_of(metadata: Mapping[str, Any], tensors: Container[str]) -> str:
    """Return the key of a file's architecture in `ARCHITECTURES`, which may have no such key."""
    name = str(metadata.get("general.architecture"))
    if name == "falcon" and "blk.0.attn_norm_2.weight" in tensors:
        return "falcon with two norms"
    experts = metadata.get(f"{name}.expert_count")
    kind = f"{name} with experts"
    return kind if experts and (kind in ARCHITECTURES or not _sparse(name)) else name


def _sparse(name: str) -> bool:
    return name not in ARCHITECTURES or any("_exps" in own for own in ARCHITECTURES[name].names)
