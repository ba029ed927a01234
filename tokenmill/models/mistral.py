"""Mistral: Llama, in some versions with a sliding window on every layer."""

from __future__ import annotations

from tokenmill.models import llama
from tokenmill.models.llama import Model, Size

__all__ = ["Config", "Model"]


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads."""

    max_position_embeddings: int = 4096 * 32
    num_key_value_heads: Size = 8
    sliding_window: int = 0

    def window(self, layer: int) -> int:
        """Tokens that a layer attends to; 0: all."""
        return self.sliding_window
