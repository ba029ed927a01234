"""Jais 2: Llama with LayerNorms, biases, and a feed-forward layer without a gate."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.mlp import Mlp
from tokenmill.layers.norm import LayerNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Act, Apply, Size


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Jais2Config."""

    vocab_size: Size = 150272
    hidden_size: Size = 3328
    intermediate_size: Size = 26624
    num_attention_heads: Size = 26
    hidden_act: Act = "relu2"
    max_position_embeddings: Length | None = 8192
    layer_norm_eps: float = 1e-5
    attention_bias: bool = True
    mlp_bias: bool = True

    def norm(self, scope: Scope, width: int, *, per_head: bool = False) -> LayerNorm:
        """Return a norm of this architecture."""
        return LayerNorm(scope, width, self.layer_norm_eps, per_head=per_head)


class Layer(llama.Layer):
    """Llama's decoder layer, with a feed-forward layer without a gate."""

    def feed_forward(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return the feed-forward layer."""
        names = ("up_proj", "down_proj")
        return Mlp(scope / "mlp", c.hidden_size, c.intermediate_size, c.act, names, bias=c.biases.mlp)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
