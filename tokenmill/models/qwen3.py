"""Qwen 3: Llama with a norm on each query and key head."""

from __future__ import annotations

from tokenmill.layers.norm import RmsNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import llama, qwen2
from tokenmill.program.value import Value


class Config(qwen2.Windows, kw_only=True):
    """The fields of config.json that this file reads."""

    head_dim: llama.HeadDim | None = 128

    @property
    def biases(self) -> llama.Biases:
        """Attention's are up to config.json, the feed-forward layer has none."""
        return llama.Biases(self.attention_bias, self.attention_bias)


class Attention(llama.Attention):
    """Llama's, with the norms."""

    def __init__(self, c: llama.Config, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.q_norm = RmsNorm(scope / "q_norm", c.head_size, c.rms_norm_eps, per_head=True)
        self.k_norm = RmsNorm(scope / "k_norm", c.head_size, c.rms_norm_eps, per_head=True)

    def norm(self, q: Value, k: Value) -> tuple[Value, Value]:
        """Each head by itself."""
        return self.q_norm(q), self.k_norm(k)


class Layer(llama.Layer):
    """Llama's, with this attention."""

    attention = Attention


class Model(llama.Model):
    """Llama's, of these layers."""

    layer = Layer
