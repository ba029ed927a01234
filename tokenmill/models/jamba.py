"""Jamba: Mamba with norms in most layers, attention without positions in the others, and experts."""

from __future__ import annotations

from typing import Literal

import msgspec

from tokenmill.layers.attention import Rope
from tokenmill.layers.mlp import GatedMlp
from tokenmill.layers.moe import MoeMlp, Router, separate
from tokenmill.layers.scope import Scope
from tokenmill.models import _moe, llama, mamba
from tokenmill.models._moe import Count, Natural
from tokenmill.models.base import Length
from tokenmill.models.llama import Apply, Size
from tokenmill.models.mamba import Factor, Kernel
from tokenmill.program.value import Value


class Config(mamba.Widths, llama.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' JambaConfig."""

    vocab_size: Size = 65536
    intermediate_size: Size = 14336
    num_key_value_heads: Size | None = 8
    max_position_embeddings: Length | None = 262144
    num_experts_per_tok: Count = 2
    num_experts: Count = 16
    expert_layer_period: Count = 2
    expert_layer_offset: Natural = 1
    attn_layer_period: Count = 8
    attn_layer_offset: Natural = 4
    state_size: Size = msgspec.field(default=16, name="mamba_d_state")
    conv_kernel: Kernel = msgspec.field(default=4, name="mamba_d_conv")
    expand: Factor = msgspec.field(default=2, name="mamba_expand")
    time_step_rank: Size | Literal["auto"] = msgspec.field(default="auto", name="mamba_dt_rank")
    use_conv_bias: bool = msgspec.field(default=True, name="mamba_conv_bias")
    use_bias: bool = msgspec.field(default=False, name="mamba_proj_bias")

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        _moe.check_top_k(self.num_experts_per_tok, self.num_experts)

    def rope_of(self, layer: int) -> Rope | None:
        """Return None: the order of tokens is in the states."""
        return None

    def attends(self, layer: int) -> bool:
        """Return True for a layer with attention."""
        return layer % self.attn_layer_period == self.attn_layer_offset

    def sparse(self, layer: int) -> bool:
        """Return True for a layer with experts."""
        return self.num_experts > 1 and layer % self.expert_layer_period == self.expert_layer_offset


class Mixer(mamba.Mixer):
    """Mamba's mixer, with norms of steps and coefficients."""

    def __init__(self, c: mamba.Sizes, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        assert isinstance(c, Config)
        widths = {"dt_layernorm": c.rank, "b_layernorm": c.state_size, "c_layernorm": c.state_size}
        self.dt_norm, self.b_norm, self.c_norm = (c.norm(scope / name, width) for name, width in widths.items())

    def norm(self, dt: Value, b: Value, c: Value) -> tuple[Value, Value, Value]:
        """Normalize step, b and c."""
        return self.dt_norm(dt), self.b_norm(b), self.c_norm(c)


class Layer(llama.Layer):
    """Llama's decoder layer, with Mamba or attention, and experts in some layers."""

    second_norm = "pre_ff_layernorm"

    def mixer(self, c: Config, scope: Scope, layer: int) -> Apply:
        """Return Mamba or attention."""
        return super().mixer(c, scope, layer) if c.attends(layer) else Mixer(c, scope / "mamba", layer)

    def feed_forward(self, c: Config, scope: Scope, layer: int) -> Apply:
        """Return the feed-forward layer."""
        scope = scope / "feed_forward"
        if not c.sparse(layer):
            return GatedMlp(scope, c.hidden_size, c.intermediate_size, c.act)
        router = Router(scope, c.hidden_size, c.num_experts, c.num_experts_per_tok, weight="router.weight")
        bank = separate(_moe.numbered(scope, c.num_experts), c.hidden_size, c.intermediate_size)
        return MoeMlp(router, bank, c.act)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer

    def __init__(self, c: Config, scope: Scope) -> None:
        super().__init__(c, scope)
        self.norm = c.norm(scope / "model.final_layernorm", c.hidden_size)
