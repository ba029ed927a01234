"""Kimi Linear: the delta rule with a decay for each column of a key, and DeepSeek's attention without positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tokenmill.layers.linear import Linear, Linears
from tokenmill.layers.mlp import GatedMlp, act, gated
from tokenmill.layers.moe import MoeMlp, Router, separate
from tokenmill.layers.norm import RmsNorm
from tokenmill.layers.recurrence import CausalConv
from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, deepseek_v3, llama
from tokenmill.models._moe import Count, Natural
from tokenmill.models.base import Length
from tokenmill.models.llama import Apply, Size
from tokenmill.models.mamba import Kernel
from tokenmill.program.ops import Part, Weight
from tokenmill.program.recurrence import DeltaRule
from tokenmill.program.value import Value

_KINDS = ("full_attention", "linear_attention")


class Delta(msgspec.Struct, kw_only=True):
    """Fields of `linear_attn_config`, which newer versions write beside the others. Layers are counted from 1."""

    head_dim: Size | None = None
    num_heads: Size | None = None
    short_conv_kernel_size: Kernel | None = None
    full_attn_layers: list[int] | None = None


class Config(deepseek_v3.Latent, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' KimiLinearConfig."""

    vocab_size: Size = 163840
    hidden_size: Size = 2304
    intermediate_size: Size = 9216
    num_hidden_layers: llama.Layers = 27
    max_position_embeddings: Length | None = msgspec.field(default=1048576, name="model_max_length")
    moe_intermediate_size: Size = 1024
    q_lora_rank: Size | None = None
    rms_norm_eps: float = 1e-5
    routed_scaling_factor: float = 2.446
    n_routed_experts: Count = msgspec.field(default=256, name="num_experts")
    n_shared_experts: Natural = msgspec.field(default=1, name="num_shared_experts")
    num_experts_per_tok: Count = msgspec.field(default=8, name="num_experts_per_token")
    n_group: Count | None = msgspec.field(default=1, name="num_expert_group")
    norm_topk_prob: bool = msgspec.field(default=True, name="moe_renormalize")
    first_k_dense_replace: int = 1
    mlp_layer_types: list[str] | None = None
    layer_types: list[str] | None = None
    linear_head_dim: Size = 128
    linear_num_heads: Size = 32
    linear_conv_kernel_dim: Kernel = 4
    linear_attn_config: Delta | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or for layers of an unknown kind."""
        super().__post_init__()
        given = self.linear_attn_config or Delta()
        self.linear_head_dim = given.head_dim or self.linear_head_dim
        self.linear_num_heads = given.num_heads or self.linear_num_heads
        self.linear_conv_kernel_dim = given.short_conv_kernel_size or self.linear_conv_kernel_dim
        if len(self.kinds) != self.num_hidden_layers or not set(self.kinds) <= set(_KINDS):
            raise ValueError(f"`layer_types` is {self.kinds}; expected {self.num_hidden_layers} of {', '.join(_KINDS)}")
        if self.mlp_layer_types is not None and len(self.mlp_layer_types) != self.num_hidden_layers:
            raise ValueError(f"{len(self.mlp_layer_types)} `mlp_layer_types` for {self.num_hidden_layers} layers")

    @property
    def kinds(self) -> Sequence[str]:
        """Kind of each layer."""
        attends = self.linear_attn_config.full_attn_layers if self.linear_attn_config else None
        if attends is None:
            attends = [i + 1 for i in range(self.num_hidden_layers) if i and i % 4 == 0]
        return self.layer_types or [_KINDS[i + 1 not in attends] for i in range(self.num_hidden_layers)]

    def sparse(self, layer: int) -> bool:
        """Return True for a layer with experts."""
        named = self.mlp_layer_types
        return layer >= self.first_k_dense_replace if named is None else named[layer] == "sparse"


class Attention(deepseek_v3.Attention):
    """DeepSeek's attention, without rotation."""

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        self.table = None


class DeltaNet:
    """Delta rule behind a short convolution, with a gate on its normalized result. Every rank computes all of it."""

    def __init__(self, c: Config, scope: Scope, layer: int) -> None:
        heads, self.head_dim = c.linear_num_heads, c.linear_head_dim
        n = self.width = heads * self.head_dim
        outputs = {
            "q_proj": n, "k_proj": n, "v_proj": n, "b_proj": heads, "f_a_proj": self.head_dim, "g_a_proj": self.head_dim
        }  # fmt: skip
        self.inputs, self.heads = Linears(scope, c.hidden_size, outputs=outputs), heads
        self.conv = CausalConv(scope / "q_conv1d", n, c.linear_conv_kernel_dim, layer=layer)
        parts = tuple(Part(scope / f"{name}_conv1d.weight", n) for name in "qkv")
        self.conv.weight = Weight(parts, c.linear_conv_kernel_dim)
        self.decay, self.gate = (Linear(scope, self.head_dim, name, n) for name in ("f_b_proj", "g_b_proj"))
        self.a_log, self.dt_bias = Weight((Part(scope / "A_log", heads),)), Weight((Part(scope / "dt_bias", n),))
        self.norm = RmsNorm(scope / "o_norm", self.head_dim, c.rms_norm_eps, per_head=True)
        self.out = Linear(scope, n, "o_proj", c.hidden_size)
        self.act, self.layer = c.act, layer

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        convolved, b, decay, gate = self.inputs.product(x).split(
            3 * self.width, self.heads, self.head_dim, self.head_dim
        )
        q, k, v = act(self.conv(convolved), self.act).split(self.width, self.width, self.width)
        y = v.record(
            DeltaRule, q=q, k=k, v=v, a=self.decay(decay), b=b, a_log=self.a_log, dt_bias=self.dt_bias,
            head_dim=self.head_dim, layer=self.layer,
        )  # fmt: skip
        return self.out(gated(self.gate(gate), self.norm(y), "sigmoid"))


class Layer(llama.Layer):
    """Llama's decoder layer, with the delta rule or compressed attention, and experts in most layers."""

    def mixer(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return the delta rule or attention."""
        kind = Attention if c.kinds[layer] == "full_attention" else DeltaNet
        mixer: Apply = kind(c, scope / "self_attn", layer)
        return mixer

    def feed_forward(self, c: Config, scope: Scope, layer: int) -> Apply:
        """Return the feed-forward layer."""
        if not c.sparse(layer):
            return super().feed_forward(c, scope, layer)
        moe, inner = scope / "block_sparse_moe", c.moe_intermediate_size
        router = Router(moe, c.hidden_size, c.n_routed_experts, c.num_experts_per_tok, **c.choice)
        bank = separate(_moe.numbered(moe, c.n_routed_experts), c.hidden_size, inner, ("w1", "w3", "w2"))
        inner *= c.n_shared_experts
        shared = GatedMlp(moe / "shared_experts", c.hidden_size, inner, c.act) if inner else None
        return MoeMlp(router, bank, c.act, shared=shared)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
