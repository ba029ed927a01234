"""GPT-NeoX and Pythia: partial rotation, attention and feed-forward layer in parallel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from tokenmill.layers.attention import Rope
from tokenmill.models import _gpt
from tokenmill.models._gpt import Act, Biases, Layers, Model, Names, Size
from tokenmill.models.base import Length
from tokenmill.program.ops import Part

__all__ = ["Config", "Model"]


class Config(_gpt.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' GPTNeoXConfig."""

    names = Names("gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm", head="embed_out")

    vocab_size: Size = 50432
    hidden_size: Size = 6144
    num_hidden_layers: Layers = 44
    num_attention_heads: Size = 64
    intermediate_size: Size = 24576
    hidden_act: Act = "gelu"
    max_position_embeddings: Length | None = 2048
    layer_norm_eps: float = 1e-5
    rotary_pct: float = 0.25
    rotary_emb_base: Annotated[float, msgspec.Meta(gt=0)] = 10000.0
    partial_rotary_factor: float | None = None  # transformers 5's name of rotary_pct
    rope_theta: float | None = None  # and of rotary_emb_base
    rope_scaling: dict[str, Any] | None = None
    use_parallel_residual: bool = True
    attention_bias: bool = True
    tie_word_embeddings: bool = False

    @property
    def parallel(self) -> bool:  # type: ignore[override]
        """True if attention and feed-forward layer read the same input."""
        return self.use_parallel_residual

    @property
    def inner(self) -> int:
        """Number of columns within the feed-forward layer."""
        return self.intermediate_size

    @property
    def activation(self) -> str:
        """Activation of the feed-forward layer, by its name in transformers."""
        return self.hidden_act

    @property
    def eps(self) -> float:
        """Epsilon of the norms."""
        return self.layer_norm_eps

    @property
    def biases(self) -> Biases:
        """Flags of the products that have a bias."""
        return Biases(self.attention_bias, self.attention_bias, True)

    @property
    def rope(self) -> Rope:
        """Rotary embedding of queries and keys."""
        share = self.rotary_pct if self.partial_rotary_factor is None else self.partial_rotary_factor
        theta = self.rope_theta or self.rotary_emb_base
        return Rope(self.head_size, theta, self.length, self.rope_scaling, int(self.head_size * share))

    @property
    def qkv(self) -> Mapping[str, int | tuple[int, ...] | tuple[Part, ...]]:
        """See `_gpt.Config`."""
        return self.qkv_by_head
