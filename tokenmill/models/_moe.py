"""Feed-forward layers of architectures with experts: which layers have them, routing, shared experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from tokenmill.layers.mlp import GatedMlp
from tokenmill.layers.moe import MoeMlp, Router, separate
from tokenmill.layers.scope import Scope
from tokenmill.models import llama
from tokenmill.models.llama import Size
from tokenmill.program.value import Value

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]


def check_top_k(top_k: int, experts: int) -> None:
    """Raise ValueError if more experts are to be chosen than there are."""
    if top_k > experts:
        raise ValueError(f"{top_k} experts are to be chosen for each token, but there are {experts}")


def numbered(scope: Scope, experts: int) -> list[Scope]:
    """Return the scopes of experts that are stored one by one."""
    return [scope / f"experts.{i}" for i in range(experts)]


def beside_shared(c: llama.Config, mlp: Scope, router: Router, experts: int, inner: int, shared: int) -> MoeMlp:
    """Return `experts` that are stored one by one, and beside them `shared` ones that all rows take, as one layer.

    `inner`: inner columns of an expert. `shared`: 0 for none.
    """
    always = GatedMlp(mlp / "shared_experts", c.hidden_size, inner * shared, c.act) if shared else None
    return MoeMlp(router, separate(numbered(mlp, experts), c.hidden_size, inner), c.act, shared=always)


class Config(llama.Config, kw_only=True):
    """Fields of the architectures that route as DeepSeek does: groups, a correction of the choice, shared experts."""

    moe_intermediate_size: Size = 2048
    n_routed_experts: Count = 256
    n_shared_experts: Natural = 1
    num_experts_per_tok: Count = 8
    routed_scaling_factor: float = 1.0
    n_group: Count | None = 1
    topk_group: Count | None = 1
    norm_topk_prob: bool = True
    first_k_dense_replace: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        groups, top = self.n_group or 1, self.topk_group or 1
        if self.n_routed_experts % groups or top > groups:
            raise ValueError(f"{top} of {groups} groups of {self.n_routed_experts} experts")
        check_top_k(self.num_experts_per_tok, self.n_routed_experts // groups * top)

    @property
    def choice(self) -> dict[str, Any]:
        """Return the fields of the routing, as of `ops.Route`."""
        return {
            "correction": "gate.e_score_correction_bias",
            "score": "sigmoid",
            "groups": self.n_group or 1,
            "top_groups": self.topk_group or 1,
            "group_best": 2,
            "renormalize": self.norm_topk_prob,
            "least_sum": 1e-20,
            "scale": self.routed_scaling_factor,
        }


class Layer(llama.Layer):
    """Llama's decoder layer, with experts from layer `first_k_dense_replace` on."""

    def feed_forward(self, c: Config, scope: Scope, layer: int) -> Callable[[Value], Value]:
        """Return the experts, and the one that all rows share beside them; or a dense layer."""
        if layer < c.first_k_dense_replace:
            return super().feed_forward(c, scope, layer)
        mlp = scope / "mlp"
        router = Router(mlp, c.hidden_size, c.n_routed_experts, c.num_experts_per_tok, **c.choice)
        return beside_shared(c, mlp, router, c.n_routed_experts, c.moe_intermediate_size, c.n_shared_experts)
