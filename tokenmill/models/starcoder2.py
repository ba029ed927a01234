"""StarCoder2: Llama's attention with biases, LayerNorms, a feed-forward layer without a gate."""

from __future__ import annotations

from tokenmill.models import _gpt
from tokenmill.models._gpt import Act, Biases, Layers, Length, Model, Names, Size

__all__ = ["Config", "Model"]


class Config(_gpt.RotaryFields, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Starcoder2Config."""

    names = Names(
        "model.embed_tokens", "model.layers", "model.norm", attention="self_attn",
        qkv=("q_proj", "k_proj", "v_proj"), output="o_proj", inner=("c_fc", "c_proj"),
    )  # fmt: skip

    vocab_size: Size = 49152
    hidden_size: Size = 3072
    intermediate_size: Size = 12288
    num_hidden_layers: Layers = 30
    num_attention_heads: Size = 24
    num_key_value_heads: Size | None = 2
    hidden_act: Act = "gelu_pytorch_tanh"
    max_position_embeddings: Length | None = 4096
    norm_epsilon: float = 1e-5
    sliding_window: Length | None = None
    use_bias: bool = True
    tie_word_embeddings: bool = True

    @property
    def eps(self) -> float:
        """Epsilon of the norms."""
        return self.norm_epsilon

    @property
    def biases(self) -> Biases:
        """Flags of the products that have a bias."""
        return Biases(self.use_bias, self.use_bias, self.use_bias)

    def window(self, layer: int) -> int:
        """Return the sliding window of a layer in tokens; 0: all tokens."""
        return self.sliding_window or 0
