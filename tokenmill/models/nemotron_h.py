"""Nemotron-H: layers of a single mixer: Mamba 2, attention without positions, or a feed-forward layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenmill.layers.attention import Rope
from tokenmill.layers.linear import Linear
from tokenmill.layers.mamba2 import Mamba2, Sizes
from tokenmill.layers.mlp import Mlp
from tokenmill.layers.moe import Router, ungated
from tokenmill.layers.scope import Scope
from tokenmill.models import _mamba2, _moe, llama, mamba
from tokenmill.models._moe import Count
from tokenmill.models.base import Length
from tokenmill.models.llama import Apply, Biases, HeadDim, Size
from tokenmill.models.mamba import Kernel
from tokenmill.program import ops
from tokenmill.program.value import Value

_KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
"""Letter of `hybrid_override_pattern` -> kind of a layer"""


class Config(llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' NemotronHConfig."""

    vocab_size: Size = 131072
    num_key_value_heads: Size | None = 8
    head_dim: HeadDim | None = 128
    max_position_embeddings: Length | None = 4096
    intermediate_size: Size = 21504
    mlp_hidden_act: llama.Act = "relu2"
    mamba_hidden_act: llama.Act = "silu"
    ssm_state_size: Size = 128
    mamba_num_heads: Size = 128
    mamba_head_dim: Size = 64
    n_groups: Size = 8
    conv_kernel: Kernel = 4
    time_step_min: float = 0.001
    use_conv_bias: bool = True
    use_bias: bool = False
    layer_norm_epsilon: float = 1e-5
    layers_block_type: list[str] | None = None
    layer_types: list[str] | None = None
    hybrid_override_pattern: str | None = None
    n_routed_experts: Count = 8
    moe_intermediate_size: Size = 7688
    moe_shared_expert_intermediate_size: Size = 7688
    moe_latent_size: Size | None = None  # columns of the experts' inputs and outputs; None: hidden_size
    num_experts_per_tok: Count = 2
    routed_scaling_factor: float = 1.0
    n_group: Count = 1
    topk_group: Count = 1
    norm_topk_prob: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers, or for layers of an unknown kind."""
        super().__post_init__()
        if not set(self.kinds) <= set(_KINDS.values()):
            others = ", ".join(sorted(set(self.kinds) - set(_KINDS.values())))
            raise ValueError(f"its layers are of {others}, too; known are {', '.join(_KINDS.values())}")
        _moe.check_top_k(self.num_experts_per_tok, self.n_routed_experts)
        if self.mamba_num_heads % self.n_groups:
            raise ValueError(f"{self.n_groups} groups do not divide {self.mamba_num_heads} heads")
        self.num_hidden_layers = len(self.kinds)

    @property
    def kinds(self) -> Sequence[str]:
        """Kind of each layer."""
        if named := self.layers_block_type or self.layer_types:
            return [_mamba2.KINDS.get(name, name) for name in named]
        return [_KINDS.get(letter, letter) for letter in self.hybrid_override_pattern or "ME*-"]

    @property
    def sizes(self) -> Sizes:
        """Return the sizes of a mixer."""
        return Sizes(
            self.hidden_size, self.mamba_num_heads, self.mamba_head_dim, self.ssm_state_size, self.n_groups,
            self.conv_kernel, self.layer_norm_epsilon, llama.act_of(self.mamba_hidden_act), self.use_bias,
            self.use_conv_bias, (self.time_step_min, float("inf")), self.n_groups,
        )  # fmt: skip

    @property
    def biases(self) -> Biases:
        """Return the biases: none in attention, those of the feed-forward layer as config.json sets them."""
        return Biases(mlp=self.mlp_bias)

    def rope_of(self, layer: int) -> Rope | None:
        """Return None: the order of tokens is in the states."""
        return None


class Experts:
    """Experts without gates, which may read compressed rows, and one that all rows share."""

    def __init__(self, c: Config, scope: Scope) -> None:
        width, act = c.moe_latent_size or c.hidden_size, llama.act_of(c.mlp_hidden_act)
        self.router = Router(
            scope, c.hidden_size, c.n_routed_experts, c.num_experts_per_tok, correction="gate.e_score_correction_bias",
            score="sigmoid", groups=c.n_group, top_groups=c.topk_group, group_best=2, renormalize=c.norm_topk_prob,
            least_sum=1e-20, scale=c.routed_scaling_factor,
        )  # fmt: skip
        self.bank = ungated(_moe.numbered(scope, c.n_routed_experts), width, c.moe_intermediate_size)
        self.compress, self.expand = (
            Linear(scope, a, f"{name}_latent_proj", b, bias=c.mlp_bias) if c.moe_latent_size else None
            for name, a, b in (("fc1", c.hidden_size, width), ("fc2", width, c.hidden_size))
        )
        names, inner = ("up_proj", "down_proj"), c.moe_shared_expert_intermediate_size
        self.shared = Mlp(scope / "shared_experts", c.hidden_size, inner, act, names, bias=c.mlp_bias)
        self.act = act

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (rows, width); the result has the same shape."""
        ids, factors = self.router(x)
        inner = x if self.compress is None else self.compress(x)
        fields: dict[str, Any] = {"ids": ids, "factors": factors, "act": self.act, **self.bank._asdict()}
        y = inner.record(ops.Experts, x=inner, gated=False, **fields)
        return (y if self.expand is None else self.expand(y)) + self.shared(x)


class Layer(mamba.Layer):
    """Norm, one mixer and residual connection."""

    def mixer(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return the mixer of a layer."""
        if c.kinds[layer] == "linear_attention":
            return Mamba2(c.sizes, scope, layer)
        if c.kinds[layer] == "full_attention":
            return llama.Attention(c, scope, layer)
        if c.kinds[layer] == "moe":
            return Experts(c, scope)
        act = llama.act_of(c.mlp_hidden_act)
        return Mlp(scope, c.hidden_size, c.intermediate_size, act, ("up_proj", "down_proj"), bias=c.mlp_bias)


class Model(mamba.Model):
    """Mamba's model, with this file's layers."""

    layer = Layer
