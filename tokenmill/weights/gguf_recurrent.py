"""GGUF's architectures with a state per sequence: Mamba, its hybrids, short convolutions and the delta rule."""

from __future__ import annotations

from collections.abc import Mapping

from tokenmill.weights.gguf_architecture import (
    ATTENTION,
    BODY,
    EXPERTS,
    HEAD_NORMS,
    LATENT,
    LLAMA,
    MIXTRAL,
    MULTIPLIERS,
    ROUTED,
    SPARSE,
    WEIGHED_SHARED,
    Architecture,
    Made,
    within,
)
from tokenmill.weights.gguf_made import COLUMN_DECAYS, DECAY, EXPANDED, GROUPED, TILED, flat

_BACKBONE = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"}
_FINAL = BODY | {"output_norm": "model.final_layernorm"}
GRANITE_EXPERTS = within(
    "model.layers", ffn_gate_inp="block_sparse_moe.router.layer", ffn_gate_exps="block_sparse_moe.input_linear",
    ffn_up_exps="block_sparse_moe.input_linear", ffn_down_exps="block_sparse_moe.output_linear",
)  # fmt: skip
GRANITE_SHARED = within(
    "model.layers", ffn_gate_shexp="shared_mlp.input_linear", ffn_up_shexp="shared_mlp.input_linear",
    ffn_down_shexp="shared_mlp.output_linear",
)  # fmt: skip
_FEED_FORWARD = within(
    "model.layers", attn_norm="input_layernorm", ffn_norm="pre_ff_layernorm", ffn_gate="feed_forward.gate_proj",
    ffn_up="feed_forward.up_proj", ffn_down="feed_forward.down_proj",
)  # fmt: skip


def _scan(layers: str, mixer: str) -> dict[str, str]:
    """Return the names of a mixer of Mamba."""
    parts = {"ssm_in": "in_proj", "ssm_conv1d": "conv1d", "ssm_out": "out_proj"}
    return within(layers, **{stem: f"{mixer}.{name}" for stem, name in parts.items()})


def _first(layers: str, mixer: str) -> dict[str, str]:
    """Return the names of a mixer of the first Mamba."""
    return _scan(layers, mixer) | within(layers, ssm_x=f"{mixer}.x_proj", ssm_dt=f"{mixer}.dt_proj")


def _second(layers: str, mixer: str) -> dict[str, str]:
    """Return the names of a mixer of Mamba 2."""
    return {**_scan(layers, mixer), "ssm_dt.bias": f"{layers}.{{}}.{mixer}.dt_bias"}


def _made(mixer: str, norm: bool) -> Mapping[str, Made]:
    """Return the tensors of a mixer that are made of others. `mixer`: its name, {} being the layer."""
    own = {f"{mixer}.A_log": DECAY, f"{mixer}.D": flat("ssm_d")}
    return own | ({f"{mixer}.norm.weight": flat("ssm_norm.weight")} if norm else {})


_LFM2 = (
    {"token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm", "output": "lm_head"}
    | ATTENTION
    | within(
        "model.layers", attn_norm="operator_norm", ffn_norm="ffn_norm", attn_output="self_attn.out_proj",
        attn_q_norm="self_attn.q_layernorm", attn_k_norm="self_attn.k_layernorm", ffn_gate="feed_forward.w1",
        ffn_up="feed_forward.w3", ffn_down="feed_forward.w2",
    )
    | {f"shortconv.{name}": f"model.layers.{{}}.conv.{name}" for name in ("conv", "in_proj", "out_proj")}
)  # fmt: skip
_GRANITE = (
    BODY
    | ATTENTION
    | _second("model.layers", "mamba")
    | within("model.layers", attn_norm="input_layernorm", ffn_norm="post_attention_layernorm")
)
_QWEN = (
    BODY
    | ATTENTION
    | HEAD_NORMS
    | within("model.layers", attn_norm="input_layernorm", post_attention_norm="post_attention_layernorm")
)
_QWEN_DELTA = within(
    "model.layers", attn_qkv="linear_attn.in_proj_qkv", attn_gate="linear_attn.in_proj_z",
    ssm_conv1d="linear_attn.conv1d", ssm_norm="linear_attn.norm", ssm_out="linear_attn.out_proj",
) | {"ssm_dt.bias": "model.layers.{}.linear_attn.dt_bias"}  # fmt: skip
_QWEN_EXPERTS = {
    **SPARSE, "num_experts": "expert_count", "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "full_attention_interval": "full_attention_interval",
}  # fmt: skip
_MROPE = ("rope.dimension_sections",)

ARCHITECTURES: dict[str, Architecture] = {
    "mamba": Architecture(
        "mamba",
        _BACKBONE | _first("backbone.layers", "mixer") | within("backbone.layers", attn_norm="norm"),
        made=_made("backbone.layers.{}.mixer", norm=False), heads="none", eps="layer_norm_epsilon",
    ),
    "mamba with norms": Architecture(
        "falcon_mamba",
        _BACKBONE | _first("backbone.layers", "mixer") | within("backbone.layers", attn_norm="norm"),
        fields={"mixer_rms_eps": "attention.layer_norm_rms_epsilon"},
        made=_made("backbone.layers.{}.mixer", norm=False), heads="none", eps="layer_norm_epsilon",
    ),
    "mamba2": Architecture(
        "mamba2",
        _BACKBONE | _second("backbone.layers", "mixer") | within("backbone.layers", attn_norm="norm"),
        made=_made("backbone.layers.{}.mixer", norm=True), heads="none", eps="layer_norm_epsilon",
    ),
    "jamba": Architecture(
        "jamba",
        _FINAL | ATTENTION | _FEED_FORWARD | _first("model.layers", "mamba") | within(
            "model.layers", ffn_gate_inp="feed_forward.router", ffn_gate_exps="feed_forward.experts.{}.gate_proj",
            ffn_up_exps="feed_forward.experts.{}.up_proj", ffn_down_exps="feed_forward.experts.{}.down_proj",
            ssm_dt_norm="mamba.dt_layernorm", ssm_b_norm="mamba.b_layernorm", ssm_c_norm="mamba.c_layernorm"),
        fields={"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
        made=_made("model.layers.{}.mamba", norm=False), heads="some",
    ),
    "falcon-h1": Architecture(
        "falcon_h1",
        _FINAL | ATTENTION | _FEED_FORWARD | _second("model.layers", "mamba") | {
            "ffn_norm": "model.layers.{}.pre_ff_layernorm.weight"},  # the file's name has no suffix
        constants={"mamba_norm_before_gate": False}, made=_made("model.layers.{}.mamba", norm=True),
    ),
    "granitehybrid": Architecture(
        "granitemoehybrid",
        _GRANITE | within("model.layers", ffn_gate="shared_mlp.input_linear", ffn_up="shared_mlp.input_linear",
                          ffn_down="shared_mlp.output_linear"),
        fields=MULTIPLIERS, constants={"num_local_experts": 0}, made=_made("model.layers.{}.mamba", norm=True),
        heads="some", pairs=True, joined=("input_linear.weight",),
    ),
    "granitehybrid with experts": Architecture(
        "granitemoehybrid", _GRANITE | GRANITE_EXPERTS | GRANITE_SHARED,
        fields={**MULTIPLIERS, "num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
                "shared_intermediate_size": "expert_shared_feed_forward_length"},
        made=_made("model.layers.{}.mamba", norm=True), heads="some", pairs=True, joined=("input_linear.weight",),
    ),
    "nemotron_h": Architecture(
        "nemotron_h",
        _BACKBONE | _second("backbone.layers", "mixer") | within(
            "backbone.layers", attn_norm="norm", attn_q="mixer.q_proj", attn_k="mixer.k_proj", attn_v="mixer.v_proj",
            attn_output="mixer.o_proj", ffn_up="mixer.up_proj", ffn_down="mixer.down_proj"),
        constants={"time_step_min": 0.0}, ignored=("attention.layer_norm_epsilon",),
        made=_made("backbone.layers.{}.mixer", norm=True), heads="some", eps="layer_norm_epsilon",
    ),
    "nemotron_h_moe": Architecture(
        "nemotron_h",
        _BACKBONE | _second("backbone.layers", "mixer") | within(
            "backbone.layers", attn_norm="norm", attn_q="mixer.q_proj", attn_k="mixer.k_proj", attn_v="mixer.v_proj",
            attn_output="mixer.o_proj", ffn_gate_inp="mixer.gate", ffn_up_exps="mixer.experts.{}.up_proj",
            ffn_down_exps="mixer.experts.{}.down_proj", ffn_up_shexp="mixer.shared_experts.up_proj",
            ffn_down_shexp="mixer.shared_experts.down_proj", ffn_latent_down="mixer.fc1_latent_proj",
            ffn_latent_up="mixer.fc2_latent_proj",
        ) | {"exp_probs_b.bias": "backbone.layers.{}.mixer.gate.e_score_correction_bias"},
        fields={**ROUTED, "moe_shared_expert_intermediate_size": "expert_shared_feed_forward_length",
                "moe_latent_size": "moe_latent_size"},
        constants={"time_step_min": 0.0, "n_group": 1, "topk_group": 1}, ignored=("attention.layer_norm_epsilon",),
        made=_made("backbone.layers.{}.mixer", norm=True), heads="some", eps="layer_norm_epsilon", sigmoid=True,
    ),
    "lfm2": Architecture(
        "lfm2", _LFM2, constants={"block_auto_adjust_ff_dim": False}, heads="some", eps="norm_eps",
    ),
    "lfm2moe": Architecture(
        "lfm2_moe",
        _LFM2 | {"exp_probs_b.bias": "model.layers.{}.feed_forward.expert_bias"} | within(
            "model.layers", ffn_gate_inp="feed_forward.gate", ffn_gate_exps="feed_forward.experts.{}.w1",
            ffn_up_exps="feed_forward.experts.{}.w3", ffn_down_exps="feed_forward.experts.{}.w2"),
        fields={**SPARSE, "num_experts": "expert_count", "num_dense_layers": "leading_dense_block_count",
                "routed_scaling_factor": "expert_weights_scale"},
        heads="some", eps="norm_eps", sigmoid=True,
    ),
    "kimi-linear": Architecture(
        "kimi_linear",
        LLAMA | LATENT | MIXTRAL | within(
            "model.layers", ffn_gate_shexp="block_sparse_moe.shared_experts.gate_proj",
            ffn_up_shexp="block_sparse_moe.shared_experts.up_proj",
            ffn_down_shexp="block_sparse_moe.shared_experts.down_proj", ssm_f_a="self_attn.f_a_proj",
            ssm_f_b="self_attn.f_b_proj", ssm_g_a="self_attn.g_a_proj", ssm_g_b="self_attn.g_b_proj",
            ssm_beta="self_attn.b_proj", ssm_norm="self_attn.o_norm") | {
            "ssm_dt.bias": "model.layers.{}.self_attn.dt_bias",
            "exp_probs_b.bias": "model.layers.{}.block_sparse_moe.gate.e_score_correction_bias"},
        fields={"num_experts": "expert_count", "num_experts_per_token": "expert_used_count",
                "num_shared_experts": "expert_shared_count", "moe_intermediate_size": "expert_feed_forward_length",
                "first_k_dense_replace": "leading_dense_block_count", "moe_renormalize": "expert_weights_norm"},
        constants={"moe_renormalize": True}, renamed={"max_position_embeddings": "model_max_length"},
        made=EXPANDED | COLUMN_DECAYS, heads="none", sigmoid=True,
    ),
    "qwen3next": Architecture(
        "qwen3_5_moe_text", _QWEN | _QWEN_DELTA | EXPERTS | WEIGHED_SHARED, fields=_QWEN_EXPERTS, made=GROUPED,
        above_one=True, as_stored=("linear_attn.norm.weight",), partial=True,
    ),
    "qwen35": Architecture(
        "qwen3_5_text", _QWEN | _QWEN_DELTA | within(
            "model.layers", ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj"),
        fields={"full_attention_interval": "full_attention_interval"}, made=TILED, above_one=True,
        as_stored=("linear_attn.norm.weight",), partial=True, ignored=_MROPE,
    ),
    "qwen35moe": Architecture(
        "qwen3_5_moe_text", _QWEN | _QWEN_DELTA | EXPERTS | WEIGHED_SHARED, fields=_QWEN_EXPERTS, made=TILED,
        above_one=True, as_stored=("linear_attn.norm.weight",), partial=True, ignored=_MROPE,
    ),
}  # fmt: skip
"""general.architecture -> counterpart"""
