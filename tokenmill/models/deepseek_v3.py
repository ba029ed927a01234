"""DeepSeek V3 and R1: attention to compressed rows (MLA), and experts that are chosen in groups."""

from __future__ import annotations

from math import log
from typing import Annotated, Any

import msgspec

from tokenmill.layers.linear import Linear
from tokenmill.layers.norm import RmsNorm
from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, llama
from tokenmill.models._moe import Count
from tokenmill.models.base import Length
from tokenmill.models.llama import HeadDim, Size
from tokenmill.program import ops
from tokenmill.program.ops import Part, Weight
from tokenmill.program.rope import RopeTable
from tokenmill.program.value import Value


class Latent(_moe.Config, kw_only=True):
    """Fields of attention to compressed rows."""

    kv_lora_rank: Size = 512
    q_lora_rank: Size | None = 1536
    qk_nope_head_dim: Size = 128
    qk_rope_head_dim: HeadDim = 64
    v_head_dim: Size = 128

    @property
    def interleaved(self) -> bool:
        """True if a rotation pairs adjacent columns."""
        return True

    @property
    def head_size(self) -> int:
        """Number of columns of a head that are rotated, and so the size of the rotary embedding."""
        return self.qk_rope_head_dim

    @property
    def scale(self) -> float:
        """Factor of the scores. YaRN scaling raises it."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        scaling = self.rope_scaling or {}
        weight, factor = scaling.get("mscale_all_dim"), scaling.get("factor", 1)
        if scaling.get("rope_type", "default") == "default" or not weight or factor <= 1:
            return float(scale)
        return float(scale * (0.1 * weight * log(factor) + 1) ** 2)


class Config(Latent, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' DeepseekV3Config."""

    vocab_size: Size = 129280
    hidden_size: Size = 7168
    intermediate_size: Size = 18432
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)] = 61
    num_attention_heads: Size = 128
    max_position_embeddings: Length | None = 4096
    routed_scaling_factor: float = 2.5
    n_group: Count | None = 8
    topk_group: Count | None = 4
    first_k_dense_replace: int = 3
    rope_interleave: bool = True

    @property
    def interleaved(self) -> bool:
        """True if a rotation pairs adjacent columns, else halves."""
        return self.rope_interleave


class Attention:
    """Attention with compressed queries, and with keys and values that share a compressed row."""

    def __init__(self, c: Latent, scope: Scope, layer: int) -> None:
        heads, nope, rope = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
        self.head_dim, self.value_dim, self.heads = nope + rope, c.v_head_dim, heads
        self.compress: Linear | None = None
        inner, name = c.hidden_size, "q_proj"
        if c.q_lora_rank is not None:
            inner, name = c.q_lora_rank, "q_b_proj"
            self.compress = Linear(scope, c.hidden_size, "q_a_proj", inner, bias=c.attention_bias)
            self.q_norm = RmsNorm(scope / "q_a_layernorm", inner, 1e-6)
        self.q = Linear(scope, inner, name, heads * self.head_dim, shard="column")
        self.q.many.weight = Weight(self.q.many.weight.parts, inner, "column", self.head_dim)
        self.rank, self.turned = c.kv_lora_rank, rope
        self.kv = Linear(scope, c.hidden_size, "kv_a_proj_with_mqa", self.rank + rope, bias=c.attention_bias)
        self.kv_norm = RmsNorm(scope / "kv_a_layernorm", self.rank, 1e-6)
        unit = nope + c.v_head_dim
        self.expand = Weight((Part(scope / "kv_b_proj" / "weight", heads * unit),), self.rank, "column", unit)
        self.out = Linear(scope, heads * c.v_head_dim, "o_proj", c.hidden_size, shard="row", bias=c.attention_bias)
        self.layer, self.scale, self.interleaved = layer, c.scale, c.interleaved
        self.table: RopeTable | None = c.rope.table

    def queries(self, x: Value) -> Value:
        """Return the queries of x, (tokens, hidden)."""
        return self.q(x if self.compress is None else self.q_norm(self.compress(x)))

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        q = self.queries(x)
        latent, key = self.kv(x).split(self.rank, self.turned)
        heads = q.record(
            ops.LatentAttention,
            self.heads * self.value_dim,
            q=q,
            latent=self.kv_norm(latent),
            key=key,
            expand=self.expand,
            layer=self.layer,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            scale=self.scale,
            rope=self.table,
            interleaved=self.interleaved,
        )
        return self.out(heads)


class Layer(_moe.Layer):
    """Decoder layer with DeepSeek's experts and this file's attention."""

    attention: Any = Attention


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
