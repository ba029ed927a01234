"""Mixture-of-experts feed-forward layer."""

from __future__ import annotations

from tokenmill.layers.linear import Linear
from tokenmill.layers.scope import Scope
from tokenmill.program import ops
from tokenmill.program.ops import Part, Weight
from tokenmill.program.value import Value


class MoeMlp:
    """Mixture of experts. `names`: the checkpoint's names of the router, then of an expert's gate, up and down."""

    def __init__(
        self,
        scope: Scope,
        width: int,
        inner: int,
        act: str,
        *,
        experts: int,
        top_k: int,
        renormalize: bool = True,
        names: tuple[str, str, str, str] = ("gate", "w1", "w3", "w2"),
    ) -> None:
        router, gate, up, down = names
        self.router = Linear(scope, width, router, experts)
        each = [scope / f"experts.{i}" for i in range(experts)]
        self.gate_up = tuple(
            Weight((Part(e / gate / "weight", inner), Part(e / up / "weight", inner)), width, "column") for e in each
        )
        self.down = tuple(Weight((Part(e / down / "weight", width),), inner, "row") for e in each)
        self.top_k, self.act, self.renormalize = top_k, act, renormalize

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (rows, width); the result has the same shape."""
        return x.record(
            ops.Experts,
            x=x,
            scores=self.router(x),
            gate_up=self.gate_up,
            down=self.down,
            top_k=self.top_k,
            act=self.act,
            renormalize=self.renormalize,
        )
