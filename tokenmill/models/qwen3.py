"""Qwen 3: Llama with an RMSNorm on each query and key head."""

from __future__ import annotations

from tokenmill.layers.scope import Scope
from tokenmill.models import llama, qwen2
from tokenmill.program.value import Value


class Config(qwen2.Windows, kw_only=True):
    """The fields of config.json that this file reads."""

    head_dim: llama.HeadDim | None = 128

    @property
    def biases(self) -> llama.Biases:
        """Return the biases: those of attention as config.json sets them, none in the feed-forward layer."""
        return llama.Biases(self.attention_bias, self.attention_bias)


class Attention(llama.Attention):
    """Llama's attention, with norms on query and key heads."""

    def __init__(self, c: llama.Config, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.q_norm = c.norm(scope / "q_norm", c.head_size, per_head=True)
        self.k_norm = c.norm(scope / "k_norm", c.head_size, per_head=True)

    def norm(self, q: Value, k: Value) -> tuple[Value, Value]:
        """Normalize each head of queries and keys."""
        return self.q_norm(q), self.k_norm(k)


class Layer(llama.Layer):
    """Llama's decoder layer, with this file's attention."""

    attention = Attention


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
