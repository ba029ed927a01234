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

MORE: dict[str, tuple[str, dict[str, Any]]] = {
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
