"""DeepSeek V2: V3 with another choice of experts."""

from __future__ import annotations

from typing import Any, Literal

from tokenmill.models import deepseek_v3
from tokenmill.models._moe import Count, Natural
from tokenmill.models.base import Length
from tokenmill.models.deepseek_v3 import Model
from tokenmill.models.llama import Size

__all__ = ["Config", "Model"]


class Config(deepseek_v3.Latent, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' DeepseekV2Config."""

    vocab_size: Size = 102400
    max_position_embeddings: Length | None = 2048
    moe_intermediate_size: Size = 1407
    n_routed_experts: Count = 64
    n_shared_experts: Natural = 2
    num_experts_per_tok: Count
    n_group: Count | None = None
    topk_group: Count | None = None
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or for biases of the feed-forward layer."""
        super().__post_init__()
        if self.mlp_bias:
            raise ValueError("`mlp_bias` is true, but experts with biases are not supported; leave it out")

    @property
    def choice(self) -> dict[str, Any]:
        """Return the fields of the routing, as of `ops.Route`."""
        limited = self.topk_method == "group_limited_greedy"
        groups, top = (self.n_group or 1, self.topk_group or 1) if limited else (1, 1)
        return {"groups": groups, "top_groups": top, "scale": self.routed_scaling_factor}
