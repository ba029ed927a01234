"""Command R7B and Command A: Command R with windows, and layers of all tokens that have no positions."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from tokenmill.models import cohere
from tokenmill.models._gpt import Length, Model

__all__ = ["Config", "Model"]


class Config(cohere.Fields, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Cohere2Config."""

    sliding_window: Length | None = 4096
    sliding_window_pattern: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)] = 4  # each such layer is of all tokens
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"{len(self.layer_types)} layer_types for {self.num_hidden_layers} layers")

    def window(self, layer: int) -> int:
        """Return the sliding window of a layer in tokens; 0: all tokens."""
        if self.layer_types is not None:
            slides = self.layer_types[layer] == "sliding_attention"
        else:
            slides = (layer + 1) % self.sliding_window_pattern > 0
        return (self.sliding_window or 0) if slides else 0

    def rotates(self, layer: int) -> bool:
        """Return True if a layer rotates its queries and keys."""
        return self.window(layer) > 0
