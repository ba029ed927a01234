"""OLMo 3: OLMo 2 with a sliding window on three of four layers, whose rotation is not scaled."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.attention import Rope
from tokenmill.models import _windows, llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Size
from tokenmill.models.olmo2 import Model

__all__ = ["Config", "Model"]


class Config(_windows.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Olmo3Config."""

    has_mlp_bias = False

    vocab_size: Size = 50304
    max_position_embeddings: Length | None = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: llama.Theta = 500000.0
    rope_local_base_freq: llama.Theta | None = None
    rope_local_scaling: dict[str, Any] | None = None

    def default_kind(self, layer: int) -> _windows.Kind:
        """Return that three of four layers have the window."""
        return _windows.every(4, layer)

    def rope_of(self, layer: int) -> Rope | None:
        """Return the rotary embedding of a layer."""
        if self.kind(layer) == "full_attention":
            return self.rope
        return _windows.local_rope(self, self.rope_local_base_freq or self.rope_theta, self.rope_local_scaling)
