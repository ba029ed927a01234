"""Granite MoE with a shared expert: a feed-forward layer that every row passes beside its own experts."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.linear import Linear, Linears
from tokenmill.layers.mlp import GatedMlp
from tokenmill.layers.scope import Scope
from tokenmill.models import granitemoe, llama
from tokenmill.models._moe import Natural
from tokenmill.models.llama import Apply


class Config(granitemoe.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' GraniteMoeSharedConfig."""

    shared_intermediate_size: Natural = 0


class Shared(GatedMlp):
    """Gated feed-forward layer under Granite's names, with gate and up in one tensor."""

    def __init__(self, c: Config, scope: Scope) -> None:
        inner = c.shared_intermediate_size
        self.gate_up = Linears(scope, c.hidden_size, shard="column", outputs={"input_linear": (inner, inner)})
        self.down = Linear(scope, inner, "output_linear", c.hidden_size, shard="row")
        self.act = c.act


class Layer(granitemoe.Layer):
    """Granite's decoder layer with experts, and the shared one."""

    def feed_forward(self, c: Any, scope: Scope, layer: int) -> Apply:
        """Return the experts."""
        return self.experts(c, scope, Shared(c, scope / "shared_mlp") if c.shared_intermediate_size else None)


class Model(llama.Model):
    """Llama's model, with this file's decoder layers."""

    layer = Layer
