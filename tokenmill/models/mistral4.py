"""Mistral 4: DeepSeek's attention with queries that grow with the position, and experts chosen by softmax."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, deepseek_v3, llama, ministral3
from tokenmill.models._moe import Count
from tokenmill.models.base import Length
from tokenmill.models.llama import Size
from tokenmill.program import special
from tokenmill.program.value import Value

_SCALING = ministral3.SCALING | {"factor": 128.0, "original_max_position_embeddings": 8192}


class Config(deepseek_v3.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Mistral4Config."""

    rotates_whole_heads = False  # the factor is that of the rotated columns in a head of all

    vocab_size: Size = 131072
    hidden_size: Size = 4096
    intermediate_size: Size = 12288
    num_hidden_layers: llama.Layers = 36
    num_attention_heads: Size = 32
    n_routed_experts: Count = 128
    routed_scaling_factor: float = 1.0
    kv_lora_rank: Size = 256
    q_lora_rank: Size | None = 1024
    qk_nope_head_dim: Size = 64
    n_group: Count | None = 1
    topk_group: Count | None = 1
    num_experts_per_tok: Count = 4
    first_k_dense_replace: int = 0
    max_position_embeddings: Length | None = 1048576

    def __post_init__(self) -> None:
        """Fill in the scaling. Raise ValueError for inconsistent numbers, or if the queries' growth is not stated."""
        self.partial_rotary_factor = 1.0
        if self.rope_scaling is None:
            self.rope_scaling = dict(_SCALING)
        ministral3.growth(self.rope_scaling)
        super().__post_init__()

    @property
    def choice(self) -> dict[str, Any]:
        """Return the fields of the routing, as of `ops.Route`."""
        return super().choice | {"correction": "", "score": "softmax"}


class Attention(deepseek_v3.Attention):
    """DeepSeek's attention, with queries that grow with the position."""

    def __init__(self, c: Any, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.growth = ministral3.growth(c.rope_scaling)

    def queries(self, x: Value) -> Value:
        """Return the queries of x, (tokens, hidden)."""
        q, (beta, length) = super().queries(x), self.growth
        return q.record(special.ScaleByPosition, x=q, beta=beta, length=length)


class Layer(_moe.Layer):
    """Decoder layer with DeepSeek's experts and this file's attention."""

    attention: Any = Attention


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
