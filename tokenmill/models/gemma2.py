"""Gemma 2: Gemma with norms before and after each part, soft caps, and a sliding window on every other layer."""

from __future__ import annotations

from typing import Annotated

import msgspec

from tokenmill.layers.scope import Scope
from tokenmill.models import _windows, gemma, llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Act, HeadDim, Size
from tokenmill.program.value import Value

Cap = Annotated[float, msgspec.Meta(gt=0)]


class Windows(gemma.Norms, _windows.Config, kw_only=True):
    """Fields of Gemma 2 and 3, with the defaults of their classes."""

    tie_word_embeddings: bool = True
    head_dim: HeadDim | None = 256
    max_position_embeddings: Length | None = 8192
    use_bidirectional_attention: bool | None = None

    vocab_size: Size = 256000
    hidden_size: Size = 2304
    intermediate_size: Size = 9216
    num_hidden_layers: llama.Layers = 26
    num_attention_heads: Size = 8
    num_key_value_heads: Size | None = 4
    hidden_act: Act = msgspec.field(default="gelu_pytorch_tanh", name="hidden_activation")
    query_pre_attn_scalar: Annotated[float, msgspec.Meta(gt=0)] = 256
    attn_logit_softcapping: Cap | None = None
    final_logit_softcapping: Cap | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or for a model that reads texts in both directions."""
        super().__post_init__()
        gemma.check_direction(self.use_bidirectional_attention)

    @property
    def attention_scale(self) -> float:
        """Factor of the products of queries and keys."""
        return float(self.query_pre_attn_scalar**-0.5)

    @property
    def logit_cap(self) -> float:
        """Soft cap of the logits; 0: none."""
        return self.final_logit_softcapping or 0.0


class Config(Windows, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Gemma2Config."""

    attn_logit_softcapping: Cap | None = 50.0
    final_logit_softcapping: Cap | None = 30.0

    @property
    def attention_cap(self) -> float:
        """Soft cap of the products of queries and keys; 0: none."""
        return self.attn_logit_softcapping or 0.0

    def default_kind(self, layer: int) -> _windows.Kind:
        """Return that every other layer has the window, beginning with the first."""
        return _windows.every(2, layer)


class Layer(llama.Layer):
    """Decoder layer: attention and feed-forward layer, each between two norms, and a residual connection."""

    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    """The checkpoint's names of the norms, in the order of their use."""

    def __init__(self, c: llama.Config, scope: Scope, layer: int) -> None:
        self.before1, self.after1, self.before2, self.after2 = (
            c.norm(scope / name, c.hidden_size) for name in self.norms
        )
        self.attn = self.attention(c, scope / "self_attn", layer)
        self.mlp = self.feed_forward(c, scope, layer)

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        x = x + self.after1(self.attn(self.before1(x)))
        return x + self.after2(self.mlp(self.before2(x)))


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
