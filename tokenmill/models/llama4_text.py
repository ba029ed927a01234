"""Llama 4: layers that attend within chunks, others without positions, and experts whose inputs are scaled."""

from __future__ import annotations

from typing import Any, Literal

from tokenmill.layers.attention import Rope, attend
from tokenmill.layers.mlp import GatedMlp
from tokenmill.layers.moe import MoeMlp, Router, stacked
from tokenmill.layers.norm import unweighted_norm
from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, llama
from tokenmill.models._moe import Count
from tokenmill.models.base import Length
from tokenmill.models.llama import Apply, HeadDim, Size
from tokenmill.program import special
from tokenmill.program.value import Value


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Llama4TextConfig."""

    rotates_neighbours = True
    has_mlp_bias = False

    vocab_size: Size = 202048
    hidden_size: Size = 5120
    intermediate_size: Size = 8192
    intermediate_size_mlp: Size = 16384
    num_hidden_layers: llama.Layers = 48
    num_attention_heads: Size = 40
    num_key_value_heads: Size | None = 8
    head_dim: HeadDim | None = 128
    max_position_embeddings: Length | None = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: llama.Theta = 500000.0
    num_experts_per_tok: Count = 1
    num_local_experts: Count = 16
    moe_layers: list[int] | None = None
    interleave_moe_layer_step: Count = 1
    use_qk_norm: bool = True
    no_rope_layers: list[Literal[0, 1]] | None = None  # 1: a layer with a rotation
    no_rope_layer_interval: Count = 4
    attention_chunk_size: Length | None = 8192
    layer_types: list[Literal["full_attention", "chunked_attention"]] | None = None
    attn_temperature_tuning: bool = True
    floor_scale: Length = 8192
    attn_scale: float = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        _moe.check_top_k(self.num_experts_per_tok, self.num_local_experts)
        for name in ("no_rope_layers", "layer_types"):
            given = getattr(self, name)
            if given and len(given) != self.num_hidden_layers:
                raise ValueError(f"{len(given)} {name} for {self.num_hidden_layers} layers")
        if "chunked_attention" in (self.layer_types or ()) and self.attention_chunk_size is None:
            raise ValueError("`layer_types` names chunked_attention, but `attention_chunk_size` is null; give a number")

    def rotates(self, layer: int) -> bool:
        """Return True if a layer rotates queries and keys."""
        if self.no_rope_layers:
            return self.no_rope_layers[layer] == 1
        return (layer + 1) % self.no_rope_layer_interval != 0

    def chunk(self, layer: int) -> int:
        """Return the positions of a chunk within which a layer attends; 0: all tokens."""
        chunked = self.rotates(layer) if not self.layer_types else self.layer_types[layer] == "chunked_attention"
        return (self.attention_chunk_size or 0) if chunked else 0

    def sparse(self, layer: int) -> bool:
        """Return True for a layer with experts."""
        if self.moe_layers is not None:
            return layer in self.moe_layers
        return (layer + 1) % self.interleave_moe_layer_step == 0

    def rope_of(self, layer: int) -> Rope | None:
        """Return the rotary embedding of a layer; None if it has no positions."""
        return self.rope if self.rotates(layer) else None


class Attention(llama.Attention):
    """Llama's attention, with a norm without weights after the rotation, or queries that grow with the position."""

    def __init__(self, c: Any, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.chunk, self.eps = c.chunk(layer), c.rms_norm_eps
        self.normed = c.use_qk_norm and self.rope is not None
        self.growth = (c.attn_scale, c.floor_scale) if c.attn_temperature_tuning and self.rope is None else None

    def heads(self, q: Value, k: Value) -> tuple[Value, Value]:
        """Rotate and normalize queries and keys, or scale the queries by their positions."""
        q, k = super().heads(q, k)
        if self.normed:
            q, k = (unweighted_norm(x, self.eps, self.head_dim) for x in (q, k))
        if self.growth is not None:
            beta, length = self.growth
            q = q.record(special.ScaleByPosition, x=q, beta=beta, length=length, offset=1)
        return q, k

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        q, k, v = self.qkv(x)
        q, k = self.heads(q, k)
        return self.out(attend(q, k, v, layer=self.layer, head_dim=self.head_dim, chunk=self.chunk))


class Layer(llama.Layer):
    """Llama's decoder layer, with this file's attention and experts in some layers."""

    attention = Attention

    def feed_forward(self, c: Config, scope: Scope, layer: int) -> Apply:
        """Return the feed-forward layer: dense, or experts with one that all rows share."""
        scope = scope / "feed_forward"
        if not c.sparse(layer):
            return GatedMlp(scope, c.hidden_size, c.intermediate_size_mlp, c.act)
        width, inner, count = c.hidden_size, c.intermediate_size, c.num_local_experts
        router = Router(scope, width, count, c.num_experts_per_tok, weight="router.weight", score="sigmoid")
        names = ("experts.gate_up_proj", "experts.down_proj")
        bank = stacked(scope, count, width, inner, names, transposed=True)
        shared = GatedMlp(scope / "shared_expert", width, inner, c.act)
        return MoeMlp(router, bank, c.act, shared=shared, scale_inputs=True)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
