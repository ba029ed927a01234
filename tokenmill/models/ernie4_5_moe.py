"""ERNIE 4.5 MoE: ERNIE 4.5 with experts in some layers, and a correction of their choice."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.moe import Router
from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, ernie4_5, llama
from tokenmill.models._moe import Count, Natural
from tokenmill.models.llama import Apply, HeadDim, Size


class Config(ernie4_5.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Ernie4_5_MoeConfig."""

    hidden_size: Size = 2560
    intermediate_size: Size = 12288
    num_hidden_layers: llama.Layers = 28
    num_attention_heads: Size = 20
    num_key_value_heads: Size | None = 4
    head_dim: HeadDim | None = None
    moe_intermediate_size: Size = 1536
    moe_k: Count = 6
    moe_num_experts: Count = 64
    moe_num_shared_experts: Natural = 2
    moe_layer_start_index: int = 1
    moe_layer_end_index: int = -1
    moe_layer_interval: Count = 1
    moe_norm_min: float = 1e-12

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or for biases, which transformers' experts lack."""
        super().__post_init__()
        if self.use_bias:
            raise ValueError("`use_bias` is true, but experts with biases are not supported; leave it out")
        _moe.check_top_k(self.moe_k, self.moe_num_experts)

    def sparse(self, layer: int) -> bool:
        """Return True for a layer with experts."""
        end = self.num_hidden_layers - 1 if self.moe_layer_end_index == -1 else self.moe_layer_end_index
        return (layer + 1) % self.moe_layer_interval == 0 and self.moe_layer_start_index <= layer <= end


class Layer(llama.Layer):
    """Llama's decoder layer, with experts in some layers, and one that all rows share beside them."""

    def feed_forward(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return the feed-forward layer."""
        if not c.sparse(layer):
            return super().feed_forward(c, scope, layer)
        mlp, count = scope / "mlp", c.moe_num_experts
        correction, least = "moe_statics.e_score_correction_bias", c.moe_norm_min
        router = Router(mlp, c.hidden_size, count, c.moe_k, correction=correction, renormalize=True, least_sum=least)
        return _moe.beside_shared(c, mlp, router, count, c.moe_intermediate_size, c.moe_num_shared_experts)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
