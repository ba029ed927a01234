"""ERNIE 4.5: Llama whose rotation pairs adjacent columns, with one flag for all biases."""

from __future__ import annotations

from typing import ClassVar

from tokenmill.models import llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Biases, HeadDim, Model, Size

__all__ = ["Config", "Model"]


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Ernie4_5Config."""

    rotates_neighbours: ClassVar[bool] = True

    vocab_size: Size = 103424
    hidden_size: Size = 1024
    intermediate_size: Size = 3072
    num_hidden_layers: llama.Layers = 18
    num_attention_heads: Size = 16
    num_key_value_heads: Size | None = 2
    head_dim: HeadDim | None = 128
    max_position_embeddings: Length | None = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: llama.Theta = 500000.0
    tie_word_embeddings: bool = True
    use_bias: bool = False

    @property
    def biases(self) -> Biases:
        """Return that all products have a bias, or none."""
        return Biases(self.use_bias, self.use_bias, self.use_bias)
