"""Phi 3.5 MoE: Mixtral with LayerNorms, biases, and another choice of experts."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.linear import Linears
from tokenmill.layers.norm import LayerNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import llama, mixtral
from tokenmill.models._moe import Count
from tokenmill.models.llama import Biases, Size


class Config(mixtral.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' PhimoeConfig."""

    vocab_size: Size = 32064
    intermediate_size: Size = 6400
    num_local_experts: Count = 16
    router_jitter_noise: float = 0.01
    lm_head_bias: bool = False

    @property
    def biases(self) -> Biases:
        """Return the biases: those of attention as config.json sets them, none in the feed-forward layer."""
        return Biases(self.attention_bias, self.attention_bias)

    @property
    def choice(self) -> dict[str, Any]:
        """Return the fields of the routing, as of `ops.Route`."""
        return {"score": "sparsemixer", "margin": self.router_jitter_noise}


class Layer(mixtral.Layer):
    """Mixtral's decoder layer, with LayerNorms."""

    def __init__(self, c: Any, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.norm1 = LayerNorm(scope / "input_layernorm", c.hidden_size, c.rms_norm_eps)
        self.norm2 = LayerNorm(scope / "post_attention_layernorm", c.hidden_size, c.rms_norm_eps)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers, a LayerNorm at the end, and an optional bias of the logits."""

    layer = Layer

    def __init__(self, c: Config, scope: Scope) -> None:
        super().__init__(c, scope)
        self.norm = LayerNorm(scope / "model" / "norm", c.hidden_size, c.rms_norm_eps)
        if c.lm_head_bias:
            outputs = {"lm_head": c.vocab_size}
            self.head.many.bias = Linears(scope, c.hidden_size, shard="vocab", bias=True, outputs=outputs).bias
