"""Normalization of each row, or of each head of a row."""

from __future__ import annotations

from collections.abc import Sequence

from tokenmill.layers.scope import Scope
from tokenmill.program import ops
from tokenmill.program.ops import Part, Shard, Weight
from tokenmill.program.value import Value


def unweighted_norm(x: Value, eps: float, head_dim: int = 0) -> Value:
    """Apply RMSNorm without a weight, to each head if `head_dim` is set."""
    return x.record(ops.Norm, x=x, weight=None, eps=eps, head_dim=head_dim)


class RmsNorm:
    """RMSNorm. `add`: 1 if the checkpoint stores the weight minus one, else 0.

    `per_head`: of each head of `width` columns, by the same weight. `groups`: of so many parts of the row, each by its
    own part of the weight.
    """

    def __init__(
        self, scope: Scope, width: int, eps: float, *, per_head: bool = False, groups: int = 1, add: float = 0.0
    ) -> None:
        self.weight = Weight((Part(scope / "weight", width),), add=add)
        self.eps, self.head_dim = eps, width // groups if per_head or groups > 1 else 0

    def __call__(self, x: Value) -> Value:
        """Normalize x; the result has the same shape."""
        return x.record(ops.Norm, x=x, weight=self.weight, eps=self.eps, head_dim=self.head_dim)


class LayerNorm:
    """LayerNorm: RMSNorm after subtracting the mean.

    `per_head`: each head of `width` columns is normalized. `heads`: the number of heads, if each has a weight of its
    own. `names`: modules that hold these weights, if each is a tensor of its own. `add`: 1 if the checkpoint stores the
    weight minus one, else 0.
    """

    def __init__(
        self,
        scope: Scope,
        width: int,
        eps: float,
        *,
        bias: bool = True,
        per_head: bool = False,
        heads: int = 1,
        names: Sequence[str] = (),
        add: float = 0.0,
    ) -> None:
        def weight(suffix: str, add: float) -> Weight:
            if names:
                return Weight(tuple(Part(scope / name / suffix, width) for name in names), add=add)
            shard: Shard = "column" if heads > 1 else "none"
            return Weight((Part(scope / suffix, heads * width),), 0, shard, width if heads > 1 else 1, add=add)

        self.weight = weight("weight", add)
        self.bias = weight("bias", 0.0) if bias else None
        self.eps, self.head_dim = eps, width if per_head else 0

    def __call__(self, x: Value) -> Value:
        """Normalize x; the result has the same shape."""
        return x.record(
            ops.Norm, x=x, weight=self.weight, bias=self.bias, eps=self.eps, center=True, head_dim=self.head_dim
        )
