"""Sarvam MoE: GLM 4.5 with whole heads rotated, and queries, keys and values stored in one matrix."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.linear import Linears
from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, glm4_moe, llama
from tokenmill.models._moe import Count
from tokenmill.models.base import Length
from tokenmill.models.llama import HeadDim, Size


class Config(glm4_moe.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' SarvamMoEConfig."""

    vocab_size: Size = 262144
    intermediate_size: Size = 8192
    num_hidden_layers: llama.Layers = 19
    num_attention_heads: Size = 64
    num_key_value_heads: Size | None = 4
    head_dim: HeadDim | None = 64
    max_position_embeddings: Length | None = 131072
    rms_norm_eps: float = 1e-6
    rope_theta: llama.Theta = 8000000.0
    partial_rotary_factor: float = 1.0
    moe_intermediate_size: Size = 1024
    num_experts_per_tok: Count = 6
    routed_scaling_factor: float = 2.5
    use_qk_norm: bool = True
    num_experts: Count | None = None  # names of the first files, which win
    num_shared_experts: int | None = None
    use_qkv_bias: bool | None = None

    def __post_init__(self) -> None:
        """Take the values of fields with other names. Raise ValueError for inconsistent numbers."""
        self.n_routed_experts = self.num_experts or self.n_routed_experts
        if self.num_shared_experts is not None:
            self.n_shared_experts = self.num_shared_experts
        if self.use_qkv_bias is not None:
            self.attention_bias = self.use_qkv_bias
        super().__post_init__()


class Attention(glm4_moe.Attention):
    """GLM 4.5's attention, with one matrix for queries, keys and values."""

    def __init__(self, c: Any, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        d, kv = c.head_size, c.kv_heads * c.head_size
        outputs = {"query_key_value": (c.num_attention_heads * d, kv, kv)}
        self.qkv = Linears(scope, c.hidden_size, shard="column", unit=d, bias=c.biases.qkv, outputs=outputs)


class Layer(_moe.Layer):
    """Decoder layer with DeepSeek's experts and this file's attention."""

    attention = Attention


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
