"""dots.llm1: Qwen 3's attention with DeepSeek's experts, and an optional sliding window on the upper layers."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from tokenmill.models import _moe, llama, qwen3
from tokenmill.models._moe import Count, Natural
from tokenmill.models.base import Length
from tokenmill.models.llama import Size

__all__ = ["Config", "Model"]


class Config(_moe.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Dots1Config."""

    has_mlp_bias = False

    vocab_size: Size = 152064
    hidden_size: Size = 4608
    intermediate_size: Size = 10944
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)] = 62
    num_key_value_heads: Size | None = 32
    moe_intermediate_size: Size = 1408
    n_routed_experts: Count
    n_shared_experts: Natural
    num_experts_per_tok: Count
    norm_topk_prob: bool = False
    sliding_window: Length | None = 4096
    max_window_layers: int = 62
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"{len(self.layer_types)} layer_types for {self.num_hidden_layers} layers")
        if "sliding_attention" in (self.layer_types or ()) and self.sliding_window is None:
            raise ValueError("`layer_types` names sliding_attention, but `sliding_window` is null; give a number")

    def window(self, layer: int) -> int:
        """Return the sliding window of a layer in tokens; 0: all tokens."""
        by_default = layer >= self.max_window_layers
        slides = by_default if self.layer_types is None else self.layer_types[layer] == "sliding_attention"
        return self.sliding_window or 0 if slides else 0


class Layer(_moe.Layer):
    """Decoder layer with DeepSeek's experts and norms on query and key heads."""

    attention = qwen3.Attention


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
