"""Arcee Trinity: gated attention, rotated in layers with a window only, four norms a layer, and experts."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.attention import Rope, attend
from tokenmill.layers.linear import Linears
from tokenmill.layers.moe import Router
from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, _windows, gemma2, llama, qwen3
from tokenmill.models._moe import Count, Natural
from tokenmill.models.base import Length
from tokenmill.models.llama import Apply, HeadDim, Size
from tokenmill.program import ops
from tokenmill.program.value import Value


class Config(_windows.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' AfmoeConfig."""

    has_mlp_bias = False

    vocab_size: Size = 200192
    hidden_size: Size = 2048
    intermediate_size: Size = 6144
    moe_intermediate_size: Size = 1408
    num_dense_layers: Natural = 1
    num_attention_heads: Size = 16
    head_dim: HeadDim | None = 128
    max_position_embeddings: Length | None = 16384
    rms_norm_eps: float = 1e-5
    num_experts: Count = 64
    num_experts_per_tok: Count = 6
    num_shared_experts: Natural = 2
    route_scale: float = 1.0
    global_attn_every_n_layers: Count = 4
    sliding_window: Length | None = 1024
    mup_enabled: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        _moe.check_top_k(self.num_experts_per_tok, self.num_experts)

    def default_kind(self, layer: int) -> _windows.Kind:
        """Return that the last of every few layers has no window."""
        return _windows.every(self.global_attn_every_n_layers, layer)

    def rope_of(self, layer: int) -> Rope | None:
        """Return the rotary embedding of a layer; None if it has no positions."""
        return self.rope if self.kind(layer) == "sliding_attention" else None

    @property
    def embedding_scale(self) -> float:
        """Factor of the embeddings."""
        return float(self.hidden_size**0.5) if self.mup_enabled else 1.0


class Attention(qwen3.Attention):
    """Llama's attention, with norms on query and key heads, and a gate on the result."""

    def __init__(self, c: llama.Config, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        d, width = c.head_size, c.num_attention_heads * c.head_size
        heads = c.num_attention_heads, c.kv_heads
        self.gate = Linears(scope, c.hidden_size, shard="column", unit=d, heads=heads, outputs={"gate_proj": width})

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        q, k, v = self.qkv(x)
        q, k = self.heads(q, k)
        y = attend(q, k, v, layer=self.layer, head_dim=self.head_dim, window=self.window)
        return self.out(y.record(ops.GatedAct, gate=self.gate.product(x), up=y, act="sigmoid"))


class Layer(gemma2.Layer):
    """Decoder layer: attention and experts, each between two norms, and a residual connection."""

    attention = Attention
    norms = ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm")

    def feed_forward(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return the experts, and the one that all rows share beside them; or a dense layer."""
        if layer < c.num_dense_layers:
            return super().feed_forward(c, scope, layer)
        mlp = scope / "mlp"
        router = Router(
            mlp, c.hidden_size, c.num_experts, c.num_experts_per_tok, weight="router.gate.weight",
            correction="expert_bias", score="sigmoid", renormalize=True, least_sum=1e-20, scale=c.route_scale,
        )  # fmt: skip
        return _moe.beside_shared(c, mlp, router, c.num_experts, c.moe_intermediate_size, c.num_shared_experts)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
