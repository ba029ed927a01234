"""Command R: attention and feed-forward layer in parallel, rotation of adjacent columns, scaled logits."""

from __future__ import annotations

from tokenmill.layers.mlp import GatedMlp
from tokenmill.layers.norm import LayerNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import _gpt
from tokenmill.models._gpt import Act, Biases, Layers, Length, Model, Names, Size, Theta, same_act

__all__ = ["Config", "Fields", "Model"]


class Fields(_gpt.RotaryFields, kw_only=True):
    """The fields of config.json that both generations have, with the defaults of transformers' classes."""

    names = Names(
        "model.embed_tokens", "model.layers", "model.norm", norm2="", attention="self_attn",
        qkv=("q_proj", "k_proj", "v_proj"), output="o_proj",
    )  # fmt: skip
    parallel = True
    interleaved = True

    vocab_size: Size = 256000
    hidden_size: Size = 8192
    intermediate_size: Size = 22528
    num_hidden_layers: Layers = 40
    num_attention_heads: Size = 64
    hidden_act: Act = "silu"
    max_position_embeddings: Length | None = 8192
    logit_scale: float = 0.0625
    layer_norm_eps: float = 1e-5
    attention_bias: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or for a rotation that transformers' class does not support."""
        super().__post_init__()
        if self.partial_rotary_factor != 1:
            raise ValueError(
                f"`partial_rotary_factor` is {self.partial_rotary_factor}, but this model type rotates whole heads; "
                "leave it out"
            )

    @property
    def eps(self) -> float:
        """Epsilon of the norms."""
        return self.layer_norm_eps

    @property
    def biases(self) -> Biases:
        """Flags of the products that have a bias."""
        return Biases(self.attention_bias, self.attention_bias)

    @property
    def logit_factor(self) -> float:
        """Factor of the logits."""
        return self.logit_scale

    def norm(self, scope: Scope, width: int) -> LayerNorm:
        """Return a norm of the model."""
        return LayerNorm(scope, width, self.eps, bias=False)

    def mlp(self, scope: Scope) -> GatedMlp:
        """Return the feed-forward layer."""
        return GatedMlp(scope, self.hidden_size, self.inner, same_act(self.activation))


class Config(Fields, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' CohereConfig."""

    rope_theta: Theta = 500000.0
    use_qk_norm: bool = False

    def head_norms(self, scope: Scope) -> tuple[LayerNorm, LayerNorm] | None:
        """Return the norms of queries and keys, in which each head has a weight of its own; None if there are none."""
        if not self.use_qk_norm:
            return None
        counts = {"q_norm": self.num_attention_heads, "k_norm": self.kv_heads}
        q, k = (
            LayerNorm(scope / name, self.head_size, self.eps, bias=False, per_head=True, heads=count)
            for name, count in counts.items()
        )
        return q, k
