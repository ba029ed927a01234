"""Granite MoE: Granite with a mixture of experts in every layer, stored in two tensors."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.moe import MoeMlp, Router, stacked
from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, granite, llama
from tokenmill.models._moe import Count
from tokenmill.models.llama import Apply


class Config(granite.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' GraniteMoeConfig."""

    has_mlp_bias = False

    num_local_experts: Count = 8
    num_experts_per_tok: Count = 2

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        _moe.check_top_k(self.num_experts_per_tok, self.num_local_experts)


class Layer(llama.Layer):
    """Llama's decoder layer, with experts as its feed-forward layer."""

    def feed_forward(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return the experts."""
        return self.experts(c, scope, None)

    def experts(self, c: Config, scope: Scope, shared: Apply | None) -> Apply:
        """Return the experts, with a layer that every row passes as well."""
        moe, names = scope / "block_sparse_moe", ("input_linear.weight", "output_linear.weight")
        count, top_k = c.num_local_experts, c.num_experts_per_tok
        router = Router(moe, c.hidden_size, count, top_k, weight="router.layer.weight", renormalize=True)
        return MoeMlp(router, stacked(moe, count, c.hidden_size, c.intermediate_size, names), c.act, shared=shared)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
