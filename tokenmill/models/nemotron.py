"""Nemotron 3 and 4, Minitron: LayerNorms whose weight is stored minus one, the square of ReLU, partial rotation."""

from __future__ import annotations

from tokenmill.layers.norm import LayerNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import _gpt
from tokenmill.models._gpt import Act, Biases, Layers, Length, Model, Names, Size
from tokenmill.models.llama import HeadDim

__all__ = ["Config", "Model"]


class Config(_gpt.RotaryFields, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' NemotronConfig."""

    names = Names(
        "model.embed_tokens", "model.layers", "model.norm", attention="self_attn",
        qkv=("q_proj", "k_proj", "v_proj"), output="o_proj", inner=("up_proj", "down_proj"),
    )  # fmt: skip

    vocab_size: Size = 256000
    hidden_size: Size = 6144
    intermediate_size: Size = 24576
    num_hidden_layers: Layers = 32
    num_attention_heads: Size = 48
    head_dim: HeadDim | None = None  # None: hidden_size / num_attention_heads
    hidden_act: Act = "relu2"
    max_position_embeddings: Length | None = 4096
    norm_eps: float = 1e-5
    partial_rotary_factor: float = 0.5
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def head_size(self) -> int:
        """Number of columns of a head."""
        return self.head_dim or super().head_size

    @property
    def eps(self) -> float:
        """Epsilon of the norms."""
        return self.norm_eps

    @property
    def biases(self) -> Biases:
        """Flags of the products that have a bias."""
        return Biases(self.attention_bias, self.attention_bias, self.mlp_bias)

    def norm(self, scope: Scope, width: int) -> LayerNorm:
        """Return a norm of the model."""
        return LayerNorm(scope, width, self.eps, add=1.0)
