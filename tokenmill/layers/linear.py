"""Linear layers. Several named matrices with the same input become one product."""

from __future__ import annotations

from collections.abc import Mapping

from tokenmill.layers.scope import Scope
from tokenmill.program import ops
from tokenmill.program.ops import Part, Shard, Weight
from tokenmill.program.value import Value


class Linears:
    """Linear layer of several matrices: x (rows, width) -> one value for each matrix.

    `outputs`: name -> its size, or several sizes for a matrix that is stored fused. `unit`: number of adjacent outputs
    that sharding must not separate.
    """

    def __init__(
        self,
        scope: Scope,
        width: int,
        *,
        shard: Shard = "none",
        unit: int = 1,
        bias: bool = False,
        transposed: bool = False,
        outputs: Mapping[str, int | tuple[int, ...]],
    ) -> None:
        sizes = {name: (n,) if isinstance(n, int) else n for name, n in outputs.items()}
        self.widths = [n for parts in sizes.values() for n in parts]

        def parts(suffix: str) -> tuple[Part, ...]:
            return tuple(
                Part(scope / name / suffix, n, sum(ns[:i])) for name, ns in sizes.items() for i, n in enumerate(ns)
            )

        self.weight = Weight(parts("weight"), width, shard, unit, transposed)
        self.bias = Weight(parts("bias"), 0, shard, unit) if bias else None

    def product(self, x: Value) -> Value:
        """Return the outputs of all matrices, concatenated."""
        return x.record(ops.Linear, sum(self.widths), x=x, weight=self.weight, bias=self.bias)

    def __call__(self, x: Value) -> list[Value]:
        """Return one value for each matrix, or for each size of a fused one."""
        return self.product(x).split(*self.widths)


class Linear:
    """Linear layer of the matrix `name`: x (rows, width) -> (rows, outputs)."""

    def __init__(
        self, scope: Scope, width: int, name: str, outputs: int, *, shard: Shard = "none", bias: bool = False
    ) -> None:
        self.many = Linears(scope, width, shard=shard, bias=bias, outputs={name: outputs})

    def __call__(self, x: Value) -> Value:
        """Return the product."""
        return self.many.product(x)


def head(scope: Scope, width: int, vocabulary: int, tied: Weight | None = None) -> Linear:
    """Return the output layer. `tied`: the embedding's weight, for a model that has no output matrix of its own."""
    layer = Linear(scope, width, "lm_head", vocabulary, shard="vocab")
    layer.many.weight = tied or layer.many.weight
    return layer
