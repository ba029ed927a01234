"""Falcon: of 7B (one norm, one key-value head), of 40B (groups of heads, two norms), and of RW (ALiBi, sequential)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from tokenmill.layers.attention import Rope, alibi_slopes
from tokenmill.models import _gpt
from tokenmill.models._gpt import Act, Biases, Layers, Length, Model, Names, Size, field
from tokenmill.program.ops import Part

__all__ = ["Config", "Model"]

_NAMES = Names("transformer.word_embeddings", "transformer.h", "transformer.ln_f", attention="self_attention")


class Config(_gpt.Gpt2Names, _gpt.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' FalconConfig."""

    vocab_size: Size = 65024
    hidden_size: Size = 4544
    n_embed: Size | None = None  # the name of hidden_size in old files; it wins
    num_hidden_layers: Layers = 32
    num_attention_heads: Size = 71
    num_kv_heads: Size | None = None
    num_ln_in_parallel_attn: Literal[1, 2] | None = None
    layer_norm_epsilon: float = 1e-5
    max_position_embeddings: Length | None = 2048
    rope_theta: Annotated[float, msgspec.Meta(gt=0)] = 10000.0
    rope_scaling: dict[str, Any] | None = None
    alibi_positions: bool = field(default=False, name="alibi")
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    ffn_hidden_size: Size | None = None
    activation_function: Act = field(default="gelu", name="activation")
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that are inconsistent, or that transformers' class does not support."""
        self.hidden_size = self.n_embed or self.hidden_size
        super().__post_init__()
        if self.new_decoder_architecture and not self.parallel_attn:
            raise ValueError("`new_decoder_architecture` is parallel, but `parallel_attn` is false; leave that out")
        if self.num_ln_in_parallel_attn == 2 and not self.new_decoder_architecture:
            raise ValueError("`num_ln_in_parallel_attn` is 2, which only `new_decoder_architecture` has; leave it out")

    @property
    def names(self) -> Names:  # type: ignore[override]
        """Names of the checkpoint's modules."""
        if self.new_decoder_architecture and self.num_ln_in_parallel_attn != 1:
            return _NAMES._replace(norm1="ln_attn", norm2="ln_mlp")
        return _NAMES._replace(norm2="") if self.parallel else _NAMES

    @property
    def parallel(self) -> bool:  # type: ignore[override]
        """True if attention and feed-forward layer read the same input."""
        return self.parallel_attn or self.new_decoder_architecture

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        if self.multi_query and not self.new_decoder_architecture:
            return 1
        return (self.num_kv_heads if self.new_decoder_architecture else None) or self.num_attention_heads

    @property
    def inner(self) -> int:
        """Number of columns within the feed-forward layer."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def biases(self) -> Biases:
        """Flags of the products that have a bias."""
        return Biases(self.bias, self.bias, self.bias)

    @property
    def rope(self) -> Rope | None:
        """Rotary embedding of queries and keys; None if there is none."""
        if self.alibi_positions:
            return None
        return Rope(self.head_size, self.rope_theta, self.length, self.rope_scaling)

    @property
    def alibi(self) -> tuple[float, ...]:
        """Slopes of ALiBi, one for each head, rounded to bfloat16 and scaled as these models were trained."""
        if not self.alibi_positions:
            return ()
        bits = np.array(alibi_slopes(self.num_attention_heads), np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
        return tuple(float(slope) * self.head_size**-0.5 for slope in rounded.view(np.float32))

    @property
    def qkv(self) -> Mapping[str, int | tuple[int, ...] | tuple[Part, ...]]:
        """See `_gpt.Config`."""
        return self.qkv_by_head
