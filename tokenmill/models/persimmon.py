"""Persimmon: a fused matrix by heads, norms of queries and keys, the square of ReLU."""

from __future__ import annotations

from collections.abc import Mapping

from tokenmill.models import phi
from tokenmill.models._gpt import Act, Layers, Length, Model, Names, Size
from tokenmill.program.ops import Part

__all__ = ["Config", "Model"]


class Config(phi.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' PersimmonConfig."""

    names = Names("model.embed_tokens", "model.layers", "model.final_layernorm", attention="self_attn")
    parallel = False

    vocab_size: Size = 262144
    hidden_size: Size = 4096
    intermediate_size: Size = 16384
    num_hidden_layers: Layers = 36
    num_attention_heads: Size = 64
    hidden_act: Act = "relu2"
    max_position_embeddings: Length | None = 16384
    qk_layernorm: bool = True

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_attention_heads

    @property
    def head_bias(self) -> bool:
        """True if the output layer has a bias."""
        return False

    @property
    def qkv(self) -> Mapping[str, int | tuple[int, ...] | tuple[Part, ...]]:
        """See `_gpt.Config`."""
        return self.qkv_by_head
