"""Operations of a program, and the weights that they name. Operations are records; backends execute them.

Fields of type Value are inputs, except those named in `writes`, which are results. All other fields are constant before
the first step. An optional Value, Weight or `act` is set by a fusion (passes.py), for backends that have such a kernel.

Passes and backends read the properties of an operation from `rowwise`, `sharded_by`, `keeps` and `state`, so a new
kind of operation requires no change in them. Those with a state per sequence are in `recurrence.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, dataclass_transform

from tokenmill.program.keeps import CachePart, CacheSpec, StateSpec
from tokenmill.program.rope import RopeTable
from tokenmill.program.value import Value
from tokenmill.program.weight import Part as Part
from tokenmill.program.weight import Shard as Shard
from tokenmill.program.weight import Weight as Weight


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class Op:
    """Operation of a program. Each subclass is a kind of operation."""

    out: Value
    writes: ClassVar[tuple[str, ...]] = ("out",)
    rowwise: ClassVar[bool] = True
    """True if each row of the results depends on the same row of the inputs only, and not on its position."""
    whole_rows: ClassVar[bool] = False
    """True if a column of the results depends on all columns of an input, so that ranks cannot share that input."""
    sharded_by: ClassVar[str] = ""
    """Name of the field whose weight determines how the operation is sharded; "": none"""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def reads(self) -> dict[str, Value]:
        """Return the input values by field name, in the order of the fields."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.writes}
        return {name: v for name, v in found.items() if isinstance(v, Value)}

    def results(self) -> dict[str, Value]:
        """Return the result values by field name."""
        return {name: getattr(self, name) for name in self.writes}

    def weights(self) -> dict[str, tuple[Weight, ...]]:
        """Return the weights by field name."""
        found: dict[str, tuple[Weight, ...]] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Weight):
                found[f.name] = (value,)
            elif isinstance(value, tuple) and value and isinstance(value[0], Weight):
                found[f.name] = value
        return found

    def keeps(self) -> CacheSpec | None:
        """Return the cache that the operation keeps between steps; None if it has none."""
        return None

    def state(self) -> StateSpec | None:
        """Return the state that the operation keeps between steps for each sequence; None if it has none."""
        return None

    @property
    def shard(self) -> Shard:
        """Axis along which ranks share the operation."""
        return self.weights()[self.sharded_by][0].shard if self.sharded_by else "none"

    def __str__(self) -> str:
        told = [
            f"{f.name}={_show(getattr(self, f.name))}"
            for f in fields(self)
            if f.name not in self.writes and getattr(self, f.name) != f.default
        ]
        made = ", ".join(f"{_show(v)}: {v.spec.dtype} {v.spec.rows}×{v.spec.width}" for v in self.results().values())
        return f"{made} = {type(self).__name__}({', '.join(told)})"


def _show(v: Any) -> str:
    if isinstance(v, Value):
        return f"%{v.buffer}" + ("" if v.whole else f"[{v.start}:{v.start + v.width}]")
    if isinstance(v, tuple) and v and isinstance(v[0], Weight):
        return f"{v[0].name} × {len(v)}"
    return v.name if isinstance(v, Weight) else str(v)


class Embed(Op):
    """Look up rows of a table, by token id or by position."""

    rowwise = False  # TakeRows cannot be moved before it, because its input is the ids of all tokens
    sharded_by = "table"
    ids: Value
    table: Weight
    scale: float = 1.0


class Linear(Op):
    """Compute act(x · weightᵀ + bias) + residual.

    If `gated`, the product's outputs are gate | up, and act(gate) · up takes the place of act.
    """

    sharded_by = "weight"
    x: Value
    weight: Weight
    bias: Weight | None = None
    act: str | None = None
    gated: bool = False
    residual: Value | None = None


class Norm(Op):
    """Apply RMSNorm, or LayerNorm if `center`, to each row, or to each head of it if `head_dim` is set.

    `weight`: a number for each column of a head, or for each column of the row, as the bias; None: all ones.
    """

    x: Value
    weight: Weight | None
    bias: Weight | None = None
    eps: float
    center: bool = False
    head_dim: int = 0


class AddNorm(Norm):
    """Compute total = x + y and out = norm(total)."""

    y: Value
    total: Value
    writes: ClassVar[tuple[str, ...]] = ("out", "total")


class Rope(Op):
    """Rotate the first `rotary_dim` columns of each head by the row's position, in pairs as the table has them."""

    rowwise = False
    x: Value
    rope: RopeTable
    head_dim: int


class Attention(Op):
    """Write k and v to the paged cache of `layer`, then attend causally.

    Layers that share a cache name the same `layer` and the same k and v, so they write what is there already.
    If set by fusion, `q_norm`, `k_norm` and `rope` are applied to q and k before that.
    """

    rowwise = False
    q: Value
    k: Value
    v: Value
    layer: int
    head_dim: int
    scale: float
    window: int = 0  # size of the sliding window in tokens, the token's own included; 0: all tokens
    chunk: int = 0  # attend within chunks of so many positions only, which do not overlap; 0: no chunks
    softcap: float = 0.0  # 0: none
    alibi: tuple[float, ...] = ()  # slopes of the places for query heads, all ranks', times key − query position
    sinks: Weight | None = None  # score of each query head that takes a share of the softmax and has no value
    q_norm: Weight | None = None
    k_norm: Weight | None = None
    eps: float = 0.0
    rope: RopeTable | None = None

    def keeps(self) -> CacheSpec:
        """Return the spec of one key and one value per head."""
        heads = self.k.width // self.head_dim
        parts = CachePart("key", heads, self.head_dim), CachePart("value", heads, self.v.width // heads)
        return CacheSpec(self.layer, parts, self.window or self.chunk)


class LatentAttention(Op):
    """Attend causally to keys and values that are expanded from one compressed row for each token (DeepSeek's MLA).

    A head of `q` has columns that are not rotated, then `key.width` columns that are, by `rope` if set. The cache keeps
    `latent` and the rotated `key`, which all heads share. `expand` makes each head's other key columns, and its
    `value_dim` values, from `latent`. If `interleaved`, a rotation pairs columns 2i and 2i + 1 instead of halves.
    """

    rowwise = False
    sharded_by = "expand"
    q: Value
    latent: Value
    key: Value
    expand: Weight
    layer: int
    head_dim: int
    value_dim: int
    scale: float
    rope: RopeTable | None
    interleaved: bool = False

    def keeps(self) -> CacheSpec:
        """Return the spec of one row for all heads."""
        parts = CachePart("latent", 1, self.latent.width), CachePart("key", 1, self.key.width)
        return CacheSpec(self.layer, parts)


class GatedAct(Op):
    """Compute act(gate) · up."""

    gate: Value
    up: Value
    act: str


class Act(Op):
    """Compute act(x)."""

    x: Value
    act: str


class Add(Op):
    """Compute x + y."""

    x: Value
    y: Value


class Scale(Op):
    """Compute x · factor."""

    x: Value
    factor: float


class SoftCap(Op):
    """Compute cap · tanh(x / cap)."""

    x: Value
    cap: float


class TakeRows(Op):
    """Select the rows that sample."""

    rowwise = False
    x: Value


class Route(Op):
    """Choose `top_k` experts for each row: out = their ids, factors = the factors of their outputs.

    The scores are score(x · weightᵀ + bias). Those plus `correction` decide; the factors are without it. With several
    `groups` of adjacent experts, only those in the `top_groups` best can be chosen; a group counts as the sum of its
    `group_best` best. `renormalize` divides factors by their sum, at least `least_sum`; `scale` then multiplies them.

    "sparsemixer" (Phi-3.5-MoE) chooses one expert after another. A factor is the expert's share in the softmax over the
    experts that are left and whose logits are near the best one's, in the sense of `margin`.
    """

    writes: ClassVar[tuple[str, ...]] = ("out", "factors")
    x: Value
    weight: Weight
    bias: Weight | None = None
    correction: Weight | None = None
    top_k: int
    score: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    renormalize: bool = False
    least_sum: float = 0.0
    scale: float = 1.0
    margin: float = 0.0
    factors: Value


class Experts(Op):
    """Sum factor · down(act(gate(x)) · up(x)) over the experts of each row. `ids` and `factors`: results of a Route.

    There is a weight for each expert, with the outputs gate | up. If not `gated`, there is only up, and act(up(x))
    takes the place of the product. If `limit`, gate is at most and up at most and at least of this magnitude.
    `up_offset` is added to up. If `scale_inputs`, the factor multiplies x and not the output.
    """

    sharded_by = "down"
    x: Value
    ids: Value
    factors: Value
    gate_up: tuple[Weight, ...]
    down: tuple[Weight, ...]
    gate_up_bias: tuple[Weight, ...] = ()
    down_bias: tuple[Weight, ...] = ()
    act: str
    limit: float = 0.0
    up_offset: float = 0.0
    scale_inputs: bool = False
    gated: bool = True


class Quantize(Op):
    """Quantize to int8 with one scale per 32 columns.

    Fusion removes most of these operations: the producer then writes the int8 buffer directly.
    """

    x: Value


class AllReduce(Op):
    """Sum over the ranks."""

    x: Value


class Gather(Op):
    """Concatenate the ranks' columns, and leave out those beyond the width of `out`, which are padding."""

    x: Value


class ArgMax(Op):
    """Return the id of the largest logit, and of equal ones the smallest id."""

    x: Value
