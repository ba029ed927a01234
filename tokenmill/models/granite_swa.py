"""Granite with sliding windows: a sink for each head, and a rotation for each layer or none."""

from __future__ import annotations

from tokenmill.layers.attention import Rope
from tokenmill.models import _windows, gpt_oss, granite, llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Size


class Config(granite.Factors, _windows.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' GraniteSWAConfig."""

    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: granite.Divisor = 1.0
    vocab_size: Size = 100352
    hidden_size: Size = 2560
    intermediate_size: Size = 8192
    num_hidden_layers: llama.Layers = 24
    num_attention_heads: Size = 20
    num_key_value_heads: Size | None = 4
    max_position_embeddings: Length | None = 8192
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    sliding_window: Length | None = 128
    layer_rope_theta: list[float] | None = None  # 0: a layer without positions

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        if self.layer_rope_theta is not None and len(self.layer_rope_theta) != self.num_hidden_layers:
            raise ValueError(f"{len(self.layer_rope_theta)} layer_rope_theta for {self.num_hidden_layers} layers")

    def default_kind(self, layer: int) -> _windows.Kind:
        """Return that the first of every four layers has no window."""
        return "full_attention" if layer % 4 == 0 else "sliding_attention"

    def rope_of(self, layer: int) -> Rope | None:
        """Return the rotary embedding of a layer; None if it has no positions."""
        theta = self.rope_theta if self.layer_rope_theta is None else self.layer_rope_theta[layer]
        return Rope(self.head_size, theta, self.rope.table.max_position, self.rope_scaling) if theta else None


class Layer(llama.Layer):
    """Llama's decoder layer, with sinks in attention."""

    attention = gpt_oss.Attention


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
