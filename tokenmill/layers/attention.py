"""Rotary position embedding, and attention over the paged KV cache."""

from __future__ import annotations

from math import floor, log2
from typing import Any

from tokenmill.program import ops
from tokenmill.program.ops import Weight
from tokenmill.program.rope import RopeTable
from tokenmill.program.value import Value


class Rope:
    """Rotate each head of x by the row's position.

    `scaling`: config.json's object; None for no scaling. `rotary_dim`: rotated columns of a head; 0: all of them.
    `interleaved`: pairs are adjacent columns.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float,
        max_position: int,
        scaling: dict[str, Any] | None = None,
        rotary_dim: int = 0,
        *,
        interleaved: bool = False,
    ) -> None:
        self.head_dim = head_dim
        self.table = RopeTable.of(rotary_dim or head_dim, theta, max_position, scaling, interleaved)

    def __call__(self, x: Value) -> Value:
        """Rotate x, (tokens, heads · head_dim); the result has the same shape."""
        return x.record(ops.Rope, x=x, rope=self.table, head_dim=self.head_dim)


def attend(
    q: Value,
    k: Value,
    v: Value,
    *,
    layer: int,
    head_dim: int,
    scale: float | None = None,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    alibi: tuple[float, ...] = (),
    sinks: Weight | None = None,
) -> Value:
    """Record causal grouped-query attention. The numbers of heads follow from the widths of q, k and v."""
    return q.record(
        ops.Attention,
        q=q,
        k=k,
        v=v,
        layer=layer,
        head_dim=head_dim,
        scale=scale or head_dim**-0.5,
        window=window,
        chunk=chunk,
        softcap=softcap,
        alibi=alibi,
        sinks=sinks,
    )


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Return the slopes of ALiBi (arXiv:2108.12409). Heads beyond a power of two get those between the others."""
    power = 2 ** floor(log2(heads))
    between = heads - power
    return tuple(
        [2 ** (-8 / power * (i + 1)) for i in range(power)] + [2 ** (-4 / power * (2 * i + 1)) for i in range(between)]
    )
