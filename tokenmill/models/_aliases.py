"""Model types that the file of another one builds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_NOTHING: Mapping[str, Any] = {}


class Alias(NamedTuple):
    """Model type that computes what another one does."""

    of: str  # file of this package
    defaults: Mapping[str, Any] = _NOTHING  # where they are not those of the file
    renamed: Mapping[str, str] = _NOTHING  # field of config.json -> its name in the file


_EXPERTS = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}
_SHORT = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}
_QWEN_VL = {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_window_layers": 80,
    "rope_theta": 1e6,
}  # fmt: skip
_SARVAM = {
    "vocab_size": 262144, "hidden_size": 4096, "num_attention_heads": 64, "n_routed_experts": 128, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6,
}  # fmt: skip

ALIASES: dict[str, Alias] = {
    "RefinedWeb": Alias("falcon", {"new_decoder_architecture": True}, _SHORT),  # Falcon 40B before transformers had it
    "RefinedWebModel": Alias("falcon", {}, _SHORT),  # Falcon 7B
    "exaone": Alias(
        "llama",
        {
            "vocab_size": 102400, "intermediate_size": 14336, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096, "rope_theta": 5e5,
        },
        {"num_layers": "num_hidden_layers", "layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act"},
    ),
    "exaone4_5_text": Alias("exaone4"),
    "gemma4_unified_text": Alias("gemma4_text", {
        "max_position_embeddings": 262144, "sliding_window": 1024, "use_bidirectional_attention": "vision",
        "hidden_size_per_layer_input": 0,
    }),
    "glm4v_moe_text": Alias(
        "glm4_moe", {"vocab_size": 151424, "max_position_embeddings": 65536, "attention_bias": True}
    ),
    "glm4v_text": Alias("glm4", {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "head_dim": None}),
    "gpt-sw3": Alias("gpt2"),
    "internlm3": Alias(
        "llama",
        {
            "vocab_size": 128512, "intermediate_size": 10240, "num_hidden_layers": 48, "num_key_value_heads": 2,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "head_dim": 128,
        },
        {"qkv_bias": "attention_bias", "bias": "mlp_bias"},
    ),
    "iquestcoder": Alias(
        "llama",
        {
            "vocab_size": 76800, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 80,
            "num_attention_heads": 40, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "head_dim": 128,
        },
    ),
    "kimi_k2": Alias("deepseek_v3"),
    "qwen2_5_omni_text": Alias("qwen2", _QWEN_VL | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_window_layers": 28, "tie_word_embeddings": True,
    }),
    "qwen2_5_vl": Alias("qwen2", _QWEN_VL),  # config.json of transformers 4, in which the language part lies flat
    "qwen2_5_vl_text": Alias("qwen2", _QWEN_VL),
    "qwen2_vl": Alias("qwen2", _QWEN_VL),
    "qwen2_vl_text": Alias("qwen2", _QWEN_VL),
    "qwen3_omni_moe_text": Alias("qwen3_moe", {
        "vocab_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "norm_topk_prob": True, "rope_theta": 1e6,
    }),
    "qwen3_vl_moe_text": Alias("qwen3_moe", {
        "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16,
        "max_position_embeddings": 128000, "moe_intermediate_size": 1408, "num_experts_per_tok": 4,
        "norm_topk_prob": True, "tie_word_embeddings": True, "rope_theta": 5e5,
    }),
    "qwen3_vl_text": Alias("qwen3", {"max_position_embeddings": 128000, "rope_theta": 5e5}),
    "sarvam_mla": Alias(
        "deepseek_v3",
        _SARVAM | {"intermediate_size": 16384, "num_hidden_layers": 32, "q_lora_rank": None},
        _EXPERTS,
    ),
    "solar_open": Alias("glm4_moe", {
        "vocab_size": 196608, "moe_intermediate_size": 1280, "num_hidden_layers": 48, "num_attention_heads": 64,
        "head_dim": 128, "first_k_dense_replace": 0, "use_qk_norm": False, "rope_theta": 1e6,
        "partial_rotary_factor": 1.0,
    }),
    "youtu": Alias("deepseek_v3", {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 32,
        "num_attention_heads": 16, "max_position_embeddings": 131072, "tie_word_embeddings": True,
        "first_k_dense_replace": 1 << 30,
    }),
}  # fmt: skip
