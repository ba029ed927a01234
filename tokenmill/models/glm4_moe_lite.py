"""GLM 4.7 Flash: DeepSeek V3 in which config.json names the layers with experts."""

from __future__ import annotations

from typing import Literal

from tokenmill.models import deepseek_v3
from tokenmill.models._moe import Count
from tokenmill.models.base import Length
from tokenmill.models.deepseek_v3 import Model
from tokenmill.models.llama import Layers, Size

__all__ = ["Config", "Model"]


class Config(deepseek_v3.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Glm4MoeLiteConfig."""

    has_mlp_bias = False

    vocab_size: Size = 154880
    hidden_size: Size = 2048
    intermediate_size: Size = 10240
    moe_intermediate_size: Size = 1536
    num_hidden_layers: Layers = 47
    num_attention_heads: Size = 20
    n_routed_experts: Count = 64
    routed_scaling_factor: float = 1.8
    q_lora_rank: Size | None = 768
    v_head_dim: Size = 256
    qk_nope_head_dim: Size = 192
    n_group: Count | None = 1
    topk_group: Count | None = 1
    num_experts_per_tok: Count = 4
    max_position_embeddings: Length | None = 202752
    rms_norm_eps: float = 1e-5
    mlp_layer_types: list[Literal["dense", "sparse"]] | None = None
    first_k_dense_replace: int = 1

    def __post_init__(self) -> None:
        """Take the number of dense layers from their list. Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        if (kinds := self.mlp_layer_types) is not None:
            self.first_k_dense_replace = kinds.count("dense")
            if len(kinds) != self.num_hidden_layers or "dense" in kinds[self.first_k_dense_replace :]:
                raise ValueError(
                    f"`mlp_layer_types` is {kinds}; expected {self.num_hidden_layers}, of which the first are dense"
                )
