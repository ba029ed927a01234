"""Granite 4: Mamba 2 or attention, a shared feed-forward layer, and experts beside it in some models."""

from __future__ import annotations

from collections.abc import Sequence

from tokenmill.layers.attention import Rope
from tokenmill.layers.linear import Linear, Linears
from tokenmill.layers.mlp import gated
from tokenmill.layers.moe import MoeMlp, Router, stacked
from tokenmill.layers.scope import Scope
from tokenmill.models import _mamba2, _moe, llama
from tokenmill.models._moe import Count, Natural
from tokenmill.models.granite import Divisor, Factors
from tokenmill.models.llama import Apply, Size
from tokenmill.program.value import Value


class Config(Factors, _mamba2.Hybrid, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' GraniteMoeHybridConfig."""

    num_key_value_heads: Size | None = None
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: Divisor = 1.0
    num_local_experts: Natural = 8
    num_experts_per_tok: Count = 2
    shared_intermediate_size: Size = 1024
    position_embedding_type: str | None = None
    layer_types: list[str] | None = None
    layers_block_type: list[str] | None = None  # the field's name in older versions

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent numbers."""
        super().__post_init__()
        if self.num_local_experts:
            _moe.check_top_k(self.num_experts_per_tok, self.num_local_experts)

    @property
    def kinds(self) -> Sequence[str]:
        """Kind of each layer."""
        named = self.layer_types or self.layers_block_type or ["linear_attention"] * self.num_hidden_layers
        return [_mamba2.KINDS.get(name, name) for name in named]

    def rope_of(self, layer: int) -> Rope | None:
        """Return the rotary embedding, which not all of these models have."""
        return self.rope if self.position_embedding_type == "rope" else None


class Mlp:
    """Gated feed-forward layer whose gate and up are stored as one matrix."""

    def __init__(self, c: Config, scope: Scope) -> None:
        inner = c.shared_intermediate_size
        self.gate_up = Linears(scope, c.hidden_size, shard="column", outputs={"input_linear": (inner, inner)})
        self.down = Linear(scope, inner, "output_linear", c.hidden_size, shard="row")
        self.act = c.act

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (rows, width); the result has the same shape."""
        gate, up = self.gate_up(x)
        return self.down(gated(gate, up, self.act))


class Layer(_mamba2.Layer):
    """Decoder layer with a mixer of Mamba 2 or attention."""

    second_norm = "post_attention_layernorm"

    def feed_forward(self, c: Config, scope: Scope, layer: int) -> Apply:
        """Return the shared layer, with experts if there are any."""
        shared, experts = Mlp(c, scope / "shared_mlp"), scope / "block_sparse_moe"
        if not c.num_local_experts:
            return shared
        router = Router(
            experts, c.hidden_size, c.num_local_experts, c.num_experts_per_tok, weight="router.layer.weight",
            renormalize=True,
        )  # fmt: skip
        names = "input_linear.weight", "output_linear.weight"
        bank = stacked(experts, c.num_local_experts, c.hidden_size, c.intermediate_size, names)
        return MoeMlp(router, bank, c.act, shared=shared)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
