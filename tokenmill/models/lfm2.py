"""LFM 2: short gated convolutions, and attention in some layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenmill.layers.linear import Linear, Linears
from tokenmill.layers.mlp import GatedMlp, times
from tokenmill.layers.norm import RmsNorm
from tokenmill.layers.recurrence import CausalConv
from tokenmill.layers.scope import Scope
from tokenmill.models import llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Apply, Size
from tokenmill.models.mamba import Kernel
from tokenmill.program.value import Value

_KINDS = ("full_attention", "conv")


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Lfm2Config."""

    hidden_size: Size = 2560
    intermediate_size: Size = 12288
    vocab_size: Size = 65536
    num_key_value_heads: Size | None = 8
    max_position_embeddings: Length | None = 128_000
    norm_eps: float = 1e-5
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True
    tie_embedding: bool | None = None  # a name of `tie_word_embeddings` that comes before it
    conv_bias: bool = False
    conv_L_cache: Kernel = 3  # noqa: N815  the field's name
    block_ff_dim: Size | None = None  # a name of `intermediate_size` that comes before it
    block_multiple_of: Size = 256
    block_ffn_dim_multiplier: float | None = 1.0
    block_auto_adjust_ff_dim: bool = True
    full_attn_idxs: list[int] | None = None
    layer_types: list[str] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or for layers of an unknown kind."""
        self.rms_norm_eps = self.norm_eps
        super().__post_init__()
        if len(self.kinds) != self.num_hidden_layers or not set(self.kinds) <= set(_KINDS):
            raise ValueError(f"`layer_types` is {self.kinds}; expected {self.num_hidden_layers} of {', '.join(_KINDS)}")

    @property
    def kinds(self) -> Sequence[str]:
        """Kind of each layer."""
        layers = range(self.num_hidden_layers)
        attends = layers if self.full_attn_idxs is None else self.full_attn_idxs
        return self.layer_types or [_KINDS[i not in attends] for i in layers]

    @property
    def inner(self) -> int:
        """Number of inner columns of the feed-forward layer."""
        size = self.block_ff_dim or self.intermediate_size
        if not self.block_auto_adjust_ff_dim:
            return size
        size = int(2 * size / 3)
        if self.block_ffn_dim_multiplier is None:
            return size
        return -(-int(self.block_ffn_dim_multiplier * size) // self.block_multiple_of) * self.block_multiple_of


class Attention(llama.Attention):
    """Llama's attention, with norms on query and key heads and other names."""

    def __init__(self, c: llama.Config, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        heads = c.num_attention_heads * c.head_size
        self.out = Linear(scope, heads, "out_proj", c.hidden_size, shard="row")
        self.q_norm = RmsNorm(scope / "q_layernorm", c.head_size, c.rms_norm_eps, per_head=True)
        self.k_norm = RmsNorm(scope / "k_layernorm", c.head_size, c.rms_norm_eps, per_head=True)

    def norm(self, q: Value, k: Value) -> tuple[Value, Value]:
        """Normalize each head of queries and keys."""
        return self.q_norm(q), self.k_norm(k)


class ShortConv:
    """Convolution of a gated input, gated again: out(c · conv(b · x))."""

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        n = c.hidden_size
        self.split = Linears(scope, n, shard="column", bias=c.conv_bias, outputs={"in_proj": (n, n, n)})
        self.conv = CausalConv(scope / "conv", n, c.conv_L_cache, layer=layer, bias=c.conv_bias, shard="column")
        self.out = Linear(scope, n, "out_proj", n, shard="row", bias=c.conv_bias)

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        b, c, x = self.split(x)
        return self.out(times(c, self.conv(times(b, x))))


class Layer(llama.Layer):
    """Llama's decoder layer, with a convolution or attention."""

    attention = Attention
    first_norm, second_norm = "operator_norm", "ffn_norm"

    def mixer(self, c: Config, scope: Scope, layer: int) -> Apply:
        """Return the convolution or attention."""
        if c.kinds[layer] == "full_attention":
            return super().mixer(c, scope, layer)
        return ShortConv(c, scope / "conv", layer)

    def feed_forward(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return the feed-forward layer."""
        return GatedMlp(scope / "feed_forward", c.hidden_size, c.inner, c.act, names=("w1", "w3", "w2"))


class Model(llama.Model):
    """Llama's model, with this file's layers."""

    layer: type[llama.Layer] = Layer

    def __init__(self, c: Config, scope: Scope) -> None:
        c.tie_word_embeddings = c.tie_word_embeddings if c.tie_embedding is None else c.tie_embedding
        super().__init__(c, scope)
        self.norm = RmsNorm(scope / "model.embedding_norm", c.hidden_size, c.norm_eps)
