"""Tiny configurations of multimodal models: their language parts, and the least vision that their classes accept."""

from __future__ import annotations

from typing import Any

from support_families import GEMMA4, LATENT
from support_models import SIZES

_VIT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 64}
_STACK = _QWEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": []}
_EXPERTS = {"n_routed_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
_DELTA = {
    "hidden_size": 32, "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip


def _rotated(*sections: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}
    return SIZES | {"rope_parameters": rope | more}


_HALF = _rotated(2, 1, 1, partial_rotary_factor=0.5)
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (_rotated(2, 3, 3), {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2}),
    "qwen2_5_vl": (_rotated(2, 3, 3), _QWEN | {"fullatt_block_indexes": [0]}),
    "qwen3_vl": (_rotated(4, 2, 2, mrope_interleaved=True) | {"head_dim": 16}, _STACK),
    "qwen3_vl_moe": (
        _rotated(4, 2, 2) | {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
        _STACK,
    ),
    "qwen3_5": (_HALF | _DELTA, _STACK | {"out_hidden_size": 32}),
    "qwen3_5_moe": (
        _HALF | _DELTA | {
            "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 24,
        },
        _STACK | {"out_hidden_size": 32},
    ),
    "gemma3": (SIZES | {"head_dim": 16, "sliding_window": 8}, _VIT),
    "gemma4": (
        SIZES | GEMMA4 | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 16},
    ),
    "gemma4_unified": (
        SIZES | GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
        {"mm_embed_dim": 64, "output_proj_dims": 64, "mm_posemb_size": 16},
    ),
    "llama4": (
        SIZES | {"head_dim": 16, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2, "num_local_experts": 4},
        _VIT | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
    "glm4v": (_HALF | {"pad_token_id": 0}, _QWEN | {"image_size": 28, "patch_size": 14}),
    "glm4v_moe": (_HALF | _EXPERTS | {"pad_token_id": 0}, _QWEN | {"image_size": 28, "patch_size": 14}),
    "mistral3": (
        SIZES | LATENT | _EXPERTS | {
            "moe_intermediate_size": 32,
            "model_type": "mistral4", "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
            "rope_parameters": {
                "type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 1.0,
                "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3,
            },
        },
        _VIT | {"model_type": "pixtral"},
    ),
}  # fmt: skip
"""Model type -> (text_config, vision_config)."""
