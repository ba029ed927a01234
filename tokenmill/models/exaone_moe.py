"""K-EXAONE: EXAONE 4's attention with norms before each part, and DeepSeek's experts."""

from __future__ import annotations

from typing import Any, Literal

from tokenmill.layers.moe import Router
from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, exaone4, llama, qwen3
from tokenmill.models._moe import Count, Natural
from tokenmill.models.llama import Apply, Size


class Config(exaone4.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' ExaoneMoeConfig."""

    mlp_layer_types: list[Literal["dense", "sparse"]] | None = None
    first_k_dense_replace: int = 1
    moe_intermediate_size: Size = 1024
    num_experts: Count = 64
    num_experts_per_tok: Count = 8
    num_shared_experts: Natural = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    n_group: Count = 1
    topk_group: Count = 1

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        if self.mlp_layer_types is not None and len(self.mlp_layer_types) != self.num_hidden_layers:
            raise ValueError(f"{len(self.mlp_layer_types)} mlp_layer_types for {self.num_hidden_layers} layers")
        if self.num_experts % self.n_group or self.topk_group > self.n_group:
            raise ValueError(f"{self.topk_group} of {self.n_group} groups of {self.num_experts} experts")
        _moe.check_top_k(self.num_experts_per_tok, self.num_experts // self.n_group * self.topk_group)

    def sparse(self, layer: int) -> bool:
        """Return True for a layer with experts."""
        if self.mlp_layer_types is None:
            return layer >= self.first_k_dense_replace
        return self.mlp_layer_types[layer] == "sparse"


class Layer(llama.Layer):
    """Llama's decoder layer, with norms on query and key heads, and experts."""

    attention = qwen3.Attention

    def feed_forward(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return the experts, and the one that all rows share beside them; or a dense layer."""
        if not c.sparse(layer):
            return super().feed_forward(c, scope, layer)
        mlp = scope / "mlp"
        router = Router(
            mlp, c.hidden_size, c.num_experts, c.num_experts_per_tok, correction="gate.e_score_correction_bias",
            score="sigmoid", groups=c.n_group, top_groups=c.topk_group, group_best=2, renormalize=c.norm_topk_prob,
            least_sum=1e-20, scale=c.routed_scaling_factor,
        )  # fmt: skip
        return _moe.beside_shared(c, mlp, router, c.num_experts, c.moe_intermediate_size, c.num_shared_experts)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
