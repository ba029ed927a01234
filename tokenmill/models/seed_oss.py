"""Seed-OSS: Llama with a flag of its own for the bias of attention's output."""

from __future__ import annotations

from tokenmill.models import llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Biases, HeadDim, Model, Size

__all__ = ["Config", "Model"]


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' SeedOssConfig."""

    vocab_size: Size = 155136
    intermediate_size: Size = 27648
    num_hidden_layers: llama.Layers = 64
    num_attention_heads: Size = 80
    num_key_value_heads: Size | None = 8
    head_dim: HeadDim | None = 128
    max_position_embeddings: Length | None = 524288
    attention_bias: bool = True
    attention_out_bias: bool = False

    @property
    def biases(self) -> Biases:
        """Return the flags as config.json sets them."""
        return Biases(self.attention_bias, self.attention_out_bias, self.mlp_bias)
