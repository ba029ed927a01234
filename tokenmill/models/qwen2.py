"""Qwen 2 and 2.5: Llama with biases on queries, keys and values, and perhaps a sliding window on the upper layers."""

from __future__ import annotations

from typing import Literal

from tokenmill.models import llama
from tokenmill.models.llama import Model, Size

__all__ = ["Config", "Model"]


class Windows(llama.Config, kw_only=True):
    """How Qwen's config.json tells which layers have a sliding window."""

    max_position_embeddings: int = 32768
    num_key_value_heads: Size = 32
    use_sliding_window: bool = False
    sliding_window: int = 4096
    max_window_layers: int = 28
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None

    def window(self, layer: int) -> int:
        """Tokens that a layer attends to; 0: all."""
        if not self.use_sliding_window:
            return 0
        if self.layer_types is not None:
            return self.sliding_window if self.layer_types[layer] == "sliding_attention" else 0
        return self.sliding_window if layer >= self.max_window_layers else 0

    def __post_init__(self) -> None:
        """Fill in what depends on other fields; raises ValueError for what does not fit."""
        super().__post_init__()
        if self.layer_types is not None and len(self.layer_types) < self.num_hidden_layers:
            raise ValueError(f"{len(self.layer_types)} layer_types for {self.num_hidden_layers} layers")


class Config(Windows, kw_only=True):
    """The fields of config.json that this file reads."""

    @property
    def bias(self) -> tuple[bool, bool]:
        """Whether attention's input and output projections have one: not up to config.json."""
        return True, False
