"""Qwen 3 MoE: Qwen 3 with a mixture of experts in some layers."""

from __future__ import annotations

from collections.abc import Callable

from tokenmill.layers.scope import Scope
from tokenmill.models import llama, qwen2_moe, qwen3
from tokenmill.models._moe import Count
from tokenmill.models.llama import Size
from tokenmill.program.value import Value


class Config(qwen2_moe.Sparse, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Qwen3MoeConfig."""

    has_mlp_bias = False

    intermediate_size: Size = 6144
    num_key_value_heads: Size | None = 4
    moe_intermediate_size: Size = 768
    num_experts_per_tok: Count = 8

    @property
    def experts(self) -> int:
        """Number of experts, under either of its names."""
        return self.num_experts or self.num_local_experts or 128

    def window(self, layer: int) -> int:
        """Return the sliding window, which is every layer's, in tokens; 0: all tokens."""
        return self.sliding_window or 0 if self.use_sliding_window else 0


class Layer(qwen3.Layer):
    """Qwen 3's decoder layer, with experts in some layers."""

    def feed_forward(self, c: Config, scope: Scope, layer: int) -> Callable[[Value], Value]:
        """Return the feed-forward layer."""
        return qwen2_moe.experts(c, scope / "mlp") if c.sparse(layer) else super().feed_forward(c, scope, layer)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
