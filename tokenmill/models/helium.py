"""Helium: Llama whose rotation pairs adjacent columns."""

from __future__ import annotations

from typing import ClassVar

from tokenmill.models import llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Biases, HeadDim, Model, Size

__all__ = ["Config", "Model"]


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' HeliumConfig."""

    rotates_neighbours: ClassVar[bool] = True

    vocab_size: Size = 48000
    hidden_size: Size = 2560
    intermediate_size: Size = 7040
    num_hidden_layers: llama.Layers = 24
    num_attention_heads: Size = 20
    num_key_value_heads: Size | None = 20
    head_dim: HeadDim | None = 128
    max_position_embeddings: Length | None = 4096
    rms_norm_eps: float = 1e-8
    rope_theta: llama.Theta = 100000.0

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or for heads that do not make up the width."""
        super().__post_init__()
        if self.num_attention_heads * self.head_size != self.hidden_size:
            raise ValueError(
                f"{self.num_attention_heads} heads of {self.head_size} columns for hidden_size {self.hidden_size}, but "
                "in this model type they make it up"
            )

    @property
    def biases(self) -> Biases:
        """Return the biases as config.json sets them. Attention's output has none."""
        return Biases(qkv=self.attention_bias, mlp=self.mlp_bias)
