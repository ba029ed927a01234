"""Names of GGUF's architectures, as data: their tensors and keys, and transformers' counterparts.

An architecture's tensors are those that llama.cpp's converter writes. Keys that all architectures have are in
`gguf_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

from tokenmill.weights import gguf_encoded, gguf_recurrent
from tokenmill.weights.gguf_architecture import (
    AFTER,
    ATTENTION,
    BODY,
    CAPS,
    CORRECTION,
    EXPERTS,
    FOUR_NORMS,
    GATED,
    HEAD_NORMS,
    LATENT,
    LAYER_INPUTS,
    LLAMA,
    LLAMA3,
    LONGROPE,
    MIXTRAL,
    MULTIPLIERS,
    NORMS,
    ROUTED,
    SHARED,
    SPARSE,
    WEIGHED_SHARED,
    Architecture,
    within,
)
from tokenmill.weights.gguf_made import EXPANDED, STREAMS, of_field

_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    **within(
        "transformer.h", attn_norm="ln_1", ffn_norm="ln_2", attn_qkv="attn.c_attn", attn_output="attn.c_proj",
        ffn_up="mlp.c_fc", ffn_down="mlp.c_proj",
    ),
}  # fmt: skip
_OF_GPT2 = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
}  # fmt: skip


def _fused(layer: str, attention: str, mlp: str = "mlp", **more: str) -> dict[str, str]:
    return within(
        layer, attn_qkv=f"{attention}.query_key_value", attn_output=f"{attention}.dense",
        ffn_up=f"{mlp}.dense_h_to_4h", ffn_down=f"{mlp}.dense_4h_to_h", **more,
    )  # fmt: skip


_FALCON = {
    "token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f", "output": "lm_head",
    **_fused("transformer.h", "self_attention"),
}  # fmt: skip
_MROPE = ("rope.dimension_sections", "n_deepstack_layers")
_OF_FALCON = {"num_key_value_heads": "num_kv_heads", "intermediate_size": "ffn_hidden_size", "use_bias": "bias"}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", LLAMA, pairs=True, factors=LLAMA3),
    "llama with experts": Architecture(
        "mixtral", BODY | ATTENTION | NORMS | MIXTRAL, pairs=True, factors=LLAMA3,
        fields={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
    ),
    "internlm2": Architecture("llama", LLAMA, pairs=True),
    "llama4": Architecture(
        "llama4_text",
        BODY | ATTENTION | NORMS | within(
            "model.layers", ffn_gate="feed_forward.gate_proj", ffn_up="feed_forward.up_proj",
            ffn_down="feed_forward.down_proj", ffn_gate_inp="feed_forward.router",
            ffn_gate_shexp="feed_forward.shared_expert.gate_proj", ffn_up_shexp="feed_forward.shared_expert.up_proj",
            ffn_down_shexp="feed_forward.shared_expert.down_proj") | {
            "ffn_gate_exps.weight": "model.layers.{}.feed_forward.experts.gate_up_proj",
            "ffn_up_exps.weight": "model.layers.{}.feed_forward.experts.gate_up_proj",
            "ffn_down_exps.weight": "model.layers.{}.feed_forward.experts.down_proj"},
        fields={"num_experts_per_tok": "expert_used_count", "intermediate_size": "expert_feed_forward_length",
                "intermediate_size_mlp": "feed_forward_length",
                "interleave_moe_layer_step": "interleave_moe_layer_step"},
        joined=("experts.gate_up_proj",), factors=LLAMA3, sigmoid=True,
    ),
    "qwen2": Architecture("qwen2", LLAMA),
    "qwen2vl": Architecture("qwen2", LLAMA, ignored=_MROPE),
    "qwen3": Architecture("qwen3", LLAMA | HEAD_NORMS),
    "qwen3vl": Architecture("qwen3", LLAMA | HEAD_NORMS, ignored=_MROPE),
    "qwen2moe": Architecture(
        "qwen2_moe",
        BODY | ATTENTION | NORMS | EXPERTS | WEIGHED_SHARED,
        fields={**SPARSE, "num_experts": "expert_count",
                "shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
        constants={"norm_topk_prob": False}, scores_bias="qkv_bias",
    ),
    "qwen3moe": Architecture(
        "qwen3_moe", BODY | ATTENTION | NORMS | HEAD_NORMS | EXPERTS,
        fields={**SPARSE, "num_experts": "expert_count"}, constants={"norm_topk_prob": True},
    ),
    "qwen3vlmoe": Architecture(
        "qwen3_moe", BODY | ATTENTION | NORMS | HEAD_NORMS | EXPERTS, ignored=_MROPE,
        fields={**SPARSE, "num_experts": "expert_count"}, constants={"norm_topk_prob": True},
    ),
    "deepseek2": Architecture(
        "deepseek_v2", LLAMA | LATENT | EXPERTS | SHARED, fields=ROUTED, made=EXPANDED, heads="none",
    ),
    "deepseek2 with sigmoid": Architecture(
        "deepseek_v3", LLAMA | LATENT | EXPERTS | SHARED | CORRECTION, fields=ROUTED, made=EXPANDED, heads="none",
        sigmoid=True,
    ),
    "olmoe": Architecture(
        "olmoe", BODY | ATTENTION | NORMS | HEAD_NORMS | EXPERTS,
        fields={"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
        constants={"norm_topk_prob": False},
    ),
    "dots1": Architecture(
        "dots1", LLAMA | HEAD_NORMS | EXPERTS | SHARED | CORRECTION, fields=ROUTED, sigmoid=True,
        constants={"n_group": 1, "topk_group": 1},
    ),
    "glm4moe": Architecture(
        "glm4_moe",
        BODY | ATTENTION | GATED | HEAD_NORMS | EXPERTS | SHARED | CORRECTION | within(
            "model.layers", attn_norm="input_layernorm", post_attention_norm="post_attention_layernorm"),
        fields=ROUTED, partial=True, sigmoid=True,
    ),
    "minimax-m2": Architecture(
        "minimax_m2",
        BODY | ATTENTION | NORMS | HEAD_NORMS | MIXTRAL
        | {"exp_probs_b.bias": "model.layers.{}.block_sparse_moe.e_score_correction_bias"},
        fields={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
                "intermediate_size": "expert_feed_forward_length"},
        partial=True, sigmoid=True,
    ),
    "phimoe": Architecture(
        "phimoe", BODY | ATTENTION | NORMS | MIXTRAL, windows=True,
        fields={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
        factors=LONGROPE,
    ),
    "hunyuan-moe": Architecture(
        "hunyuan_v1_moe",
        BODY | ATTENTION | NORMS | EXPERTS | within(
            "model.layers", ffn_gate_inp="mlp.gate.wg", ffn_gate_shexp="mlp.shared_mlp.gate_proj",
            ffn_up_shexp="mlp.shared_mlp.up_proj", ffn_down_shexp="mlp.shared_mlp.down_proj",
            attn_q_norm="self_attn.query_layernorm", attn_k_norm="self_attn.key_layernorm"),
        fields={"num_experts": "expert_count", "moe_topk": "expert_used_count",
                "intermediate_size": "expert_feed_forward_length"},
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        BODY | ATTENTION | within(
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
        BODY | ATTENTION | NORMS | gguf_recurrent.GRANITE_EXPERTS,
        fields={**MULTIPLIERS, "num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
        pairs=True, factors=LLAMA3, joined=("input_linear.weight",),
    ),
    "granitemoe with shared": Architecture(
        "granitemoeshared",
        BODY | ATTENTION | NORMS | gguf_recurrent.GRANITE_EXPERTS | gguf_recurrent.GRANITE_SHARED,
        fields={**MULTIPLIERS, "num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
                "shared_intermediate_size": "expert_shared_feed_forward_length"},
        pairs=True, factors=LLAMA3, joined=("input_linear.weight",),
    ),
    "granite": Architecture("granite", LLAMA, fields=MULTIPLIERS, pairs=True, factors=LLAMA3),
    "smollm3": Architecture("smollm3", LLAMA, constants={"no_rope_layer_interval": 4}, pairs=True),
    "arcee": Architecture(
        "arcee", BODY | ATTENTION | NORMS | within("model.layers", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj"),
        constants={"hidden_act": "relu2"}, pairs=True, factors=LLAMA3,
    ),
    "seed_oss": Architecture(
        "seed_oss", BODY | ATTENTION | GATED | within(
            "model.layers", attn_norm="input_layernorm", post_attention_norm="post_attention_layernorm"),
    ),
    "ernie4_5": Architecture("ernie4_5", LLAMA),
    "hunyuan-dense": Architecture("hunyuan_v1_dense", LLAMA | within(
        "model.layers", attn_q_norm="self_attn.query_layernorm", attn_k_norm="self_attn.key_layernorm")),
    "exaone4": Architecture(
        "exaone4", BODY | ATTENTION | GATED | AFTER | HEAD_NORMS, windows=True, factors=LLAMA3,
        constants={"sliding_window_pattern": 4},
    ),
    "olmo": Architecture(
        "olmo", {name: BODY[name] for name in ("token_embd", "output")} | ATTENTION | GATED, pairs=True,
        norm="layer_norm_epsilon", fields={"clip_qkv": "attention.clamp_kqv"},
    ),
    "olmo2": Architecture("olmo2", BODY | ATTENTION | GATED | AFTER | HEAD_NORMS),
    "olmo2 with windows": Architecture("olmo3", BODY | ATTENTION | GATED | AFTER | HEAD_NORMS, windows=True),
    "phi3": Architecture(
        "phi3", BODY | NORMS | within("model.layers", attn_qkv="self_attn.qkv_proj", attn_output="self_attn.o_proj",
                                         ffn_up="mlp.gate_up_proj", ffn_down="mlp.down_proj"),
        partial=True, windows=True, factors=LONGROPE,
    ),
    "glm4": Architecture(
        "glm4",
        BODY | ATTENTION | within(
            "model.layers", attn_norm="input_layernorm", post_attention_norm="post_self_attn_layernorm",
            ffn_norm="post_attention_layernorm", post_ffw_norm="post_mlp_layernorm", ffn_up="mlp.gate_up_proj",
            ffn_down="mlp.down_proj"),
        partial=True,
    ),
    "gemma": Architecture("gemma", LLAMA, above_one=True, constants={"hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": Architecture(
        "gemma2", BODY | ATTENTION | GATED | FOUR_NORMS, fields=CAPS, above_one=True, windows=True,
        constants={"hidden_activation": "gelu_pytorch_tanh"},
    ),
    "gemma3": Architecture(
        "gemma3_text", BODY | ATTENTION | GATED | FOUR_NORMS | HEAD_NORMS, above_one=True, windows=True,
        fields={**CAPS, "rope_local_base_freq": "rope.freq_base_swa",
                "sliding_window_pattern": "attention.sliding_window_pattern"},
        constants={"hidden_activation": "gelu_pytorch_tanh", "sliding_window_pattern": 6,
                   "rope_local_base_freq": 10000.0, "final_logit_softcapping": None, "attn_logit_softcapping": None},
    ),
    "gemma3n": Architecture(
        "gemma3n_text",
        BODY | ATTENTION | GATED | FOUR_NORMS | HEAD_NORMS | LAYER_INPUTS | within(
            "model.layers", altup_correct_coef="altup.correction_coefs",
            altup_predict_coef="altup.prediction_coefs", altup_router="altup.modality_router",
            altup_router_norm="altup.router_norm", laurel_l="laurel.linear_left", laurel_r="laurel.linear_right",
            laurel_post_norm="laurel.post_laurel_norm") | {
            "altup_correct_scale.weight": "model.layers.{}.altup.correct_output_scale"},
        fields={"final_logit_softcapping": "final_logit_softcapping", "altup_active_idx": "altup.active_idx",
                "rope_local_base_freq": "rope.freq_base_swa", "num_kv_shared_layers": "attention.shared_kv_layers"},
        constants={"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000.0,
                   "final_logit_softcapping": None, "num_kv_shared_layers": 0},
        made=STREAMS, windows=True, widths=True,
    ),
    "gemma4": Architecture(
        "gemma4_text",
        BODY | ATTENTION | GATED | FOUR_NORMS | HEAD_NORMS | LAYER_INPUTS | {
            "layer_output_scale.weight": "model.layers.{}.layer_scalar",
            "ffn_gate_inp.scale": "model.layers.{}.router.scale",
            "ffn_down_exps.scale": "model.layers.{}.router.per_expert_scale",
            **within("model.layers", ffn_gate_inp="router.proj", ffn_down_exps="experts.{}.down_proj",
                     pre_ffw_norm_2="pre_feedforward_layernorm_2", post_ffw_norm_1="post_feedforward_layernorm_1",
                     post_ffw_norm_2="post_feedforward_layernorm_2")},
        both={"ffn_gate_up_exps.weight": (
            "model.layers.{}.experts.{}.gate_proj.weight", "model.layers.{}.experts.{}.up_proj.weight")},
        fields={"final_logit_softcapping": "final_logit_softcapping", "rope_local_base_freq": "rope.freq_base_swa",
                "num_kv_shared_layers": "attention.shared_kv_layers"},
        constants={"hidden_activation": "gelu_pytorch_tanh"}, heads="none", windows=True, factors=LLAMA3,
    ),
    "command-r": Architecture(
        "cohere", BODY | ATTENTION | GATED | within("model.layers", attn_norm="input_layernorm"),
        fields={"logit_scale": "logit_scale"}, norm="layer_norm_epsilon", eps="layer_norm_eps",
    ),
    "cohere2": Architecture(
        "cohere2", BODY | ATTENTION | GATED | within("model.layers", attn_norm="input_layernorm"),
        fields={"logit_scale": "logit_scale"}, constants={"sliding_window_pattern": 4}, windows=True,
        norm="layer_norm_epsilon", eps="layer_norm_eps",
    ),
    "stablelm": Architecture(
        "stablelm", LLAMA, fields={"use_parallel_residual": "use_parallel_residual"}, scores_bias="use_qkv_bias",
        norm="layer_norm_epsilon", eps="layer_norm_eps", partial=True,
    ),
    "nemotron": Architecture(
        "nemotron",
        BODY | ATTENTION | NORMS | within("model.layers", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj"),
        norm="layer_norm_epsilon", eps="norm_eps", above_one=True, partial=True,
    ),
    "phi2": Architecture(
        "phi",
        {"token_embd": "model.embed_tokens", "output_norm": "model.final_layernorm", "output": "lm_head",
         **ATTENTION, **within("model.layers", attn_norm="input_layernorm", attn_output="self_attn.dense",
                                 ffn_up="mlp.fc1", ffn_down="mlp.fc2")},
        norm="layer_norm_epsilon", eps="layer_norm_eps", partial=True,
    ),
    "falcon": Architecture(
        "falcon", _FALCON | within("transformer.h", attn_norm="input_layernorm"), renamed=_OF_FALCON,
        norm="layer_norm_epsilon", eps="layer_norm_epsilon", by_head=True,
    ),
    "falcon with two norms": Architecture(
        "falcon", _FALCON | within("transformer.h", attn_norm="ln_mlp", attn_norm_2="ln_attn"), renamed=_OF_FALCON,
        norm="layer_norm_epsilon", eps="layer_norm_epsilon", by_head=True,
    ),
    "ernie4_5-moe": Architecture(
        "ernie4_5_moe", LLAMA | EXPERTS | SHARED
        | {"exp_probs_b.bias": "model.layers.{}.mlp.moe_statics.e_score_correction_bias"},
        fields={"moe_num_experts": "expert_count", "moe_k": "expert_used_count",
                "moe_intermediate_size": "expert_feed_forward_length",
                "moe_num_shared_experts": "expert_shared_count", "moe_layer_start_index": "leading_dense_block_count",
                "moe_layer_interval": "interleave_moe_layer_step"},
    ),
    "starcoder2": Architecture(
        "starcoder2",
        BODY | ATTENTION | NORMS | within("model.layers", ffn_up="mlp.c_fc", ffn_down="mlp.c_proj"),
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
    "mpt": Architecture(
        "mpt",
        {"token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "output": "lm_head", **within(
            "transformer.blocks", attn_norm="norm_1", ffn_norm="norm_2", attn_qkv="attn.Wqkv",
            attn_output="attn.out_proj", ffn_up="ffn.up_proj", ffn_down="ffn.down_proj")},
        renamed={"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
                 "max_position_embeddings": "max_seq_len"},
        norm="layer_norm_epsilon", eps="layer_norm_epsilon",
    ),
    "apertus": Architecture(
        "apertus",
        BODY | ATTENTION | HEAD_NORMS | within(
            "model.layers", attn_norm="attention_layernorm", ffn_norm="feedforward_layernorm", ffn_up="mlp.up_proj",
            ffn_down="mlp.down_proj"),
        made={f"model.layers.{{}}.mlp.act_fn.{name}": of_field(f"xielu_{name}") for name in ("alpha_p", "alpha_n")},
        factors=LLAMA3, unscaled={"rope_type": "default"},
    ),
    "mistral3": Architecture("llama", LLAMA, pairs=True, factors=LLAMA3),
    "mistral3 with temperature": Architecture("ministral3", LLAMA, pairs=True),
    "dbrx": Architecture(
        "dbrx", {
            "token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "output": "lm_head",
            **within("transformer.blocks", attn_norm="norm_attn_norm.norm_1", attn_output_norm="norm_attn_norm.norm_2",
                     attn_qkv="norm_attn_norm.attn.Wqkv", attn_output="norm_attn_norm.attn.out_proj",
                     ffn_gate_inp="ffn.router.layer"),
            **{f"ffn_{name}_exps.weight": f"transformer.blocks.{{}}.ffn.experts.mlp.{theirs}"
               for name, theirs in {"gate": "w1", "up": "v1", "down": "w2"}.items()},
        },
        renamed={"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
                 "max_position_embeddings": "max_seq_len"},
        norm="layer_norm_epsilon", eps="layer_norm_epsilon", below=("mlp.w1", "mlp.v1", "mlp.w2"),
    ),
    "gptneox": Architecture(
        "gpt_neox",
        {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out",
         **_fused("gpt_neox.layers", "attention", attn_norm="input_layernorm", ffn_norm="post_attention_layernorm")},
        fields={"use_parallel_residual": "use_parallel_residual"},
        norm="layer_norm_epsilon", eps="layer_norm_eps", by_head=True, partial=True,
    ),
    **gguf_recurrent.ARCHITECTURES,
    **gguf_encoded.ARCHITECTURES,
}  # fmt: skip
"""general.architecture, in some cases with what distinguishes two kinds of files -> counterpart"""


def architecture_of(metadata: Mapping[str, Any], tensors: Container[str]) -> str:
    """Return the key of a file's architecture in `ARCHITECTURES`, which may have no such key."""
    name = str(metadata.get("general.architecture"))
    for (plain, kind), applies in _KINDS.items():
        if name == plain and applies(lambda key: metadata.get(f"{name}.{key}"), tensors):
            return f"{name} {kind}"
    experts = metadata.get(f"{name}.expert_count")
    kind = f"{name} with experts"
    return kind if experts and (kind in ARCHITECTURES or not _sparse(name)) else name


_KINDS: Mapping[tuple[str, str], Callable[[Callable[[str], Any], Container[str]], bool]] = {
    ("falcon", "with two norms"): lambda _, tensors: "blk.0.attn_norm_2.weight" in tensors,
    ("deepseek2", "with sigmoid"): lambda value, _: value("expert_gating_func") == 2,
    ("granitemoe", "with shared"): lambda value, _: bool(value("expert_shared_feed_forward_length")),
    ("granitehybrid", "with rotation"): lambda value, _: bool(value("rope.scaling.finetuned")),
    ("olmo2", "with windows"): lambda value, _: bool(value("attention.sliding_window")),
    ("mistral3", "with temperature"): lambda value, _: bool(value("attention.temperature_scale")),
    ("t5", "with biases"): lambda _, tensors: "enc.blk.1.attn_rel_b.weight" in tensors,
    ("t5", "with gates"): lambda _, tensors: "enc.blk.0.ffn_gate.weight" in tensors,
    ("mamba", "with norms"): lambda value, _: bool(value("ssm.dt_b_c_rms")),
}
"""Architecture and what distinguishes a kind of its files -> True for a file of that kind"""


def _sparse(name: str) -> bool:
    return name not in ARCHITECTURES or any("_exps" in own for own in ARCHITECTURES[name].names)
