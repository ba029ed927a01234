"""GLM 4.5: Llama with DeepSeek's experts, half of each head rotated, and optional norms on query and key heads."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec

from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, llama, qwen3
from tokenmill.models._moe import Count
from tokenmill.models.base import Length
from tokenmill.models.llama import Biases, Size
from tokenmill.program.value import Value


class Config(_moe.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Glm4MoeConfig."""

    rotates_whole_heads: ClassVar[bool] = False

    vocab_size: Size = 151552
    intermediate_size: Size = 10944
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)] = 46
    num_attention_heads: Size = 96
    num_key_value_heads: Size | None = 8
    max_position_embeddings: Length | None = 131072
    rms_norm_eps: float = 1e-5
    partial_rotary_factor: float = 0.5
    moe_intermediate_size: Size = 1408
    n_routed_experts: Count = 128
    first_k_dense_replace: int = 1
    use_qk_norm: bool = False

    @property
    def biases(self) -> Biases:
        """Return the biases: of queries, keys and values only, as config.json sets them."""
        return Biases(qkv=self.attention_bias)


class Attention(qwen3.Attention):
    """Llama's attention, with norms on query and key heads in some versions."""

    def __init__(self, c: Any, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.normed = c.use_qk_norm

    def norm(self, q: Value, k: Value) -> tuple[Value, Value]:
        """Normalize each head of queries and keys, or nothing."""
        return super().norm(q, k) if self.normed else (q, k)


class Layer(_moe.Layer):
    """Decoder layer with DeepSeek's experts and this file's attention."""

    attention = Attention


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
