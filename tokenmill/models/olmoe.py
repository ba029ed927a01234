"""OLMoE: Llama with experts in every layer, and norms over whole rows of queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec

from tokenmill.layers.moe import MoeMlp, Router, separate
from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, llama, olmo2
from tokenmill.models._moe import Count
from tokenmill.models.base import Length
from tokenmill.models.llama import Size
from tokenmill.program.value import Value


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' OlmoeConfig."""

    has_mlp_bias = False

    vocab_size: Size = 50304
    hidden_size: Size = 2048
    intermediate_size: Size = 2048
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)] = 16
    num_attention_heads: Size = 16
    max_position_embeddings: Length | None = 4096
    rms_norm_eps: float = 1e-5
    clip_qkv: Annotated[float, msgspec.Meta(gt=0)] | None = None
    num_experts_per_tok: Count = 8
    num_experts: Count = 64
    norm_topk_prob: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        _moe.check_top_k(self.num_experts_per_tok, self.num_experts)

    @property
    def clip(self) -> float:
        """Bound of queries, keys and values, after norms and before the rotation; 0: none."""
        return self.clip_qkv or 0.0


class Layer(llama.Layer):
    """Llama's decoder layer, with OLMo 2's attention, and experts."""

    attention = olmo2.Attention

    def feed_forward(self, c: Config, scope: Scope, layer: int) -> Callable[[Value], Value]:
        """Return the experts."""
        mlp = scope / "mlp"
        router = Router(mlp, c.hidden_size, c.num_experts, c.num_experts_per_tok, renormalize=c.norm_topk_prob)
        bank = separate(_moe.numbered(mlp, c.num_experts), c.hidden_size, c.intermediate_size)
        return MoeMlp(router, bank, c.act)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
