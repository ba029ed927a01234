"""Gemma 3: Gemma 2 with norms on query and key heads, and layers with a window that have a rotation of their own."""

from __future__ import annotations

from typing import Any

from tokenmill.models import _windows, gemma2, llama, qwen3
from tokenmill.models.base import Length
from tokenmill.models.llama import Size


class Config(gemma2.Windows, _windows.TwoRopes, kw_only=True):
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


class Layer(gemma2.Layer):
    """Gemma 2's decoder layer, with norms on query and key heads."""

    attention = qwen3.Attention


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
