"""Qwen 2 and 2.5: Llama with biases on queries, keys and values, and an optional sliding window on the upper layers."""

from __future__ import annotations

from typing import Literal

from tokenmill.models import llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Biases, Model, Size

__all__ = ["Config", "Model"]


class Windows(llama.Config, kw_only=True):
    """Sliding-window fields of Qwen's config.json, and the defaults of its classes."""

    intermediate_size: Size = 22016
    vocab_size: Size = 151936
    max_position_embeddings: Length | None = 32768
    num_key_value_heads: Size | None = 32
    use_sliding_window: bool = False
    sliding_window: Length | None = 4096
    max_window_layers: int | None = 28
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None

    def window(self, layer: int) -> int:
        """Return the sliding window of a layer in tokens; 0: all tokens."""
        if not self.use_sliding_window or self.sliding_window is None:
            return 0
        if self.layer_types is not None:
            return self.sliding_window if self.layer_types[layer] == "sliding_attention" else 0
        assert self.max_window_layers is not None
        return self.sliding_window if layer >= self.max_window_layers else 0

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        slides = self.use_sliding_window and self.sliding_window is not None
        if self.layer_types is None:
            if slides and self.max_window_layers is None:
                raise ValueError("`max_window_layers` is null, but a sliding window is used; give its first layer")
            return
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"{len(self.layer_types)} layer_types for {self.num_hidden_layers} layers")
        if "sliding_attention" in self.layer_types and not slides:
            raise ValueError(
                "`layer_types` names sliding_attention, but no window is used; set `use_sliding_window` to true and "
                "`sliding_window` to a number, or leave `layer_types` out"
            )


class Config(Windows, kw_only=True):
    """The fields of config.json that this file reads."""

    @property
    def biases(self) -> Biases:
        """Return the biases of queries, keys and values, which config.json cannot change."""
        return Biases(qkv=True)
