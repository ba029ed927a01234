"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from tokenmill.layers.moe import MoeMlp, Router, separate
from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, llama
from tokenmill.models._moe import Count
from tokenmill.models.base import Length
from tokenmill.models.llama import Biases, Size
from tokenmill.program.value import Value


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' MixtralConfig."""

    intermediate_size: Size = 14336
    num_key_value_heads: Size | None = 8
    max_position_embeddings: Length | None = 4096 * 32
    rms_norm_eps: float = 1e-5
    rope_theta: Annotated[float, msgspec.Meta(gt=0)] = 1e6
    sliding_window: Length | None = None
    num_local_experts: Count = 8
    num_experts_per_tok: Count = 2

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        _moe.check_top_k(self.num_experts_per_tok, self.num_local_experts)

    def window(self, layer: int) -> int:
        """Return the sliding window of a layer in tokens; 0: all tokens."""
        return self.sliding_window or 0

    @property
    def biases(self) -> Biases:
        """Return that no product has a bias, regardless of config.json."""
        return Biases()

    @property
    def choice(self) -> dict[str, Any]:
        """Return the fields of the routing, as of `ops.Route`."""
        return {"renormalize": True}


class Layer(llama.Layer):
    """Llama's decoder layer, with experts as its feed-forward layer."""

    def feed_forward(self, c: Config, scope: Scope, layer: int) -> Callable[[Value], Value]:
        """Return the experts."""
        moe = scope / "block_sparse_moe"
        router = Router(moe, c.hidden_size, c.num_local_experts, c.num_experts_per_tok, **c.choice)
        scopes = _moe.numbered(moe, c.num_local_experts)
        return MoeMlp(router, separate(scopes, c.hidden_size, c.intermediate_size, ("w1", "w3", "w2")), c.act)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
