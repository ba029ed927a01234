"""Tensor parallelism as a pass: from the full-size program to the program of one rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from tokenmill.errors import ArgumentError, Unsupported
from tokenmill.program import encoded, ops, special
from tokenmill.program.ops import Op
from tokenmill.program.share import Axis, Heads
from tokenmill.program.value import Inputs, Program, Tape, Value
from tokenmill.program.weight import Weight

_ONE_RANK = "Serve this model on one device: leave `--num-shard` out."


def shard(program: Program, size: int, *, whole_experts: bool = False) -> Program:
    """Return the program that each of `size` ranks runs. It is the same for all; only the weights they read differ.

    Values after a column-parallel product are narrower, up to the row-parallel product whose results are summed over
    the ranks. What cannot be divided evenly is padded with zeros, and logits of no token are left out. `whole_experts`:
    a rank has some of a layer's experts (expert parallelism), instead of a part of each. Raises Unsupported if ranks
    cannot share an operation, and ArgumentError if there are no experts, or no ranks, to be divided.
    """
    if whole_experts:
        _check_experts(program, size)
    return program if size == 1 else _Sharder(program, size, whole_experts).run()


class _Layout(NamedTuple):
    """Division of the columns of a value that ranks share, as in `Axis`."""

    unit: int = 1
    heads: Heads = (0, 0)

    def axis(self, size: int) -> Axis:
        """Return the axis of so many columns."""
        return Axis(size, *self)


class _Sharder:
    def __init__(self, program: Program, size: int, whole_experts: bool) -> None:
        self.program, self.size, self.tape, self.whole_experts = program, size, Tape(), whole_experts
        # Old buffer -> {(old start, old width): new value}. The keys are the whole buffer and the parts of a product.
        self.made: dict[int, dict[tuple[int, int], Value]] = {}
        self.shared: dict[int, _Layout] = {}  # by old buffer, of those that ranks share

    def run(self) -> Program:
        inputs = self.program.inputs
        for v in (inputs.ids, inputs.positions):
            self.made[v.buffer] = {(0, 1): self.tape.new("tokens", 1, "ids")}
        for op in self.program.ops:
            self.rewrite(op)
        sharded = Inputs(self.at(inputs.ids), self.at(inputs.positions))
        outputs = {name: self.at(value) for name, value in self.program.outputs.items()}
        return replace(self.program, ops=tuple(self.tape.ops), inputs=sharded, outputs=outputs)

    def at(self, v: Value) -> Value:
        parts = self.made[v.buffer]
        if (v.start, v.width) in parts:
            return parts[v.start, v.width]
        assert v.buffer not in self.shared, "a view across the parts of a sharded product"
        return replace(parts[0, v.spec.width], start=v.start, width=v.width)

    def layout(self, op: Op) -> _Layout | None:
        """Return the layout of the first value that an operation reads; None if ranks do not share it."""
        first = next(iter(op.reads().values()), None)
        return None if first is None else self.shared.get(first.buffer)

    def rewrite(self, op: Op) -> None:
        layout = self.layout(op)
        whole = op.whole_rows or (isinstance(op, ops.Norm) and not op.head_dim)
        if whole and any(v.buffer in self.shared for v in op.reads().values()):
            self.made[op.out.buffer] = {(0, op.out.width): self.of_shared_row(op, layout)}
        elif isinstance(op, ops.Linear):
            self.rewrite_product(op, layout)
        elif layout is None or isinstance(op, ops.Experts):
            self.record(op, self.of_whole_values(op), op.out.width)
        else:
            first = next(iter(op.reads().values()))
            made = _Layout(layout.unit * op.out.width // first.width, layout.heads)
            self.record(op, self.of_shared_values(op, layout), made.axis(op.out.width).share(self.size))
            self.shared[op.out.buffer] = made

    def record(self, op: Op, fields: dict[str, Any], width: int) -> Op:
        """Append an operation with these fields, and the collective that it needs. `width`: of its first result."""
        reads = {name: self.at(v) for name, v in op.reads().items()}
        results = {name: self.tape.new(v.spec.rows, v.width, v.spec.dtype) for name, v in op.results().items()}
        results["out"] = out = self.tape.new(op.out.spec.rows, width, op.out.spec.dtype)
        new = replace(op, **results, **reads, **fields)
        self.tape.ops.append(new)
        if new.shard in ("row", "part") or (new.shard == "vocab" and isinstance(op, ops.Embed)):
            out = out.record(ops.AllReduce, x=out)
        if new.shard == "vocab" and isinstance(op, ops.Linear):
            out = out.record(ops.Gather, op.out.width, x=out)
        self.made |= {v.buffer: {(0, v.width): results[name]} for name, v in op.results().items()}
        self.made[op.out.buffer] = {(0, op.out.width): out}
        return new

    def rewrite_product(self, op: ops.Linear, layout: _Layout | None) -> None:
        """Append a product. If ranks share its input, it is row-parallel."""
        if (layout is None) == (op.weight.shard == "row"):
            what = "product of a value that ranks share" if layout else "row-parallel product of a whole value"
            raise Unsupported(what, op.weight.name, (), _ONE_RANK)
        weights = {name: self.cut(w, layout) for name in ("weight", "bias") if (w := getattr(op, name)) is not None}
        weight = weights["weight"]
        self.record(op, weights, weight.rows)
        if weight.shard == "column":
            self.shared[op.out.buffer] = _Layout(weight.unit, weight.heads)
            self.remember_parts(op, weight)

    def remember_parts(self, op: ops.Linear, weight: Weight) -> None:
        out, old, new = self.made[op.out.buffer][0, op.out.width], 0, 0
        for part in op.weight.parts:
            n = weight.local(part)
            self.made[op.out.buffer][old, part.rows] = replace(out, start=new, width=n)
            old, new = old + part.rows, new + n

    def cut(self, w: Weight, layout: _Layout | None = None) -> Weight:
        """Return a rank's part of a weight. `layout`: of the values that it is applied to, if ranks share them."""
        if w.shard == "none":
            return w
        if layout is not None:
            return replace(w, unit=layout.unit, heads=layout.heads, ranks=self.size)
        heads = w.heads
        if w.unit > 1 and not heads[1]:
            counts = [part.rows // w.unit for part in w.parts]
            heads = max(counts), min(counts)
        if any(part.rows // w.unit not in heads for part in w.parts) and heads[1]:
            raise Unsupported("product of unequal numbers of heads that ranks share", w.name, (), _ONE_RANK)
        return replace(w, heads=heads, ranks=self.size)

    def of_whole_values(self, op: Op) -> dict[str, Any]:
        """Return the weights of an operation on values that ranks do not share."""
        if self.whole_experts and isinstance(op, ops.Experts):
            return {name: experts_of_ranks(ws, self.size) for name, ws in op.weights().items()}
        return _by_field(op, {name: tuple(map(self.cut, ws)) for name, ws in op.weights().items()})

    def of_shared_values(self, op: Op, layout: _Layout) -> dict[str, Any]:
        """Return the weights, and the slopes of ALiBi, of an operation on values that ranks share."""
        one = _Layout(1, layout.heads)
        if isinstance(op, ops.Attention):
            sinks = None if op.sinks is None else self.cut(replace(op.sinks, shard="column"), one)
            return {"sinks": sinks, "alibi": of_places(op.alibi, one.axis(len(op.alibi)), self.size)}
        if isinstance(op, encoded.EncoderAttention | encoded.DecoderAttention):
            return {"bias": self.cut(replace(op.bias, shard="row"), one)}
        if isinstance(op, ops.LatentAttention):
            return {"expand": self.cut(op.expand)}
        if isinstance(op, ops.Norm):
            return {name: self.of_heads(weight, op, layout) for name, (weight,) in op.weights().items()}
        return _by_field(op, {name: tuple(self.cut(w, layout) for w in ws) for name, ws in op.weights().items()})

    def of_heads(self, w: Weight, op: ops.Norm, layout: _Layout) -> Weight:
        """Return a rank's part of the weight or bias of a norm of each head."""
        if w.rows == op.head_dim:
            return w  # one for all heads
        if layout.unit != op.head_dim:
            raise Unsupported("norm of parts of a row that ranks share", w.name, (), _ONE_RANK)
        if len(w.parts) > 1:
            return replace(w, shard="part", heads=layout.heads, ranks=self.size)
        return self.cut(replace(w, shard="column"), layout)

    def of_shared_row(self, op: Op, layout: _Layout | None) -> Value:
        """Return the result of an operation that needs the sums of a row that ranks share."""
        old = next(iter(op.reads().values()))
        is_norm = type(op) is ops.Norm and not op.center and op.bias is None
        if layout is None or not (is_norm or isinstance(op, special.Sparsify)):
            what = "operation on the whole row of a product that ranks share"
            raise Unsupported(what, type(op).__name__, (), _ONE_RANK)
        x, axis = self.at(old), layout.axis(old.width)
        self.shared[op.out.buffer] = layout
        share = 1 / axis.repeated(self.size)  # because a head with several places counts several times
        moments = x.record(special.Moments, 2, x=x, share=share)
        moments = moments.record(ops.AllReduce, x=moments)
        if isinstance(op, special.Sparsify):
            return x.record(type(op), x=x, deviations=op.deviations, moments=moments, columns=old.width)
        assert isinstance(op, ops.Norm)
        weight = op.weight and self.cut(replace(op.weight, shard="column"), layout)
        return x.record(special.NormOfShare, x=x, moments=moments, weight=weight, eps=op.eps, columns=old.width)


def of_places(numbers: tuple[float, ...], axis: Axis, ranks: int) -> tuple[float, ...]:
    """Return a number for each place of all ranks, 0 where there is no head."""
    spans = (span for rank in range(ranks) for span in axis.spans(ranks, rank)) if numbers else ()
    return tuple(n for s in spans for n in ((0.0,) * s.size if s.empty else numbers[s.first : s.first + s.size]))


def experts_of_ranks(weights: tuple[Weight, ...], ranks: int) -> tuple[Weight, ...]:
    """Return the weights of a rank's experts: adjacent ones, as many on each rank, of which the last may be zeros."""
    count = -(-len(weights) // ranks)

    def of_place(place: int) -> Weight:
        parts = tuple(part for weight in weights[place::count] for part in weight.parts)
        return replace(weights[place], parts=parts, shard="part", unit=len(weights[place].parts), ranks=ranks)

    return tuple(map(of_place, range(count)))


def _check_experts(program: Program, size: int) -> None:
    why = "there is one rank, which has all experts" if size == 1 else ""
    if not any(isinstance(op, ops.Experts) for op in (program.whole or program).ops):  # a stage may have none
        why = "no layer of this model has experts"
    if why:
        raise ArgumentError(f"`enable_expert_parallel` is true, but {why}. Leave the option out.")


def _by_field(op: Op, weights: dict[str, tuple[Weight, ...]]) -> dict[str, Any]:
    """Return weights as the fields of an operation have them: one, or a tuple."""
    return {name: ws[0] if isinstance(getattr(op, name), Weight) else ws for name, ws in weights.items()}
