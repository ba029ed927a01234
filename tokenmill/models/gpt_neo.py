"""GPT-Neo: GPT-2 with plain matrices, unscaled attention, and a window on every second layer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from tokenmill.models import _gpt
from tokenmill.models._gpt import Act, Biases, Layers, Length, Model, Names, Size, field

__all__ = ["Config", "Model"]

Kinds = tuple[list[Literal["global", "local"]], Annotated[int, msgspec.Meta(ge=0, le=1 << 12)]]
"""Kinds of layers, and how often they are repeated"""


class Config(_gpt.Gpt2Names, _gpt.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' GPTNeoConfig."""

    mapped = frozenset({"num_hidden_layers", "num_attention_heads"})
    names = Names(
        "transformer.wte", "transformer.h", "transformer.ln_f", positions="transformer.wpe", norm1="ln_1", norm2="ln_2",
        attention="attn.attention", qkv=("q_proj", "k_proj", "v_proj"), output="out_proj", inner=("c_fc", "c_proj"),
    )  # fmt: skip

    vocab_size: Size = 50257
    hidden_size: Size = 2048
    num_hidden_layers: Layers = field(default=24, name="num_layers")
    num_attention_heads: Size = field(default=16, name="num_heads")
    max_position_embeddings: Length | None = 2048
    intermediate_size: Size | None = None
    attention_types: list[Kinds] | None = None
    window_size: Size = 256
    activation_function: Act = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that are inconsistent."""
        super().__post_init__()
        if len(self.kinds) != self.num_hidden_layers:
            raise ValueError(f"`attention_types` names {len(self.kinds)} layers, `num_layers` {self.num_hidden_layers}")

    @property
    def kinds(self) -> list[str]:
        """Kind of each layer."""
        types: list[Any] = [(["global", "local"], 12)] if self.attention_types is None else list(self.attention_types)
        return [kind for kinds, times in types for kind in kinds * times]

    @property
    def inner(self) -> int:
        """Number of columns within the feed-forward layer."""
        return self.intermediate_size or 4 * self.hidden_size

    @property
    def biases(self) -> Biases:
        """Flags of the products that have a bias."""
        return Biases(output=True, mlp=True)

    def window(self, layer: int) -> int:
        """Return the sliding window of a layer in tokens; 0: all tokens."""
        return self.window_size if self.kinds[layer] == "local" else 0

    def scale(self, layer: int) -> float:
        """Return the factor of a layer's attention scores."""
        return 1.0
