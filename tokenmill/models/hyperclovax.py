"""HyperCLOVA X: Granite with norms after attention and feed-forward layer, too, and logits that are multiplied."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.mlp import scaled
from tokenmill.layers.scope import Scope
from tokenmill.models import granite, llama
from tokenmill.program.value import Value


class Config(granite.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' HyperCLOVAXConfig."""

    attention_multiplier: float | None = None  # type: ignore[assignment]  # None: 1 / root of the columns of a head
    use_post_norm: bool = True

    @property
    def attention_scale(self) -> float:
        """Factor of the products of queries and keys."""
        return float(self.head_size**-0.5) if self.attention_multiplier is None else self.attention_multiplier

    @property
    def logit_scale(self) -> float:
        """Factor of the logits."""
        return self.logits_scaling


class Layer(llama.Layer):
    """Decoder layer: attention and feed-forward layer, each between two norms, and a residual connection."""

    def __init__(self, c: Any, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.after1, self.after2 = (
            c.norm(scope / name, c.hidden_size) if c.use_post_norm else lambda x: x
            for name in ("post_norm1", "post_norm2")
        )

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        x = x + scaled(self.after1(self.attn(self.norm1(x))), self.scale)
        return x + scaled(self.after2(self.mlp(self.norm2(x))), self.scale)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
