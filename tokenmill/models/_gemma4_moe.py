"""Experts of Gemma 4."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.mlp import scaled
from tokenmill.layers.moe import Router, separate
from tokenmill.layers.scope import Scope
from tokenmill.models import _moe
from tokenmill.program import ops, special
from tokenmill.program.ops import Part, Weight
from tokenmill.program.value import Value


class Experts:
    """Experts beside the feed-forward layer. The router has a norm of its own, and a number for each expert."""

    def __init__(self, c: Any, scope: Scope) -> None:
        self.route = Router(
            scope, c.hidden_size, c.num_experts, c.top_k_experts, weight="router.proj.weight", renormalize=True
        )
        self.scale = Weight((Part(scope / "router.scale", c.hidden_size),))
        self.factor, self.eps, self.act = c.hidden_size**-0.5, c.rms_norm_eps, c.act
        self.of_expert = Weight((Part(scope / "router.per_expert_scale", c.num_experts),))
        self.bank = separate(_moe.numbered(scope, c.num_experts), c.hidden_size, c.moe_intermediate_size)
        self.before, self.after = (
            c.norm(scope / f"{name}_feedforward_layernorm_2", c.hidden_size) for name in ("pre", "post")
        )

    def __call__(self, x: Value) -> Value:
        """Return the experts' addition for the residual x, (tokens, hidden)."""
        ids, factors = self.route(scaled(x.record(ops.Norm, x=x, weight=self.scale, eps=self.eps), self.factor))
        factors = factors.record(special.ScaleByExpert, factors=factors, ids=ids, weight=self.of_expert)
        inner = self.before(x)
        fields: dict[str, Any] = {"ids": ids, "factors": factors, "act": self.act, **self.bank._asdict()}
        y: Value = self.after(inner.record(ops.Experts, x=inner, **fields))
        return y
