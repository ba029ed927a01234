"""GPT-J: attention and feed-forward layer in parallel, rotation of adjacent columns, an output layer with a bias."""

from __future__ import annotations

from tokenmill.layers.attention import Rope
from tokenmill.models import _gpt
from tokenmill.models._gpt import Biases, Layers, Length, Model, Names, Size, field

__all__ = ["Config", "Model"]


class Config(_gpt.Gpt2Fields, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' GPTJConfig."""

    names = Names(
        "transformer.wte", "transformer.h", "transformer.ln_f", norm1="ln_1", norm2="", attention="attn",
        qkv=("q_proj", "k_proj", "v_proj"), output="out_proj", inner=("fc_in", "fc_out"),
    )  # fmt: skip
    parallel = True

    vocab_size: Size = 50400
    hidden_size: Size = field(default=4096, name="n_embd")
    num_hidden_layers: Layers = field(default=28, name="n_layer")
    num_attention_heads: Size = field(default=16, name="n_head")
    max_position_embeddings: Length | None = field(default=2048, name="n_positions")
    rotary_dim: Size = 64
    tie_word_embeddings: bool = False

    @property
    def biases(self) -> Biases:
        """Flags of the products that have a bias."""
        return Biases(mlp=True)

    @property
    def head_bias(self) -> bool:
        """True if the output layer has a bias."""
        return True

    @property
    def rope(self) -> Rope:
        """Rotary embedding of queries and keys."""
        return Rope(self.head_size, 10000.0, self.length, rotary_dim=self.rotary_dim, interleaved=True)
