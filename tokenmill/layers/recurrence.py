"""Layers that keep a state per sequence."""

from __future__ import annotations

from tokenmill.layers.scope import Scope
from tokenmill.program import recurrence
from tokenmill.program.ops import Part, Shard, Weight
from tokenmill.program.value import Value


class CausalConv:
    """Convolution of each column over the last `kernel` tokens."""

    def __init__(
        self, scope: Scope, width: int, kernel: int, *, layer: int, bias: bool = False, shard: Shard = "none"
    ) -> None:
        self.weight = Weight((Part(scope / "weight", width),), kernel, shard)
        self.bias = Weight((Part(scope / "bias", width),), 0, shard) if bias else None
        self.layer = layer

    def __call__(self, x: Value) -> Value:
        """Convolve x, (tokens, width); the result has the same shape."""
        return x.record(recurrence.CausalConv, x=x, weight=self.weight, bias=self.bias, layer=self.layer)
