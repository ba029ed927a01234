"""GLM: Llama with half of each head rotated in pairs of adjacent columns, and a fused feed-forward layer."""

from __future__ import annotations

from typing import Any, ClassVar

from tokenmill.layers.mlp import GatedMlp
from tokenmill.layers.scope import Scope
from tokenmill.models import llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Apply, Biases, HeadDim, Size


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' GlmConfig."""

    rotates_whole_heads: ClassVar[bool] = False
    rotates_neighbours: ClassVar[bool] = True

    vocab_size: Size = 151552
    intermediate_size: Size = 13696
    num_hidden_layers: llama.Layers = 40
    num_key_value_heads: Size | None = 2
    head_dim: HeadDim | None = 128
    max_position_embeddings: Length | None = 131072
    rms_norm_eps: float = 0.00000015625
    partial_rotary_factor: float = 0.5
    attention_bias: bool = True

    @property
    def biases(self) -> Biases:
        """Return the biases: of queries, keys and values only, as config.json sets them."""
        return Biases(qkv=self.attention_bias)


class Layer(llama.Layer):
    """Llama's decoder layer, with a feed-forward layer whose first two matrices are stored as one."""

    def feed_forward(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return the feed-forward layer."""
        return GatedMlp(scope / "mlp", c.hidden_size, c.intermediate_size, c.act, fused="gate_up_proj")


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
