"""StableLM: Llama with LayerNorms and partial rotation; in some sizes parallel, with a norm for each head."""

from __future__ import annotations

from tokenmill.layers.mlp import GatedMlp
from tokenmill.layers.norm import LayerNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import _gpt
from tokenmill.models._gpt import Act, Biases, Layers, Length, Model, Names, Size, same_act

__all__ = ["Config", "Model"]

_NAMES = Names(
    "model.embed_tokens", "model.layers", "model.norm", attention="self_attn", qkv=("q_proj", "k_proj", "v_proj"),
    output="o_proj",
)  # fmt: skip


class Config(_gpt.RotaryFields, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' StableLmConfig."""

    vocab_size: Size = 50304
    hidden_size: Size = 2560
    intermediate_size: Size = 6912
    num_hidden_layers: Layers = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = 32
    hidden_act: Act = "silu"
    max_position_embeddings: Length | None = 4096
    layer_norm_eps: float = 1e-5
    partial_rotary_factor: float = 0.25
    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False

    @property
    def names(self) -> Names:  # type: ignore[override]
        """Names of the checkpoint's modules."""
        return _NAMES._replace(norm2="") if self.use_parallel_residual else _NAMES

    @property
    def parallel(self) -> bool:  # type: ignore[override]
        """True if attention and feed-forward layer read the same input."""
        return self.use_parallel_residual

    @property
    def eps(self) -> float:
        """Epsilon of the norms."""
        return self.layer_norm_eps

    @property
    def biases(self) -> Biases:
        """Flags of the products that have a bias."""
        return Biases(self.use_qkv_bias)

    def head_norms(self, scope: Scope) -> tuple[LayerNorm, LayerNorm] | None:
        """Return the norms of queries and keys, in which each head has a weight of its own; None if there are none."""
        if not self.qk_layernorm:
            return None
        counts = {"q_layernorm": self.num_attention_heads, "k_layernorm": self.kv_heads}
        q, k = (
            LayerNorm(
                scope / name, self.head_size, self.eps, bias=False, per_head=True,
                names=[f"norms.{i}" for i in range(count)],
            )
            for name, count in counts.items()
        )  # fmt: skip
        return q, k

    def mlp(self, scope: Scope) -> GatedMlp:
        """Return the feed-forward layer."""
        return GatedMlp(scope, self.hidden_size, self.inner, same_act(self.activation))
