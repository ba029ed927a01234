"""Feed-forward layers, and activation, soft cap and row selection as functions."""

from __future__ import annotations

from tokenmill.layers.linear import Linear, Linears
from tokenmill.layers.scope import Scope
from tokenmill.program import ops, special
from tokenmill.program.value import Value


def act(x: Value, name: str) -> Value:
    """Apply the activation that transformers calls `name`."""
    return x.record(ops.Act, x=x, act=name)


def scaled(x: Value, factor: float) -> Value:
    """Return x · factor; x itself if the factor is 1."""
    return x if factor == 1 else x.record(ops.Scale, x=x, factor=factor)


def clipped(x: Value, limit: float) -> Value:
    """Return x, at least -limit and at most limit; x itself if the limit is 0."""
    return x.record(special.Clip, x=x, limit=limit) if limit else x


def soft_cap(x: Value, cap: float) -> Value:
    """Return cap · tanh(x / cap)."""
    return x.record(ops.SoftCap, x=x, cap=cap)


def gated(gate: Value, up: Value, act: str) -> Value:
    """Return act(gate) · up."""
    return gate.record(ops.GatedAct, gate=gate, up=up, act=act)


def times(x: Value, y: Value) -> Value:
    """Return x · y, column by column."""
    return x.record(ops.GatedAct, gate=x, up=y, act="linear")


def take_rows(x: Value) -> Value:
    """Select the rows that sample, because only they need logits."""
    return x.record(ops.TakeRows, rows="samples", x=x)


class GatedMlp:
    """Gated feed-forward layer: down(act(gate(x)) · up(x)). `fused`: name of a matrix that holds gate, then up."""

    def __init__(
        self,
        scope: Scope,
        width: int,
        inner: int,
        act: str,
        *,
        bias: bool = False,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        fused: str = "",
    ) -> None:
        gate, up, down = names
        stored = {fused: (inner, inner)} if fused else {gate: inner, up: inner}
        self.gate_up = Linears(scope, width, shard="column", bias=bias, outputs=stored)
        self.down = Linear(scope, inner, down, width, shard="row", bias=bias)
        self.act = act

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (rows, width); the result has the same shape."""
        gate, up = self.gate_up(x)
        return self.down(gate.record(ops.GatedAct, gate=gate, up=up, act=self.act))


class Mlp:
    """Feed-forward layer without a gate: down(act(up(x))). `names`: the checkpoint's names of up and down."""

    def __init__(
        self,
        scope: Scope,
        width: int,
        inner: int,
        act: str,
        names: tuple[str, str],
        *,
        bias: bool = False,
        transposed: bool = False,
    ) -> None:
        up, down = names
        self.up = Linear(scope, width, up, inner, shard="column", bias=bias, transposed=transposed)
        self.down = Linear(scope, inner, down, width, shard="row", bias=bias, transposed=transposed)
        self.act = act

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (rows, width); the result has the same shape."""
        return self.down(act(self.up(x), self.act))
