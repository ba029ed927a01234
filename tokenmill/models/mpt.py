"""MPT: ALiBi, no biases."""

from __future__ import annotations

from math import ceil, log2
from typing import Annotated, Literal

import msgspec

from tokenmill.layers.norm import LayerNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import _gpt
from tokenmill.models._gpt import Biases, Layers, Length, Model, Names, Size, field

__all__ = ["Config", "Model"]

Positive = Annotated[float, msgspec.Meta(gt=0)]


class Attention(msgspec.Struct, kw_only=True):
    """The object `attn_config`, with the defaults of transformers' MptAttentionConfig."""

    attn_type: Literal["multihead_attention"] = "multihead_attention"
    clip_qkv: Annotated[float, msgspec.Meta(ge=0)] | None = None
    softmax_scale: Positive | None = None
    prefix_lm: Literal[False] = False
    qk_ln: Literal[False] = False
    alibi: Literal[True] = True
    alibi_bias_max: Positive = 8


class Config(_gpt.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' MptConfig."""

    mapped = frozenset({"hidden_size", "num_hidden_layers", "num_attention_heads"})
    names = Names(
        "transformer.wte", "transformer.blocks", "transformer.norm_f", norm1="norm_1", norm2="norm_2",
        attention="attn", qkv=("Wqkv",), output="out_proj", mlp="ffn", inner=("up_proj", "down_proj"),
    )  # fmt: skip

    vocab_size: Size = 50368
    hidden_size: Size = field(default=2048, name="d_model")
    num_hidden_layers: Layers = field(default=24, name="n_layers")
    num_attention_heads: Size = field(default=16, name="n_heads")
    max_position_embeddings: Length | None = field(default=2048, name="max_seq_len")
    attention: Attention = field(default_factory=Attention, name="attn_config")
    layer_norm_epsilon: float = 1e-5
    logit_scale: Literal[1] | None = None
    tie_word_embeddings: bool = True

    @property
    def activation(self) -> str:
        """Activation of the feed-forward layer, by its name in transformers."""
        return "gelu"

    @property
    def eps(self) -> float:
        """Epsilon of the norms."""
        return self.layer_norm_epsilon

    @property
    def biases(self) -> Biases:
        """Flags of the products that have a bias."""
        return Biases()

    @property
    def alibi(self) -> tuple[float, ...]:
        """Slopes of ALiBi, one for each head. Of a number that is no power of two, every second one comes first."""
        heads, power = self.num_attention_heads, 2 ** ceil(log2(self.num_attention_heads))
        slopes = [2.0 ** (-self.attention.alibi_bias_max / power * (i + 1)) for i in range(power)]
        return tuple(slopes if power == heads else [*slopes[1::2], *slopes[::2]][:heads])

    @property
    def clip(self) -> float:
        """Bound of queries, keys and values; 0: none."""
        return self.attention.clip_qkv or 0.0

    def scale(self, layer: int) -> float:
        """Return the factor of a layer's attention scores."""
        return self.attention.softmax_scale or super().scale(layer)

    def norm(self, scope: Scope, width: int) -> LayerNorm:
        """Return a norm of the model."""
        return LayerNorm(scope, width, self.eps, bias=False)
