"""BLOOM: ALiBi instead of positions, and a norm of the embedding."""

from __future__ import annotations

from collections.abc import Mapping

from tokenmill.layers.attention import alibi_slopes
from tokenmill.layers.norm import LayerNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import _gpt
from tokenmill.models._gpt import Layers, Length, Names, Size, field
from tokenmill.program.ops import Part
from tokenmill.program.value import Inputs, Value

_TRAINED = 2048  # tokens, which most of these models' config.json do not name


class Config(_gpt.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' BloomConfig."""

    mapped = frozenset({"num_hidden_layers", "num_attention_heads"})
    names = Names("transformer.word_embeddings", "transformer.h", "transformer.ln_f", attention="self_attention")

    vocab_size: Size = 250880
    hidden_size: Size = 64
    n_embed: Size | None = None  # the name of hidden_size in old files; it wins
    num_hidden_layers: Layers = field(default=2, name="n_layer")
    num_attention_heads: Size = field(default=8, name="n_head")
    max_position_embeddings: Length | None = field(default=_TRAINED, name="seq_length")
    layer_norm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that are inconsistent."""
        self.hidden_size = self.n_embed or self.hidden_size
        super().__post_init__()

    @property
    def eps(self) -> float:
        """Epsilon of the norms."""
        return self.layer_norm_epsilon

    @property
    def alibi(self) -> tuple[float, ...]:
        """Slopes of ALiBi, one for each head."""
        return alibi_slopes(self.num_attention_heads)

    @property
    def qkv(self) -> Mapping[str, int | tuple[int, ...] | tuple[Part, ...]]:
        """See `_gpt.Config`."""
        return self.qkv_by_head


class Layer(_gpt.Layer):
    """Decoder layer. In some models the normalized values are the residual."""

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.normed_residual = c.apply_residual_connection_post_layernorm

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        if not self.normed_residual:
            return super().__call__(x)
        assert self.norm2 is not None
        normed = self.norm1(x)
        normed = self.norm2(normed + self.attn(normed))
        return normed + self.mlp(normed)


class Model(_gpt.Model):
    """Complete model, with a norm of the embedding."""

    layer = Layer  # type: ignore[assignment]

    def __init__(self, c: Config, scope: Scope) -> None:
        super().__init__(c, scope)
        self.embed_norm = LayerNorm(scope / f"{c.names.embed}_layernorm", c.hidden_size, c.eps)

    def begin(self, inputs: Inputs) -> Value:
        """Record the input of the first layer, (tokens, hidden)."""
        return self.embed_norm(self.embed(inputs.ids))
