"""Hunyuan dense: Llama with an RMSNorm on each query and key head after the rotation."""

from __future__ import annotations

from tokenmill.layers.attention import Rope
from tokenmill.layers.scope import Scope
from tokenmill.models import llama
from tokenmill.models.base import Length
from tokenmill.models.llama import Size
from tokenmill.program.value import Value


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' HunYuanDenseV1Config."""

    has_mlp_bias = False

    vocab_size: Size = 290943
    max_position_embeddings: Length | None = 2048
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        alpha = (self.rope_scaling or {}).get("alpha")
        if alpha is not None and (not isinstance(alpha, int | float) or not 0 < alpha < 1 << 31):
            raise ValueError(f"`alpha` of the rope scaling is {alpha!r}; give a positive number")

    @property
    def rope(self) -> Rope:
        """Return the rotary embedding. "dynamic" scaling with `alpha` raises the base and depends on no length."""
        scaling, size = self.rope_scaling or {}, self.head_size
        alpha = scaling.get("alpha")
        if scaling.get("rope_type") != "dynamic" or not alpha:
            return super().rope
        length = self.max_position_embeddings or type(self)().max_position_embeddings
        assert length is not None
        return Rope(size, self.rope_theta * alpha ** (size / (size - 2)), length)


class Attention(llama.Attention):
    """Llama's attention, with norms on rotated query and key heads."""

    def __init__(self, c: llama.Config, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.q_norm = c.norm(scope / "query_layernorm", c.head_size, per_head=True)
        self.k_norm = c.norm(scope / "key_layernorm", c.head_size, per_head=True)

    def heads(self, q: Value, k: Value) -> tuple[Value, Value]:
        """Rotate queries and keys, then normalize each head."""
        q, k = super().heads(q, k)
        return self.q_norm(q), self.k_norm(k)


class Layer(llama.Layer):
    """Llama's decoder layer, with this file's attention."""

    attention = Attention


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
