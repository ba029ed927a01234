"""Random programs with random weights, to compare passes, sharding and backends."""

from __future__ import annotations

from typing import Any

import numpy as np
from support_models import Driver

from tokenmill.backends.torch.interpreter import Interpreter
from tokenmill.program import ops, recurrence, special
from tokenmill.program.ops import Part, Weight
from tokenmill.program.rope import RopeTable
from tokenmill.program.value import Inputs, Program, Value, record
from tokenmill.weights.checkpoint import Stored

VOCABULARY, WIDTH, HEAD, HEADS, KV_HEADS, INNER = 64, 64, 16, 4, 2, 96


class Arrays:
    """A checkpoint of arrays in memory."""

    format = "safetensors"

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = {name: a.astype(np.float32) for name, a in arrays.items()}
        self.config: dict[str, Any] = {}

    def names(self) -> Any:
        return iter(self.arrays)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.arrays[name].shape if name in self.arrays else None

    def nbytes(self, name: str) -> int:
        return self.arrays[name].nbytes

    def __getitem__(self, name: str) -> Stored:
        a = self.arrays[name]
        return Stored(name, "F32", a.shape, a.view(np.uint8).reshape(len(a), -1))


class Draw:
    """Generator of a random program of one or two layers. Each choice is an attribute or an edge that some model has.

    `plain`: only graphs that can be sharded over ranks, with the sharding that models give their weights.
    """

    def __init__(self, seed: int, plain: bool = False) -> None:
        self.rng = np.random.default_rng(seed)
        self.plain = plain
        self.arrays: dict[str, np.ndarray] = {}

    def program(self) -> Program:
        return record(self._model)

    def source(self) -> Arrays:
        return Arrays(self.arrays)

    # ---- choices and weights

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def one_of(self, *choices: Any) -> Any:
        return choices[self.rng.integers(len(choices))]

    def weight(self, rows: int, columns: int = 0, **fields: Any) -> Weight:
        name = f"w{len(self.arrays)}"
        shape = (rows, columns) if columns else (rows,)
        self.arrays[name] = self.rng.normal(size=shape) * (columns**-0.5 if columns else 0.3) + (0 if columns else 0.5)
        return Weight((Part(name, rows),), columns, **fields)

    def linear(self, x: Value, *widths: int, shard: str = "none", unit: int = 1) -> list[Value]:
        parts = [self.weight(n, x.width, shard=shard, unit=unit) for n in widths]
        weight = Weight(tuple(p for w in parts for p in w.parts), x.width, shard, unit)  # type: ignore[arg-type]
        bias = None
        if self.chance(0.4):
            biases = [self.weight(n) for n in widths]
            bias = Weight(tuple(p for w in biases for p in w.parts), 0, shard, unit)  # type: ignore[arg-type]
        return x.record(ops.Linear, sum(widths), x=x, weight=weight, bias=bias).split(*widths)

    def interleaved(self, x: Value) -> list[Value]:
        """Return queries, keys and values of one matrix that holds those of a key-value head after another."""
        shared, step = HEADS // KV_HEADS * HEAD, (HEADS // KV_HEADS + 2) * HEAD
        name = self.weight(KV_HEADS * step, x.width).name
        widths, starts = (shared, HEAD, HEAD), (0, shared, shared + HEAD)
        parts = [Part(name, KV_HEADS * n, start, run=n, step=step) for n, start in zip(widths, starts, strict=True)]
        weight = Weight(tuple(parts), x.width, "column", HEAD)
        return x.record(ops.Linear, KV_HEADS * step, x=x, weight=weight).split(*(part.rows for part in parts))

    def norm(
        self, x: Value, head_dim: int = 0, *, center: bool = False, bias: bool = False, eps: float = 1e-5,
        each: bool = False, plain: bool = False,
    ) -> Value:
        width = x.width if each else head_dim or x.width
        fields: dict[str, Any] = {"shard": "column", "unit": head_dim} if each else {}
        return x.record(
            ops.Norm, x=x, weight=None if plain else self.weight(width, **fields),
            bias=self.weight(width, **fields) if bias else None, eps=eps, center=center, head_dim=head_dim,
        )  # fmt: skip

    def any_norm(self, x: Value) -> Value:
        center = self.chance(0.4)
        bias = self.chance(0.5 if center else 0.07)  # rare: no CPU kernel supports a bias without centring
        return self.norm(x, center=center, bias=bias, eps=self.one_of(1e-5, 0.5), plain=self.chance(0.05))

    # ---- the model

    def _model(self, inputs: Inputs) -> Value:
        table = self.weight(VOCABULARY, WIDTH, table=True, shard="vocab" if self.plain else "none")
        x = inputs.ids.record(ops.Embed, WIDTH, ids=inputs.ids, table=table, scale=self.one_of(1.0, 2.0))
        if not self.plain and self.chance(0.06):  # a smaller table, whose first row stands for the ids beyond it
            ids = inputs.ids.tape.new("tokens", 1, "ids")
            inputs.ids.tape.ops.append(special.Within(out=ids, ids=inputs.ids, rows=40))
            x = x + ids.record(ops.Embed, WIDTH, ids=ids, table=self.weight(40, WIDTH, table=True))
        for layer in range(self.one_of(1, 2)):
            x = self._add(x, self._attention(self.any_norm(x), layer))
            x = self._add(x, self._mlp(self.any_norm(x)))
        if self.chance(0.7):
            x = self.any_norm(x)
        x = x.record(ops.TakeRows, rows="samples", x=x)
        return self._head(x)

    def _add(self, x: Value, y: Value) -> Value:
        if self.chance(0.1):
            y = y.record(ops.Scale, x=y, factor=-0.7)
        if self.plain:
            return x + y
        if self.chance(0.06):
            y = self._special(y)
        kind = self.one_of("sum", "sum", "swapped", "twice", "double", "view", "later", "sooner", "half")
        if kind == "twice":
            return (x + y) + y
        if kind == "double":
            return y + y
        if kind == "view":  # a part of a product
            return x + self.linear(y, WIDTH, WIDTH)[self.one_of(0, 1)]
        total = y + x if kind == "swapped" else x + y
        if kind == "later":  # a later operation reads the sum after its norm
            normed = self.any_norm(total)
            return self.linear(total, WIDTH)[0] + normed
        if kind == "sooner":
            product = self.linear(total, WIDTH)[0]
            return product + self.any_norm(total)
        if kind == "half":  # norms of parts of a sum
            return self.linear(self.any_norm(total.split(32, WIDTH - 32)[0]), WIDTH)[0]
        return total

    def _special(self, x: Value) -> Value:
        """Apply operations of single architectures to a row of WIDTH columns."""
        kind = self.one_of("clip", "weight", "sparse", "magnitude", "streams")
        if kind == "clip":
            return x.record(special.Clip, x=x, limit=0.7)
        if kind == "weight":
            return x.record(special.ScaleByWeight, x=x, weight=self.weight(self.one_of(1, WIDTH)))
        if kind == "sparse":
            return x.record(special.Sparsify, x=x, deviations=0.5)
        y, mixed, corrected = self.linear(x, self.one_of(WIDTH, 32), 4, 2)
        z = x.record(special.WithMagnitude, x=x, like=y, least=self.one_of(1e-3, 2.0))
        if kind == "magnitude":
            return z
        both = x.record(special.Beside, 2 * WIDTH, x=z, y=x)
        both = both.record(special.MixStreams, x=both, factors=mixed)
        both = both.record(special.CorrectStreams, x=both, y=x, factors=corrected)
        first, second = both.record(special.AddToOthers, x=both, y=z).split(WIDTH, WIDTH)
        return first + second

    def _latent(self, x: Value, layer: int) -> Value:
        """Attend to compressed rows: keys of 8 columns of their own and some rotated ones."""
        turned, rank, values = self.one_of(8, 16, 16, 16), 16, self.one_of(12, 16, 32, 32)
        (q,) = self.linear(x, HEADS * (8 + turned), shard="column", unit=8 + turned)
        latent, key = self.linear(x, rank, turned)
        y = q.record(
            ops.LatentAttention, HEADS * values, q=q, latent=self.norm(latent) if self.chance(0.5) else latent, key=key,
            expand=self.weight(HEADS * (8 + values), rank, shard="column", unit=8 + values), layer=layer,
            head_dim=8 + turned, value_dim=values, scale=0.3, rope=RopeTable.of(turned, 1e4, 256, None),
            interleaved=self.chance(0.5),
        )  # fmt: skip
        return self.linear(y, WIDTH, shard="row")[0]

    def _recurrent(self, x: Value, layer: int) -> Value:
        """Keep a state for each sequence: a convolution, a scan, the delta rule or a recurrent unit."""
        kind = self.one_of(self._convolution, self._scan, self._scan, self._delta, self._unit)
        return self.linear(kind(x, layer), WIDTH)[0]

    def _convolution(self, x: Value, layer: int) -> Value:
        width, taps = self.one_of(48, 42), self.one_of(2, 4)
        (y,) = self.linear(x, width)
        bias = self.weight(width) if self.chance(0.5) else None
        y = y.record(recurrence.CausalConv, x=y, weight=self.weight(width, taps), bias=bias, layer=layer)
        return y.record(ops.Act, x=y, act=self.one_of("silu", "gelu")) if self.chance(0.5) else y

    def _scan(self, x: Value, layer: int) -> Value:
        heads, width = self.one_of((4, 16), (8, 8), (40, 1))
        groups, columns = self.one_of(1, 2), self.one_of(4, 8)
        u, dt, b, c = self.linear(x, heads * width, heads, groups * columns, groups * columns)
        return u.record(
            recurrence.StateSpace, x=u, dt=dt, b=b, c=c, d=self.weight(heads), layer=layer, groups=groups,
            a_log=self.weight(heads, columns if self.chance(0.5) else 0),
            dt_bias=self.weight(heads) if self.chance(0.5) else None, limits=self.one_of((0.0, np.inf), (0.3, 0.9)),
        )  # fmt: skip

    def _delta(self, x: Value, layer: int) -> Value:
        shared, heads, values = self.one_of((2, 4, 16), (2, 2, 32), (4, 4, 12))
        by_column = HEAD if self.chance(0.5) else 1
        v, q, k, a, b = self.linear(x, heads * values, shared * HEAD, shared * HEAD, heads * by_column, heads)
        return v.record(
            recurrence.DeltaRule, v=v, q=q, k=k, a=a, b=b, a_log=self.weight(heads),
            dt_bias=self.weight(heads * by_column), head_dim=HEAD, rate=self.one_of(1.0, 2.0), layer=layer,
        )  # fmt: skip

    def _unit(self, x: Value, layer: int) -> Value:
        heads, columns = self.one_of((2, 32), (3, 16))
        width = heads * columns
        (y,) = self.linear(x, width)
        gates = [tuple(self.weight(columns, columns) for _ in range(heads)) for _ in range(2)]
        return y.record(
            recurrence.RgLru, x=y, input_gate=gates[0], input_bias=self.weight(heads, columns), a=self.weight(width),
            recurrence_gate=gates[1], recurrence_bias=self.weight(heads, columns), layer=layer,
        )  # fmt: skip

    def _attention(self, x: Value, layer: int) -> Value:
        if self.chance(0.08):
            return self._latent(x, layer)
        if self.chance(0.12):
            return self._recurrent(x, layer)
        if self.chance(0.2):
            q, k, v = self.interleaved(x)
        else:
            q, k, v = self.linear(x, HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD, shard="column", unit=HEAD)
        extra, raw = None, (q, k)
        if self.chance(0.8):
            q, k = self._heads(q, k)
        if self.chance(0.8):
            q, k = self._rotated(q, k)
        if self.chance(0.05):
            q = q.record(special.ScaleByPosition, x=q, beta=0.4, length=3, offset=self.one_of(0, 1))
        reads = "nothing" if self.plain else self.one_of("nothing", "nothing", "nothing", "before", "after", "raw")
        if reads == "before":  # another operation reads the value that a fusion would remove
            (extra,) = self.linear(self.one_of(q, k), WIDTH)
        y = x.record(
            ops.Attention, HEADS * HEAD, q=q, k=k, v=v, layer=layer, head_dim=HEAD, scale=HEAD**-0.5,
            window=self.one_of(0, 5), softcap=self.one_of(0.0, 3.0),
            alibi=(0.5, 0.03, 1.0, 0.2) if self.chance(0.15) else (),
            sinks=self.weight(HEADS, shard="column") if self.chance(0.06) else None,
            rope=RopeTable.of(HEAD, 100.0, 256, None) if self.chance(0.15) else None,
            chunk=4 if self.chance(0.03) else 0,
        )  # fmt: skip
        if self.chance(0.1):  # a layer that uses the cache of another
            fields = vars(x.tape.ops[-1]) | {"q": self.linear(x, HEADS * HEAD, shard="column", unit=HEAD)[0]}
            y = y + y.record(ops.Attention, **{name: field for name, field in fields.items() if name != "out"})
        (out,) = self.linear(y, WIDTH, shard="row")
        if reads in ("after", "raw"):
            (extra,) = self.linear(self.one_of(*(raw if reads == "raw" else (q, k))), WIDTH)
        return out if extra is None else out + extra

    def _heads(self, q: Value, k: Value) -> tuple[Value, Value]:
        """Apply equal or slightly different norms to heads, to queries only, or to whole rows."""
        kind = self.one_of("alike", "alike", "eps", "center", "bias", "q", "rows", "small", "halves", "each", "none")
        if kind == "none":  # no weights
            return self.norm(q, HEAD, plain=True), self.norm(k, HEAD, plain=True, center=self.chance(0.5))
        if kind == "each":  # each head has a weight of its own
            center, bias = self.chance(0.5), self.chance(0.5)
            return self.norm(q, HEAD, center=center, each=True), self.norm(k, HEAD, center=center, bias=bias, each=True)
        if kind == "alike":
            return self.norm(q, HEAD), self.norm(k, HEAD)
        if kind == "eps":
            return self.norm(q, HEAD), self.norm(k, HEAD, eps=0.5)
        if kind == "center":
            return self.norm(q, HEAD, center=True), self.norm(k, HEAD, center=True)
        if kind == "bias":
            return self.norm(q, HEAD, bias=True), self.norm(k, HEAD, bias=True)
        if kind == "q":
            return self.norm(q, HEAD), k
        if kind == "rows":
            return self.norm(q), self.norm(k)
        if kind == "small":
            return self.norm(q, HEAD // 2), self.norm(k, HEAD // 2)
        return self.norm(q, HEAD), self.norm(k, HEAD // 2)

    def _rotated(self, q: Value, k: Value) -> tuple[Value, Value]:
        """Apply equal or different rotations, to queries only, or to parts of heads."""
        first = RopeTable.of(HEAD, 1e4, 256, None)
        pairs = RopeTable.of(self.one_of(HEAD, HEAD // 2), 1e4, 256, None, interleaved=True)
        kind = self.one_of(*["same"] * 5, "theta", "q", "part", "narrow", "pairs", "some pairs")
        tables = {
            "theta": (first, RopeTable.of(HEAD, 5e5, 256, None)),
            "part": (RopeTable.of(HEAD // 2, 1e4, 256, None), first),
            "pairs": (pairs, pairs),
            "some pairs": (first, pairs),
        }
        width = HEAD // 2 if kind == "narrow" else HEAD
        if kind == "narrow":
            first = RopeTable.of(HEAD // 2, 1e4, 256, None)
        of_q, of_k = tables.get(kind, (first, first))
        rotated = q.record(ops.Rope, x=q, rope=of_q, head_dim=width)
        return rotated, k if kind == "q" else k.record(ops.Rope, x=k, rope=of_k, head_dim=width)

    def _experts(self, x: Value) -> Value:
        """Route rows to experts, with or without each attribute of the two operations."""
        count, top_k, inner = 4, self.one_of(1, 2, 3), 32
        ids, factors = (x.tape.new(x.spec.rows, top_k, kind) for kind in ("ids", "float"))
        grouped = top_k < 3 and self.chance(0.3)
        x.tape.ops.append(
            ops.Route(
                out=ids, factors=factors, x=x, weight=self.weight(count, WIDTH), top_k=top_k,
                bias=self.weight(count) if self.chance(0.3) else None,
                correction=self.weight(count) if self.chance(0.3) else None,
                score=self.one_of("softmax", "softmax", "sigmoid", "sparsemixer"), margin=0.3,
                groups=2 if grouped else 1, group_best=self.one_of(1, 2), renormalize=self.chance(0.5),
                least_sum=self.one_of(0.0, 0.0, 2.0), scale=self.one_of(1.0, 2.5),
            )
        )  # fmt: skip

        if self.chance(0.15):
            factors = factors.record(
                special.ScaleByExpert, top_k, factors=factors, ids=ids, weight=self.weight(count)
            )

        def halves(columns: int) -> Weight:
            parts = [self.weight(inner, columns).parts[0] for _ in ("gu" if gated else "u")]
            return Weight(tuple(parts), columns, "column")

        biased, gated = self.chance(0.3), self.chance(0.9)
        return x.record(
            ops.Experts, x=x, ids=ids, factors=factors, act=self.one_of("silu", "relu", "gelu"),
            gate_up=tuple(halves(WIDTH) for _ in range(count)),
            down=tuple(self.weight(WIDTH, inner, shard="row") for _ in range(count)),
            gate_up_bias=tuple(halves(0) for _ in range(count)) if biased else (),
            down_bias=tuple(self.weight(WIDTH, shard="row") for _ in range(count)) if biased else (),
            limit=self.one_of(0.0, 0.0, 0.5), up_offset=self.one_of(0.0, 0.0, 1.0), scale_inputs=self.chance(0.2),
            gated=gated,
        )  # fmt: skip

    def _mlp(self, x: Value) -> Value:
        if self.chance(0.2):
            return self._experts(x)
        act = self.one_of(*["silu", "relu", "relu2", "gelu"] * 3, "linear", "sigmoid", "quick_gelu", "gelu_new")
        if self.chance(0.3):
            (inner,) = self.linear(x, INNER, shard="column")
            if self.chance(0.15):
                y = inner.record(special.XIelu, x=inner, alpha_p=self.weight(1), alpha_n=self.weight(1))
            else:
                y = inner.record(ops.Act, x=inner, act=act)
            if not self.plain and self.chance(0.3):
                y = y + inner
        else:
            gate, up = self.linear(x, INNER, INNER, shard="column")
            if not self.plain and self.chance(0.3):
                parts = gate.split(32, 32, 32)
                gate, up = self.one_of((up, gate), (gate, gate), (parts[0], parts[1]), (parts[1], up.split(32, 64)[0]))
            y = gate.record(ops.GatedAct, gate=gate, up=up, act=act)
            if not self.plain and self.chance(0.2):
                y = y + up
        if not self.plain and self.chance(0.3):  # products of parts of a value
            parts = y.split(*[32] * (y.width // 32))
            return self.linear(parts[0], WIDTH)[0] + self.linear(parts[-1], WIDTH)[0]
        return self.linear(y, WIDTH, shard="row")[0]

    def _head(self, x: Value) -> Value:
        if self.plain:
            return self.linear(x, VOCABULARY, shard="vocab")[0]
        (y,) = self.linear(x, WIDTH)
        kind = self.one_of("plain", "before", "sum", "acted", "capped")
        if kind == "sum":
            return x + y
        if kind == "capped":
            return y.record(ops.SoftCap, x=y, cap=2.0)
        if kind == "acted":
            return y.record(ops.Act, x=y, act="relu")
        if kind == "before":  # the output is not that of the last operation: later ones must not overwrite it
            after = self.one_of("sum", "act", "product")
            if after == "sum":
                self.norm(x + y)
            elif after == "act":
                y.record(ops.Act, x=y, act="relu")
            else:
                self.linear(y, WIDTH)
        return y


def steps() -> list[list[tuple[int, list[int]]]]:
    ids = np.random.default_rng(7).integers(0, VOCABULARY, 20).tolist()
    return [[(0, ids[:9]), (1, ids[9:14])], [(0, [ids[14]]), (1, ids[15:18])]]


def logits_of(program: Program, source: Arrays) -> list[np.ndarray]:
    """Return the logits of the program as it is, without the backend's own passes."""
    backend = Driver(program, source)
    backend._interpreter = Interpreter(program)
    made = [backend.feed(rows) for rows in steps()]
    backend.close()
    return made


def same(got: list[np.ndarray], want: list[np.ndarray], most: float = 1e-4) -> bool:
    return all(np.allclose(g, w, rtol=most, atol=most) for g, w in zip(got, want, strict=True))
