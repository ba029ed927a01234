"""Phi 1, 1.5 and 2: attention and feed-forward layer in parallel, partial rotation, biases everywhere."""

from __future__ import annotations

from tokenmill.layers.norm import LayerNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import _gpt
from tokenmill.models._gpt import Act, Biases, Layers, Length, Model, Names, Size

__all__ = ["Config", "Model"]


class Config(_gpt.RotaryFields, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' PhiConfig."""

    names = Names(
        "model.embed_tokens", "model.layers", "model.final_layernorm", norm2="", attention="self_attn",
        qkv=("q_proj", "k_proj", "v_proj"), inner=("fc1", "fc2"),
    )  # fmt: skip
    parallel = True

    vocab_size: Size = 51200
    hidden_size: Size = 2048
    intermediate_size: Size = 8192
    num_hidden_layers: Layers = 24
    num_attention_heads: Size = 32
    hidden_act: Act = "gelu_new"
    max_position_embeddings: Length | None = 2048
    layer_norm_eps: float = 1e-5
    partial_rotary_factor: float = 0.5
    qk_layernorm: bool = False

    @property
    def eps(self) -> float:
        """Epsilon of the norms."""
        return self.layer_norm_eps

    @property
    def biases(self) -> Biases:
        """Flags of the products that have a bias."""
        return Biases(True, True, True)

    @property
    def head_bias(self) -> bool:
        """True if the output layer has a bias."""
        return True

    def head_norms(self, scope: Scope) -> tuple[LayerNorm, LayerNorm] | None:
        """Return the norms of queries and keys before the rotation; None if there are none."""
        if not self.qk_layernorm:
            return None
        q, k = (LayerNorm(scope / f"{x}_layernorm", self.head_size, self.eps, per_head=True) for x in "qk")
        return q, k
