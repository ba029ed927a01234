"""LFM 2 MoE: LFM 2 with experts in all but the first layers."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.mlp import GatedMlp
from tokenmill.layers.moe import MoeMlp, Router, separate
from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, lfm2
from tokenmill.models._moe import Count, Natural
from tokenmill.models.llama import Apply, Size


class Config(lfm2.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Lfm2MoeConfig."""

    hidden_size: Size = 2048
    intermediate_size: Size = 7168
    moe_intermediate_size: Size = 1792
    num_dense_layers: Natural = 2
    num_experts_per_tok: Count = 4
    num_experts: Count = 32
    use_expert_bias: bool = True
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        _moe.check_top_k(self.num_experts_per_tok, self.num_experts)

    @property
    def inner(self) -> int:
        """Number of inner columns of the feed-forward layer."""
        return self.intermediate_size


class Layer(lfm2.Layer):
    """LFM 2's decoder layer, with experts in some layers."""

    def feed_forward(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return the feed-forward layer."""
        scope, names = scope / "feed_forward", ("w1", "w3", "w2")
        if layer < c.num_dense_layers:
            return GatedMlp(scope, c.hidden_size, c.inner, "silu", names=names)
        router = Router(
            scope, c.hidden_size, c.num_experts, c.num_experts_per_tok,
            correction="expert_bias" if c.use_expert_bias else "", score="sigmoid", renormalize=c.norm_topk_prob,
            least_sum=1e-6, scale=c.routed_scaling_factor,
        )  # fmt: skip
        bank = separate(_moe.numbered(scope, c.num_experts), c.hidden_size, c.moe_intermediate_size, names)
        return MoeMlp(router, bank, "silu")


class Model(lfm2.Model):
    """LFM 2's model, with this file's decoder layers."""

    layer = Layer
