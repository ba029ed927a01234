"""Mixture-of-experts feed-forward layers: the router, the experts' weights, and the layer itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tokenmill.layers.scope import Scope
from tokenmill.program import ops
from tokenmill.program.ops import Part, Weight
from tokenmill.program.value import Value


class Router:
    """Choice of `top_k` of the experts for each row. `choice`: further fields of `ops.Route`.

    `weight`, `bias`, `correction`: names in the checkpoint; "": none.
    """

    def __init__(
        self,
        scope: Scope,
        width: int,
        experts: int,
        top_k: int,
        *,
        weight: str = "gate.weight",
        bias: str = "",
        correction: str = "",
        **choice: Any,
    ) -> None:
        self.weight = Weight((Part(scope / weight, experts),), width, exact=True)
        self.bias, self.correction = (
            Weight((Part(scope / name, experts),)) if name else None for name in (bias, correction)
        )
        self.top_k, self.choice = top_k, choice

    def __call__(self, x: Value) -> tuple[Value, Value]:
        """Return the experts' ids and the factors of their outputs, each (rows, top_k)."""
        ids, factors = (x.tape.new(x.spec.rows, self.top_k, dtype) for dtype in ("ids", "float"))
        fields = {"weight": self.weight, "bias": self.bias, "correction": self.correction, **self.choice}
        x.tape.ops.append(ops.Route(out=ids, factors=factors, x=x, top_k=self.top_k, **fields))
        return ids, factors


class Bank(NamedTuple):
    """Weights of a layer's experts, one of each field for each expert."""

    gate_up: tuple[Weight, ...]
    down: tuple[Weight, ...]
    gate_up_bias: tuple[Weight, ...] = ()
    down_bias: tuple[Weight, ...] = ()


def separate(
    scopes: list[Scope], width: int, inner: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Bank:
    """Return the bank of experts that are stored as matrices of their own. `names`: gate, up and down."""
    gate, up, down = ([scope / name / "weight" for scope in scopes] for name in names)
    return Bank(
        tuple(
            Weight((Part(own, inner), Part(other, inner)), width, "column") for own, other in zip(gate, up, strict=True)
        ),
        tuple(Weight((Part(name, width),), inner, "row") for name in down),
    )


def stacked(
    scope: Scope, experts: int, width: int, inner: int, names: tuple[str, str], *, transposed: bool = False
) -> Bank:
    """Return the bank of experts that are stacked in two tensors. `names`: gate and up fused, and down."""
    gate_up, down = (scope / name for name in names)

    def halves(index: int) -> tuple[Part, ...]:
        return tuple(Part(gate_up, inner, start, index=index) for start in (0, inner))

    return Bank(
        tuple(Weight(halves(i), width, "column", transposed=transposed) for i in range(experts)),
        tuple(Weight((Part(down, width, index=i),), inner, "row", transposed=transposed) for i in range(experts)),
    )


def ungated(scopes: list[Scope], width: int, inner: int, names: tuple[str, str] = ("up_proj", "down_proj")) -> Bank:
    """Return the bank of experts without gates that are stored one by one. `names`: up and down."""
    up, down = ([scope / name / "weight" for scope in scopes] for name in names)
    return Bank(
        tuple(Weight((Part(name, inner),), width, "column") for name in up),
        tuple(Weight((Part(name, width),), inner, "row") for name in down),
    )


class MoeMlp:
    """Mixture of experts. `shared`: a feed-forward layer that every row passes as well; `more`: fields of `Experts`."""

    def __init__(
        self, router: Router, bank: Bank, act: str, *, shared: Callable[[Value], Value] | None = None, **more: Any
    ) -> None:
        self.router, self.bank, self.act, self.shared, self.more = router, bank, act, shared, more

    def __call__(self, x: Value) -> Value:
        """Apply the layer to x, (rows, width); the result has the same shape."""
        ids, factors = self.router(x)
        fields = {**self.bank._asdict(), **self.more}
        y = x.record(ops.Experts, x=x, ids=ids, factors=factors, act=self.act, **fields)
        return y if self.shared is None else y + self.shared(x)
