"""OLMo 2: norms after attention and feed-forward layer instead of before, and on all queries and all keys together."""

from __future__ import annotations

from tokenmill.layers.scope import Scope
from tokenmill.models import llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Size
from tokenmill.program.value import Value


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Olmo2Config."""

    has_mlp_bias = False

    vocab_size: Size = 50304
    max_position_embeddings: Length | None = 2048
    rms_norm_eps: float = 1e-5


class Attention(llama.Attention):
    """Llama's attention, with a norm on the row of all query heads and one on that of all key heads."""

    def __init__(self, c: llama.Config, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.q_norm = c.norm(scope / "q_norm", c.num_attention_heads * c.head_size)
        self.k_norm = c.norm(scope / "k_norm", c.kv_heads * c.head_size)

    def norm(self, q: Value, k: Value) -> tuple[Value, Value]:
        """Normalize the rows of queries and keys."""
        return self.q_norm(q), self.k_norm(k)


class Layer(llama.Layer):
    """Decoder layer: attention and feed-forward layer, each with a norm after it and a residual connection."""

    attention: type[llama.Attention] = Attention

    def __init__(self, c: llama.Config, scope: Scope, layer: int) -> None:
        self.attn = self.attention(c, scope / "self_attn", layer)
        self.norm1 = c.norm(scope / "post_attention_layernorm", c.hidden_size)
        self.mlp = self.feed_forward(c, scope, layer)
        self.norm2 = c.norm(scope / "post_feedforward_layernorm", c.hidden_size)

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
