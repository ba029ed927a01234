"""Tiny random checkpoints of the families that keep a state per sequence, and programs of single such layers."""

from __future__ import annotations

import math
from typing import Any

from support_models import SIZES
from support_programs import VOCABULARY, Draw

from tokenmill.program import ops, recurrence
from tokenmill.program.ops import Weight
from tokenmill.program.value import Inputs, Value

_MAMBA: dict[str, Any] = {
    "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "vocab_size": 128, "time_step_rank": 3,
}  # fmt: skip
_MAMBA2 = _MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16}
_SMALL = SIZES | {"intermediate_size": 64}
_DELTA = _SMALL | {
    "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 32, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MIXED = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}

STATES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", _MAMBA),
    "mamba_with_biases": ("mamba", _MAMBA | {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False}),
    "falcon_mamba": ("falcon_mamba", _MAMBA | {"state_size": 16, "time_step_rank": 16}),
    "mamba2": ("mamba2", _MAMBA2),
    "mamba2_limited": (
        "mamba2",
        _MAMBA2 | {"n_groups": 1, "num_heads": 4, "head_dim": 16, "time_step_limit": (0.2, 0.9), "use_bias": True},
    ),
    "lfm2": ("lfm2", _SMALL | {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 16}),
    "lfm2_with_biases": (
        "lfm2",
        _SMALL | {"full_attn_idxs": [0], "conv_bias": True, "block_auto_adjust_ff_dim": False},
    ),
    "qwen3_next": ("qwen3_next", _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3_5": ("qwen3_5_text", _DELTA | {"linear_num_value_heads": 2}),
    "bamba": ("bamba", _SMALL | _MIXED | {"attn_layer_indices": [1], "mamba_n_groups": 2}),
    "bamba_with_biases": (
        "bamba",
        _SMALL | _MIXED | {
            "attn_layer_indices": [0], "attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True,
        },
    ),
    "jamba": (
        "jamba",
        _SMALL | {
            "num_experts": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 16, "mamba_dt_rank": 16,
        },
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        _SMALL | _MIXED | {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_local_experts": 4,
            "shared_intermediate_size": 24, "position_embedding_type": "rope", "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0, "attention_multiplier": 0.1, "logits_scaling": 2.0,
        },
    ),
    "granitemoehybrid_dense": (
        "granitemoehybrid",
        _SMALL | _MIXED | {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_local_experts": 0,
            "shared_intermediate_size": 48,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "vocab_size": 128, "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8,
            "n_groups": 2, "chunk_size": 16, "time_step_min": 0.2,
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
        },
    ),
    "nemotron_h_experts": (
        "nemotron_h",
        {
            "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
            "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 16,
            "time_step_min": 0.2, "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "n_routed_experts": 4, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 40,
            "moe_latent_size": 32, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5,
        },
    ),
    "qwen3_5_moe": ("qwen3_5_moe_text", _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 32}),
    "lfm2_moe": (
        "lfm2_moe",
        _SMALL | _EXPERTS | {
            "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1, "routed_scaling_factor": 2.0,
        },
    ),
    "lfm2_moe_without_correction": (
        "lfm2_moe",
        _SMALL | _EXPERTS | {"layer_types": ["conv"] * 3, "norm_topk_prob": False, "use_expert_bias": False},
    ),
    "falcon_h1": (
        "falcon_h1",
        _SMALL | _MIXED | {
            "mamba_d_ssm": 48, "ssm_multipliers": [0.5, 2.0, 0.7, 1.3, 0.9], "ssm_in_multiplier": 1.5,
            "ssm_out_multiplier": 0.8, "key_multiplier": 0.3, "attention_in_multiplier": 1.2, "lm_head_multiplier": 0.5,
            "attention_out_multiplier": 0.7, "mlp_multipliers": [0.6, 1.4], "embedding_multiplier": 3.0,
        },
    ),
    "falcon_h1_normalized": (
        "falcon_h1", _SMALL | _MIXED | {"mamba_d_ssm": None, "mamba_rms_norm": True, "mamba_n_groups": 2},
    ),
    "falcon_h1_normalized_last": (
        "falcon_h1",
        _SMALL | _MIXED | {
            "mamba_d_ssm": 64, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "projectors_bias": True,
        },
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 1, "vocab_size": 128, "lru_width": 128, "attention_window_size": 8,
            "block_types": ["recurrent", "attention"],
        },
    ),
    "olmo_hybrid": (
        "olmo_hybrid",
        _SMALL | {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"], "pad_token_id": 0,
            "linear_key_head_dim": 16, "linear_value_head_dim": 16,  # equal: transformers saves thirds of a convolution
        },
    ),
    "olmo_hybrid_without_positions": (
        "olmo_hybrid",
        _SMALL | {
            "pad_token_id": 0, "rope_parameters": {"rope_theta": None, "rope_type": "default"},
            "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_allow_neg_eigval": False,
        },
    ),
    "kimi_linear": (
        "kimi_linear",
        {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 4, "vocab_size": 128, "model_max_length": 256, "moe_intermediate_size": 32,
            "num_experts": 4, "num_experts_per_token": 2, "kv_lora_rank": 16, "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 8, "v_head_dim": 16, "linear_head_dim": 16, "linear_num_heads": 4, "pad_token_id": 0,
            "mlp_layer_types": ["sparse"] * 3,  # transformers saves dense layers under a name of experts
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
}  # fmt: skip
"""Name -> (model_type, configuration)."""


class Layers(Draw):
    """Programs of one layer with a state of each kind. `sizes`: of the kind."""

    def __init__(self, kind: str, **sizes: Any) -> None:
        super().__init__(0)
        self.kind, self.sizes = kind, sizes

    def _model(self, inputs: Inputs) -> Value:
        table = self.weight(VOCABULARY, 32, table=True)
        x = inputs.ids.record(ops.Embed, 32, ids=inputs.ids, table=table)
        y = getattr(self, self.kind)(x, **self.sizes)
        y = x + self.linear(y, 32)[0]
        return self.linear(y.record(ops.TakeRows, rows="samples", x=y), VOCABULARY)[0]

    def conv(self, x: Value, taps: int = 4, act: str = "silu", bias: bool = True) -> Value:
        _, y, _ = self.linear(x, 8, 48, 8)  # a view
        y = y.record(
            recurrence.CausalConv, x=y, weight=self.weight(48, taps), bias=self.weight(48) if bias else None, layer=0
        )
        return y.record(ops.Act, x=y, act=act) if act else y

    def space(
        self, x: Value, heads: int = 3, width: int = 8, columns: int = 8, groups: int = 1, each: bool = False,
        limits: tuple[float, float] = (0.0, math.inf), bias: bool = True,
    ) -> Value:  # fmt: skip
        a, dt, b, c = self.linear(x, heads * width, heads, groups * columns, groups * columns)
        return a.record(
            recurrence.StateSpace, x=a, dt=dt, b=b, c=c, a_log=self.weight(heads, columns if each else 0),
            d=self.weight(heads), dt_bias=self.weight(heads) if bias else None, groups=groups, limits=limits, layer=0,
        )  # fmt: skip

    def delta(
        self, x: Value, heads: int = 4, shared: int = 2, columns: int = 8, width: int = 12, each: bool = False,
        rate: float = 1.0,
    ) -> Value:  # fmt: skip
        keys = heads // shared * columns
        decays = heads * columns if each else heads
        q, k, v, a, b = self.linear(x, keys, keys, heads * width, decays, heads)
        return v.record(
            recurrence.DeltaRule, q=q, k=k, v=v, a=a, b=b, a_log=self.weight(heads), dt_bias=self.weight(decays),
            head_dim=columns, rate=rate, layer=0,
        )  # fmt: skip

    def lru(self, x: Value, heads: int = 2, columns: int = 20) -> Value:
        (y,) = self.linear(x, heads * columns)

        def gate() -> tuple[Weight, ...]:
            return tuple(self.weight(columns, columns) for _ in range(heads))

        return y.record(
            recurrence.RgLru, x=y, input_gate=gate(), input_bias=self.weight(heads, columns), recurrence_gate=gate(),
            recurrence_bias=self.weight(heads, columns), a=self.weight(heads * columns), layer=0,
        )  # fmt: skip
