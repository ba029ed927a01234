"""Mixer of Mamba 2: a scan with one decay for each head."""

from __future__ import annotations

from typing import NamedTuple

from tokenmill.layers.linear import Linear, Linears
from tokenmill.layers.mlp import act
from tokenmill.layers.norm import RmsNorm
from tokenmill.layers.recurrence import CausalConv
from tokenmill.layers.scope import Scope
from tokenmill.program import ops
from tokenmill.program.ops import Part, Weight
from tokenmill.program.recurrence import StateSpace
from tokenmill.program.value import Value


class Sizes(NamedTuple):
    """Sizes and properties of a mixer."""

    hidden: int
    heads: int
    head_dim: int
    state: int  # columns of the state
    groups: int  # of heads that share b and c
    kernel: int
    eps: float
    act: str
    bias: bool = False
    conv_bias: bool = True
    limits: tuple[float, float] = (0.0, float("inf"))  # of the steps
    norm_groups: int = 1

    @property
    def inner(self) -> int:
        """Number of columns of the scan."""
        return self.heads * self.head_dim


class Mamba2:
    """Mixer of Mamba 2: projection, convolution, scan, gated norm, projection. Every rank computes all of it."""

    def __init__(self, s: Sizes, scope: Scope, layer: int) -> None:
        self.inner, self.shared, self.groups, self.heads = s.inner, s.groups * s.state, s.groups, s.heads
        convolved = self.inner + 2 * self.shared
        outputs = {"in_proj": (self.inner, convolved, s.heads)}
        self.split = Linears(scope, s.hidden, bias=s.bias, outputs=outputs)
        self.conv = CausalConv(scope / "conv1d", convolved, s.kernel, layer=layer, bias=s.conv_bias)
        self.dt_bias, self.a_log, self.d = (
            Weight((Part(scope / name, s.heads),)) for name in ("dt_bias", "A_log", "D")
        )
        self.norm = RmsNorm(scope / "norm", self.inner, s.eps, groups=s.norm_groups)
        self.out = Linear(scope, self.inner, "out_proj", s.hidden, bias=s.bias)
        self.act, self.limits, self.layer = s.act, s.limits, layer

    def gate(self, y: Value, gate: Value) -> Value:
        """Gate the scan's result and normalize it."""
        return self.norm(y.record(ops.GatedAct, gate=gate, up=y, act=self.act))

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (tokens, hidden); the result has the same shape."""
        gate, convolved, dt = self.split(x)
        x, b, c = act(self.conv(convolved), self.act).split(self.inner, self.shared, self.shared)
        return self.out(self.gate(self.scan(x, b, c, dt), gate))

    def scan(self, x: Value, b: Value, c: Value, dt: Value) -> Value:
        """Scan x with steps from dt."""
        return x.record(
            StateSpace, x=x, dt=dt, b=b, c=c, a_log=self.a_log, d=self.d, dt_bias=self.dt_bias, groups=self.groups,
            limits=self.limits, layer=self.layer,
        )  # fmt: skip
