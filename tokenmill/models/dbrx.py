"""DBRX: a mixture of experts in every layer, and queries, keys and values within bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from tokenmill.layers.attention import Rope
from tokenmill.layers.moe import Bank, MoeMlp, Router
from tokenmill.layers.norm import LayerNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import _gpt, _moe
from tokenmill.models._gpt import Act, Biases, Layers, Length, Names, Size, Theta, field
from tokenmill.models._moe import Count
from tokenmill.program.ops import Part, Weight


class Attention(msgspec.Struct, kw_only=True):
    """The object `attn_config`, with the defaults of transformers' DbrxAttentionConfig."""

    clip_qkv: Annotated[float, msgspec.Meta(gt=0)] | None = None
    kv_n_heads: Size = 1
    rope_theta: Theta | None = None  # where the first files have it


class Activation(msgspec.Struct, kw_only=True):
    """The object `ffn_act_fn`."""

    name: Act = "silu"


class FeedForward(msgspec.Struct, kw_only=True):
    """The object `ffn_config`, with the defaults of transformers' DbrxFFNConfig."""

    ffn_act_fn: Activation | None = None
    ffn_hidden_size: Size = 3584
    moe_num_experts: Count = 4
    moe_top_k: Count = 1
    moe_normalize_expert_weights: Annotated[float, msgspec.Meta(ge=1, le=1)] | None = 1.0  # the norm's power


class Config(_gpt.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' DbrxConfig."""

    mapped = frozenset({"hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"})
    names = Names(
        "transformer.wte", "transformer.blocks", "transformer.norm_f", norm1="norm_attn_norm.norm_1",
        norm2="norm_attn_norm.norm_2", attention="norm_attn_norm.attn", qkv=("Wqkv",), output="out_proj", mlp="ffn",
    )  # fmt: skip

    vocab_size: Size = 32000
    hidden_size: Size = field(default=2048, name="d_model")
    num_hidden_layers: Layers = field(default=24, name="n_layers")
    num_attention_heads: Size = field(default=16, name="n_heads")
    max_position_embeddings: Length | None = field(default=2048, name="max_seq_len")
    attention: Attention = field(default_factory=Attention, name="attn_config")
    feed_forward: FeedForward = field(default_factory=FeedForward, name="ffn_config")
    rope_theta: Theta | None = None
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: Literal[False] = False

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        _moe.check_top_k(self.feed_forward.moe_top_k, self.feed_forward.moe_num_experts)

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.attention.kv_n_heads

    @property
    def clip(self) -> float:
        """Bound of queries, keys and values; 0: none."""
        return self.attention.clip_qkv or 0.0

    @property
    def biases(self) -> Biases:
        """Flags of the products that have a bias."""
        return Biases()

    @property
    def rope(self) -> Rope:
        """Rotary embedding of queries and keys."""
        theta = self.rope_theta or self.attention.rope_theta or 10000.0
        return Rope(self.head_size, theta, self.length, self.rope_scaling)

    def norm(self, scope: Scope, width: int) -> LayerNorm:
        """Return a norm of the model."""
        return LayerNorm(scope, width, self.eps, bias=False)

    def mlp(self, scope: Scope) -> MoeMlp:  # type: ignore[override]
        """Return the experts, whose matrices lie below each other in three tensors, the last one transposed."""
        c = self.feed_forward
        count, inner, width = c.moe_num_experts, c.ffn_hidden_size, self.hidden_size
        gate, up, down = (scope / f"experts.mlp.{name}" for name in ("w1", "v1", "w2"))
        router = Router(
            scope, width, count, c.moe_top_k, weight="router.layer.weight",
            renormalize=c.moe_normalize_expert_weights is not None,
        )  # fmt: skip
        halves = [(Part(gate, inner, i * inner), Part(up, inner, i * inner)) for i in range(count)]
        downs = [(Part(down, width, index=i, below=count),) for i in range(count)]
        bank = Bank(
            tuple(Weight(parts, width, "column") for parts in halves),
            tuple(Weight(parts, inner, "row", transposed=True) for parts in downs),
        )
        return MoeMlp(router, bank, _gpt.same_act((c.ffn_act_fn or Activation()).name))


class Model(_gpt.Model):
    """Model of `_gpt.py`."""
