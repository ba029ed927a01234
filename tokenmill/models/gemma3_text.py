"""Gemma 3: Gemma 2 with norms on query and key heads, and layers with a window that have a rotation of their own."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.attention import Rope
from tokenmill.models import _windows, gemma2, llama, qwen3
from tokenmill.models.base import Length
from tokenmill.models.llama import Size


class Config(gemma2.Windows, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Gemma3TextConfig.

    `attn_logit_softcapping` has no effect, as in transformers.
    """

    vocab_size: Size = 262208
    max_position_embeddings: Length | None = 131072
    rope_theta: llama.Theta = 1000000.0
    rope_local_base_freq: llama.Theta = 10000.0
    rope_local_scaling: dict[str, Any] | None = None
    sliding_window_pattern: Size = 6

    def default_kind(self, layer: int) -> _windows.Kind:
        """Return that the last of every `sliding_window_pattern` layers has no window."""
        return _windows.every(self.sliding_window_pattern, layer)

    def rope_of(self, layer: int) -> Rope | None:
        """Return the rotary embedding of a layer."""
        if self.kind(layer) == "full_attention":
            return self.rope
        return _windows.local_rope(self, self.rope_local_base_freq, self.rope_local_scaling)

    @property
    def max_positions(self) -> int:
        """Maximum length of a sequence in tokens, which config.json states with the scaling applied."""
        return self.rope.table.max_position


class Layer(gemma2.Layer):
    """Gemma 2's decoder layer, with norms on query and key heads."""

    attention = qwen3.Attention


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
