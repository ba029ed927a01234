"""Qwen 3.5 MoE: Qwen 3.5 with experts in every layer, and one that all rows share and a gate weighs."""

from __future__ import annotations

from tokenmill.layers.scope import Scope
from tokenmill.models import llama, qwen2_moe, qwen3_5_text, qwen3_next
from tokenmill.models._moe import Count
from tokenmill.models.llama import Apply, Size


class Config(qwen3_next.Hybrid, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Qwen3_5MoeTextConfig."""

    vocab_size: Size = 248320
    num_hidden_layers: llama.Layers = 40
    num_key_value_heads: Size | None = 2
    moe_intermediate_size: Size = 512
    shared_expert_intermediate_size: Size = 512
    num_experts_per_tok: Count = 8

    def __post_init__(self) -> None:
        """Renormalize the factors of experts, regardless of config.json. Raise ValueError as the base class."""
        self.norm_topk_prob = True
        super().__post_init__()

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.num_experts or 256


class Layer(qwen3_5_text.Layer):
    """Qwen 3.5's decoder layer, with experts."""

    def feed_forward(self, c: Config, scope: Scope, layer: int) -> Apply:
        """Return the experts."""
        return qwen2_moe.with_shared(c, scope / "mlp")


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
