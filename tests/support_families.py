"""More tiny random checkpoints of the families of `support_models.py`."""

from __future__ import annotations

from typing import Any

KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "num_key_value_heads": 4,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
FACTORS = {
    "embedding_multiplier": 2.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 3.0,
}  # fmt: skip
SINKS = {"sliding_window": 8, "layer_types": KINDS, "layer_rope_theta": [1e4, 0, 5e3], "pad_token_id": 0}

GEMMA4 = {
    "head_dim": 16, "global_head_dim": 32, "sliding_window": 8, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "use_double_wide_mlp": True, "tie_word_embeddings": True,
}  # fmt: skip
QUICK = ("dbrx", "gemma3n_text", "gemma4_text", "llama4_text")
"""Families that the tests try each time; others are slow tests."""

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "dbrx": ("dbrx", {
        "d_model": 64, "attn_config": {"clip_qkv": 1.0, "kv_n_heads": 2, "rope_theta": 5e5},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    }),
    "olmo_clipped": ("olmo", {"clip_qkv": 0.7}),
    "olmoe_clipped": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.5}),
    "mpt_clipped": ("mpt", {"attn_config": {"clip_qkv": 0.7}}),
    "exaone": ("exaone", {"rope_scaling": LLAMA3, "head_dim": 16}),
    "internlm3": ("internlm3", {"head_dim": 16, "qkv_bias": True, "bias": True}),
    "sarvam_moe": ("sarvam_moe", {"n_routed_experts": 4, **EXPERTS, "head_dim": 16, "num_shared_experts": 2}),
    "sarvam_mla": ("sarvam_mla", LATENT | {"n_routed_experts": 4, **EXPERTS, "q_lora_rank": None, "pad_token_id": 0}),
    "solar_open": ("solar_open", {"n_routed_experts": 4, **EXPERTS, "head_dim": 16, "pad_token_id": 0}),
    "youtu": ("youtu", LATENT | {"pad_token_id": 0}),
    "llama4_text": ("llama4_text", {
        "head_dim": 16, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2, "num_local_experts": 4,
        "num_experts_per_tok": 2, "attention_chunk_size": 8, "no_rope_layers": [1, 1, 0], "floor_scale": 4,
    }),
    "llama4_unnormed": ("llama4_text", {
        "head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4, "use_qk_norm": False,
        "attn_temperature_tuning": False, "attention_bias": True, "no_rope_layer_interval": 2,
    }),
    "minicpm3": ("minicpm3", LATENT | {"v_head_dim": None, "dim_model_base": 16}),
    "minicpm3_unscaled": ("minicpm3", LATENT | {"q_lora_rank": None, "scale_depth": None, "dim_model_base": None}),
    "gemma3n_text": ("gemma3n_text", GEMMA4 | {
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 100, "laurel_rank": 16, "hidden_size": 32,
        "activation_sparsity_pattern": [0.0, 0.8, 0.0, 0.6], "intermediate_size": [64, 96, 64, 128],
    }),
    "gemma4_text": ("gemma4_text", GEMMA4 | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128}),
    "gemma4_experts": ("gemma4_text", GEMMA4 | {
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32,
        "attention_k_eq_v": True, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
        "num_global_key_value_heads": 1, "final_logit_softcapping": 3.0,
    }),
    "vaultgemma": ("vaultgemma", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20}),
    "cwm": ("cwm", {"head_dim": 16, "sliding_window": 8, "layer_types": KINDS, "rope_parameters": LLAMA3 | {
        "rope_theta": 1e6,
    }}),
    "jais2": ("jais2", {}),
    "nanochat": ("nanochat", {"final_logit_softcapping": 3.0}),
    "glm4_moe_lite": ("glm4_moe_lite", LATENT | EXPERTS | {"n_routed_experts": 4}),
    "exaone_moe": ("exaone_moe", EXPERTS | {
        "num_experts": 4, "sliding_window": 8, "layer_types": KINDS, "n_group": 2, "topk_group": 1,
    }),
    "flex_olmo": ("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}),
    "granite_swa": ("granite_swa", FACTORS | SINKS),
    "granitemoe_swa": ("granitemoe_swa", FACTORS | SINKS | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32,
    }),
    "hyperclovax": ("hyperclovax", FACTORS),
    "hyperclovax_without_norms": ("hyperclovax", {"use_post_norm": False, "attention_bias": True}),
    "afmoe": ("afmoe", EXPERTS | {
        "num_experts": 4, "head_dim": 16, "sliding_window": 8, "layer_types": KINDS, "mup_enabled": True,
        "route_scale": 1.5, "num_shared_experts": 1,
    }),
}  # fmt: skip
"""Name -> (model_type, what differs from SIZES)."""
