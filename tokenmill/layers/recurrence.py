"""Layers that keep a state per sequence."""

from __future__ import annotations

from typing import Any

from tokenmill.layers.scope import Scope
from tokenmill.program import recurrence
from tokenmill.program.ops import Part, Shard, Weight
from tokenmill.program.value import Value


class CausalConv:
    """Convolution of each column over the last `kernel` tokens.

    `start`: of its columns among those that the checkpoint's tensors hold. `name`: unique within a layer.
    """

    def __init__(
        self,
        scope: Scope,
        width: int,
        kernel: int,
        *,
        layer: int,
        bias: bool = False,
        shard: Shard = "none",
        start: int = 0,
        name: str = "conv",
    ) -> None:
        self.weight = Weight((Part(scope / "weight", width, start),), kernel, shard)
        self.bias = Weight((Part(scope / "bias", width, start),), 0, shard) if bias else None
        self.layer, self.name = layer, name

    def __call__(self, x: Value) -> Value:
        """Convolve x, (tokens, width); the result has the same shape."""
        fields: dict[str, Any] = {"weight": self.weight, "bias": self.bias, "layer": self.layer, "name": self.name}
        return x.record(recurrence.CausalConv, x=x, **fields)
