"""Arcee (AFM): Llama with a feed-forward layer that has no gate and squares the results of ReLU."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.mlp import Mlp
from tokenmill.layers.scope import Scope
from tokenmill.models import llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Act, Apply, Size


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' ArceeConfig."""

    hidden_size: Size = 2560
    intermediate_size: Size = 18432
    hidden_act: Act = "relu2"
    max_position_embeddings: Length | None = 4096
    rms_norm_eps: float = 1e-5


class Layer(llama.Layer):
    """Llama's decoder layer, with another feed-forward layer."""

    def feed_forward(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return the feed-forward layer."""
        names = "up_proj", "down_proj"
        return Mlp(scope / "mlp", c.hidden_size, c.intermediate_size, c.act, names, bias=c.biases.mlp)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
