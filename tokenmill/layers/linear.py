"""Linear layers. Several named matrices with the same input become one product."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tokenmill.layers.scope import Scope
from tokenmill.program import ops
from tokenmill.program.ops import Part, Shard, Weight
from tokenmill.program.share import Heads
from tokenmill.program.value import Value


class Linears:
    """Linear layer of several matrices: x (rows, width) -> one value for each matrix.

    `outputs`: name -> its size, or several sizes for a matrix that is stored fused, or its parts (`interleaved`).
    `unit`: number of adjacent outputs that sharding must not separate, such as those of a head. `heads`: numbers of
    query and key-value heads, if there are not outputs of both. `transposed`: stored (width, outputs).
    """

    def __init__(
        self,
        scope: Scope,
        width: int,
        *,
        shard: Shard = "none",
        unit: int = 1,
        heads: Heads = (0, 0),
        bias: bool = False,
        transposed: bool = False,
        outputs: Mapping[str, int | tuple[int, ...] | tuple[Part, ...]],
    ) -> None:
        fused = {name: (n,) if isinstance(n, int) else n for name, n in outputs.items()}
        stored = [(name, part) for name, parts in fused.items() for part in _parts(parts)]
        self.widths = [part.rows for _, part in stored]

        def parts(suffix: str) -> tuple[Part, ...]:
            return tuple(replace(part, name=scope / name / suffix) for name, part in stored)

        self.weight = Weight(parts("weight"), width, shard, unit, transposed, heads=heads)
        self.bias = Weight(parts("bias"), 0, shard, unit, heads=heads) if bias else None

    def product(self, x: Value) -> Value:
        """Return the outputs of all matrices, concatenated."""
        return x.record(ops.Linear, sum(self.widths), x=x, weight=self.weight, bias=self.bias)

    def __call__(self, x: Value) -> list[Value]:
        """Return one value for each matrix, or for each size of a fused one."""
        return self.product(x).split(*self.widths)


def _parts(sizes: tuple[int, ...] | tuple[Part, ...]) -> list[Part]:
    starts = [sum(n for n in sizes[:i] if isinstance(n, int)) for i in range(len(sizes))]
    pairs: Iterable[tuple[int | Part, int]] = zip(sizes, starts, strict=True)
    return [n if isinstance(n, Part) else Part("", n, start) for n, start in pairs]


def interleaved(groups: int, *sizes: int) -> tuple[Part, ...]:
    """Return the parts of a matrix that is stored as `groups` groups, each of adjacent rows of so many per part."""
    return tuple(Part("", groups * n, sum(sizes[:i]), run=n, step=sum(sizes)) for i, n in enumerate(sizes))


class Linear:
    """Linear layer of the matrix `name`: x (rows, width) -> (rows, outputs)."""

    def __init__(
        self,
        scope: Scope,
        width: int,
        name: str,
        outputs: int,
        *,
        shard: Shard = "none",
        bias: bool = False,
        transposed: bool = False,
    ) -> None:
        self.many = Linears(scope, width, shard=shard, bias=bias, transposed=transposed, outputs={name: outputs})

    def __call__(self, x: Value) -> Value:
        """Return the product."""
        return self.many.product(x)


def head(
    scope: Scope, width: int, vocabulary: int, tied: Weight | None = None, *, name: str = "lm_head", bias: bool = False
) -> Linear:
    """Return the output layer. `tied`: the embedding's weight, for a model that has no output matrix of its own."""
    layer = Linear(scope, width, name, vocabulary, shard="vocab", bias=bias)
    layer.many.weight = tied or layer.many.weight
    return layer
