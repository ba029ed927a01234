"""The kinds of operation, and the weights they name. Records only: nothing runs here.

Fields of type Value are read, those named in `writes` are written; everything else is known before the first step. An
optional Value, Weight or `act` is filled in by a fusing pass (passes.py), for backends that have such a kernel.

An operation describes itself: `rowwise`, `sharded_by` and `keeps` answer what passes and backends need to know, so a
new kind needs no change in them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, dataclass_transform

from tokenmill.program.rope import RopeTable
from tokenmill.program.value import Value

Shard = Literal["none", "column", "row", "vocab"]
"""vocab: column-parallel, and gathered (head) or summed (embedding)"""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, start + rows) of the checkpoint's tensor `name`."""

    name: str
    rows: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix (rows, columns) or a vector of the checkpoint, by name: parts stacked along the output. Not read yet."""

    parts: tuple[Part, ...]
    columns: int = 0  # 0: a vector
    shard: Shard = "none"
    unit: int = 1  # outputs that stay together: a head
    transposed: bool = False  # stored (columns, rows)
    add: float = 0.0  # some models store a norm's weight minus one
    table: bool = False  # looked up by row, too: worth more bits
    ranks: int = 1  # how many share it: set by the pass `shard`

    @property
    def rows(self) -> int:
        """Rows that one rank holds."""
        return sum(self.local(part) for part in self.parts)

    @property
    def size(self) -> int:
        """Elements that one rank holds."""
        return self.rows * max(1, self.columns // self.ranks if self.shard == "row" else self.columns)

    def local(self, part: Part) -> int:
        """Rows of a part that one rank holds; heads fewer than ranks are repeated."""
        return max(part.rows // self.ranks, self.unit) if self.shard in ("column", "vocab") else part.rows

    @property
    def name(self) -> str:
        """The first part's."""
        return self.parts[0].name


class CachePart(NamedTuple):
    """One tensor of a layer's cache: `heads` rows of `width` elements for every token."""

    name: str  # "key", "value"
    heads: int
    width: int


class CacheSpec(NamedTuple):
    """Cache that an operation keeps between steps for every token, on one rank."""

    layer: int  # unique over a program
    parts: tuple[CachePart, ...]
    window: int = 0  # tokens that are looked back at, the row's own included; 0: all

    @property
    def width(self) -> int:
        """Elements of one token."""
        return sum(part.heads * part.width for part in self.parts)


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation. Subclasses are its kinds."""

    out: Value
    writes: ClassVar[tuple[str, ...]] = ("out",)
    rowwise: ClassVar[bool] = True
    """True if a row of the results depends on that row of the inputs alone, whatever its position."""
    sharded_by: ClassVar[str] = ""
    """Field of the weight whose sharding decides the operation's; "": none"""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def reads(self) -> dict[str, Value]:
        """Values by field name, in the order of the fields."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.writes}
        return {name: v for name, v in found.items() if isinstance(v, Value)}

    def results(self) -> dict[str, Value]:
        """Values that are written, by field name."""
        return {name: getattr(self, name) for name in self.writes}

    def weights(self) -> dict[str, tuple[Weight, ...]]:
        """Weights by field name."""
        found: dict[str, tuple[Weight, ...]] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Weight):
                found[f.name] = (value,)
            elif isinstance(value, tuple) and value and isinstance(value[0], Weight):
                found[f.name] = value
        return found

    def keeps(self) -> CacheSpec | None:
        """Return what the operation keeps between steps; None if it has no memory."""
        return None

    @property
    def shard(self) -> Shard:
        """How the operation is shared over ranks."""
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
    return v.name if isinstance(v, Weight) else str(v)


class Embed(Op):
    """Rows of a table, by token id or by position."""

    rowwise = False  # its input is no value of which rows can be taken
    sharded_by = "table"
    ids: Value
    table: Weight
    scale: float = 1.0


class Linear(Op):
    """act(x · weightᵀ + bias), times the other half if gated (the outputs are gate | up), plus residual."""

    sharded_by = "weight"
    x: Value
    weight: Weight
    bias: Weight | None = None
    act: str | None = None
    gated: bool = False
    residual: Value | None = None


class Norm(Op):
    """RMS norm, or LayerNorm if `center`, of the row or of each `head_dim` columns."""

    x: Value
    weight: Weight
    bias: Weight | None = None
    eps: float
    center: bool = False
    head_dim: int = 0


class AddNorm(Norm):
    """total = x + y; out = norm(total)."""

    y: Value
    total: Value
    writes: ClassVar[tuple[str, ...]] = ("out", "total")


class Rope(Op):
    """Rotate the first rotary_dim columns of each head by the row's position, halves split."""

    rowwise = False
    x: Value
    rope: RopeTable
    head_dim: int


class Attention(Op):
    """Write k and v to the paged cache of `layer`, then attend causally. Fused: norm of heads and rope, before both."""

    rowwise = False
    q: Value
    k: Value
    v: Value
    layer: int
    head_dim: int
    scale: float
    window: int = 0  # keys seen, the token's own included; 0: all
    softcap: float = 0.0  # 0: none
    q_norm: Weight | None = None
    k_norm: Weight | None = None
    eps: float = 0.0
    rope: RopeTable | None = None

    def keeps(self) -> CacheSpec:
        """Return the spec of a key and a value of every head."""
        heads = self.k.width // self.head_dim
        parts = CachePart("key", heads, self.head_dim), CachePart("value", heads, self.v.width // heads)
        return CacheSpec(self.layer, parts, self.window)


class GatedAct(Op):
    """act(gate) · up"""

    gate: Value
    up: Value
    act: str


class Act(Op):
    """act(x)"""

    x: Value
    act: str


class Add(Op):
    """x + y"""

    x: Value
    y: Value


class SoftCap(Op):
    """cap · tanh(x / cap)"""

    x: Value
    cap: float


class TakeRows(Op):
    """The rows that sample."""

    rowwise = False
    x: Value


class Experts(Op):
    """Each row through its top_k experts by `scores`, weighted by the softmax (over the chosen, if renormalize)."""

    sharded_by = "down"
    x: Value
    scores: Value
    gate_up: tuple[Weight, ...]
    down: tuple[Weight, ...]
    top_k: int
    act: str
    renormalize: bool = True


class Quantize(Op):
    """Float to int8 with a scale per 32 columns. Most often fused: another operation writes an int8 buffer itself."""

    x: Value


class AllReduce(Op):
    """The sum over the ranks."""

    x: Value


class Gather(Op):
    """The ranks' columns side by side."""

    x: Value


class ArgMax(Op):
    """The id of the largest logit; ties go to the smaller id."""

    x: Value
