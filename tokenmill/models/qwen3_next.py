"""Qwen 3 Next: the gated delta rule in most layers, gated attention in the others, and experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from tokenmill.layers.attention import attend
from tokenmill.layers.linear import Linear, Linears, interleaved
from tokenmill.layers.mlp import act
from tokenmill.layers.norm import RmsNorm
from tokenmill.layers.recurrence import CausalConv
from tokenmill.layers.scope import Scope
from tokenmill.models import llama, qwen2_moe
from tokenmill.models._moe import Count
from tokenmill.models.base import Length
from tokenmill.models.llama import Apply, HeadDim, Size
from tokenmill.models.mamba import Kernel
from tokenmill.program import ops
from tokenmill.program.ops import Part, Weight
from tokenmill.program.recurrence import DeltaRule
from tokenmill.program.value import Value

KINDS = ("full_attention", "linear_attention")


def check_layers(kinds: Sequence[str], layers: int) -> None:
    """Raise ValueError if there is not one of KINDS for each layer."""
    if len(kinds) != layers or not set(kinds) <= set(KINDS):
        raise ValueError(f"`layer_types` is {kinds}; expected {layers} of {', '.join(KINDS)}")


def check_heads(keys: int, values: int) -> None:
    """Raise ValueError if a key head is not shared by a whole number of value heads."""
    if values % keys:
        raise ValueError(f"{keys} key heads for {values} value heads")


class Hybrid(qwen2_moe.Sparse, kw_only=True):
    """Fields that Qwen's architectures with the delta rule share. Those of experts are for the ones that have any."""

    rotates_whole_heads: ClassVar[bool] = False

    vocab_size: Size = 151936
    max_position_embeddings: Length | None = 32768
    head_dim: HeadDim | None = 256
    num_attention_heads: Size = 16
    partial_rotary_factor: float = 0.25
    linear_conv_kernel_dim: Kernel = 4
    linear_key_head_dim: Size = 128
    linear_value_head_dim: Size = 128
    linear_num_key_heads: Size = 16
    linear_num_value_heads: Size = 32
    layer_types: list[str] | None = None
    full_attention_interval: Count = 4

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or for layers of an unknown kind."""
        super().__post_init__()
        check_layers(self.kinds, self.num_hidden_layers)
        check_heads(self.linear_num_key_heads, self.linear_num_value_heads)

    @property
    def kinds(self) -> Sequence[str]:
        """Kind of each layer."""
        interval = self.full_attention_interval
        return self.layer_types or [KINDS[(i + 1) % interval > 0] for i in range(self.num_hidden_layers)]

    def norm(self, scope: Scope, width: int, *, per_head: bool = False) -> RmsNorm:
        """Return a norm, whose weight is stored minus one."""
        return RmsNorm(scope, width, self.rms_norm_eps, per_head=per_head, add=1.0)


class Config(Hybrid, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' Qwen3NextConfig."""

    num_hidden_layers: llama.Layers = 48
    num_key_value_heads: Size | None = 2
    moe_intermediate_size: Size = 512
    shared_expert_intermediate_size: Size = 512
    num_experts_per_tok: Count = 10
    norm_topk_prob: bool = True

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.num_experts or 512


class Attention(llama.Attention):
    """Llama's attention, with norms on query and key heads, and a gate on the result."""

    def __init__(self, c: llama.Config, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        d, kv = c.head_size, c.kv_heads * c.head_size
        outputs: dict[str, int | tuple[Part, ...]] = {
            "q_proj": interleaved(c.num_attention_heads, d, d),
            "k_proj": kv,
            "v_proj": kv,
        }
        self.qkv = Linears(scope, c.hidden_size, shard="column", unit=d, bias=c.attention_bias, outputs=outputs)
        self.q_norm, self.k_norm = (c.norm(scope / name, d, per_head=True) for name in ("q_norm", "k_norm"))

    def norm(self, q: Value, k: Value) -> tuple[Value, Value]:
        """Normalize each head of queries and keys."""
        return self.q_norm(q), self.k_norm(k)

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        q, gate, k, v = self.qkv(x)
        q, k = self.heads(q, k)
        y = attend(q, k, v, layer=self.layer, head_dim=self.head_dim)
        return self.out(y.record(ops.GatedAct, gate=gate, up=y, act="sigmoid"))


class DeltaNet:
    """Gated delta rule behind a short convolution. Every rank computes all of it."""

    rate = 1.0  # factor of the corrections

    def __init__(self, c: Hybrid, scope: Scope, layer: int) -> None:
        heads, self.keys = c.linear_num_value_heads, c.linear_num_key_heads * c.linear_key_head_dim
        self.values, self.head_dim = heads * c.linear_value_head_dim, c.linear_key_head_dim
        self.act, self.layer = c.act, layer
        self.project(c, scope, heads)
        convolved = 2 * self.keys + self.values
        self.conv = CausalConv(scope / "conv1d", convolved, c.linear_conv_kernel_dim, layer=layer)
        self.a_log, self.dt_bias = (Weight((Part(scope / name, heads),)) for name in ("A_log", "dt_bias"))
        self.norm = RmsNorm(scope / "norm", c.linear_value_head_dim, c.rms_norm_eps, per_head=True)
        self.out = Linear(scope, self.values, "out_proj", c.hidden_size)

    def project(self, c: Hybrid, scope: Scope, heads: int) -> None:
        """Make the projection to columns that are convolved, gate, rates and decays, as the checkpoint stores it."""
        groups = c.linear_num_key_heads
        key, value, each = self.keys // groups, self.values // groups, heads // groups
        outputs = {
            "in_proj_qkvz": interleaved(groups, key, key, value, value),
            "in_proj_ba": interleaved(groups, each, each),
        }
        self.inputs = Linears(scope, c.hidden_size, outputs=outputs)

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        convolved, gate, b, a = self.inputs.product(x).split(
            2 * self.keys + self.values, self.values, self.a_log.rows, self.a_log.rows
        )
        q, k, v = act(self.conv(convolved), self.act).split(self.keys, self.keys, self.values)
        y = v.record(
            DeltaRule, q=q, k=k, v=v, a=a, b=b, a_log=self.a_log, dt_bias=self.dt_bias, head_dim=self.head_dim,
            rate=self.rate, layer=self.layer,
        )  # fmt: skip
        y = self.norm(y)
        return self.out(y.record(ops.GatedAct, gate=gate, up=y, act=self.act))


class Mixed(llama.Layer):
    """Llama's decoder layer, with the delta rule or gated attention."""

    attention = Attention
    delta: type[DeltaNet] = DeltaNet

    def mixer(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return the delta rule or attention."""
        if c.kinds[layer] == "full_attention":
            return super().mixer(c, scope, layer)
        return self.delta(c, scope / "linear_attn", layer)


class Layer(Mixed):
    """This architecture's decoder layer, with experts in some layers."""

    def feed_forward(self, c: Config, scope: Scope, layer: int) -> Apply:
        """Return the feed-forward layer."""
        return qwen2_moe.with_shared(c, scope / "mlp") if c.sparse(layer) else super().feed_forward(c, scope, layer)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
