"""Tensor parallelism as a pass: from the full-size program to the program of one rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tokenmill.errors import ArgumentError, Unsupported
from tokenmill.program import ops, special
from tokenmill.program.encoded import encodes
from tokenmill.program.ops import Op, Weight
from tokenmill.program.value import Inputs, Program, Tape, Value

_ONE_RANK = "Serve this model on one device: leave `--num-shard` out."


def shard(program: Program, size: int) -> Program:
    """Return the program that each of `size` ranks runs. It is the same for all; only the weights they read differ.

    Values after a column-parallel product are narrower, up to the row-parallel product whose results are summed over
    the ranks. A vocabulary that is not divisible by `size` is replicated on every rank. ArgumentError if heads or inner
    sizes are not divisible, Unsupported if ranks cannot share an operation.
    """
    if size > 1 and encodes(program):
        raise Unsupported("model that is an encoder and a decoder", f"of {size} ranks", (), _ONE_RANK)
    return program if size == 1 else _Sharder(program, size).run()


class _Sharder:
    def __init__(self, program: Program, size: int) -> None:
        self.program, self.size, self.tape = program, size, Tape()
        # Old buffer -> {(old start, old width): new value}. The keys are the whole buffer and the parts of a product.
        self.made: dict[int, dict[tuple[int, int], Value]] = {}
        self.units: dict[int, int] = {}  # by old buffer: columns that ranks must not separate

    def run(self) -> Program:
        inputs = self.program.inputs
        for v in (inputs.ids, inputs.positions):
            self.made[v.buffer] = {(0, 1): self.tape.new("tokens", 1, "ids")}
        for op in self.program.ops:
            self.rewrite(op)
        sharded = Inputs(self.at(inputs.ids), self.at(inputs.positions))
        outputs = {name: self.at(value) for name, value in self.program.outputs.items()}
        return Program(tuple(self.tape.ops), sharded, outputs)

    def at(self, v: Value) -> Value:
        parts = self.made[v.buffer]
        if (v.start, v.width) in parts:
            return parts[v.start, v.width]
        whole = parts[0, v.spec.width]
        assert whole.width == v.spec.width, "a view across the parts of a sharded product"
        return replace(whole, start=v.start, width=v.width)

    def cut(self, w: Weight) -> Weight:
        if w.shard == "none":
            return w
        if w.shard == "vocab" and any(part.rows % self.size for part in w.parts):
            return replace(w, shard="none")
        check_divisible(w, self.size)
        return replace(w, ranks=self.size)

    def rewrite(self, op: Op) -> None:
        reads = {name: self.at(v) for name, v in op.reads().items()}
        weights: dict[str, Any] = {name: tuple(map(self.cut, ws)) for name, ws in op.weights().items()}
        for name in weights:
            if isinstance(getattr(op, name), Weight):
                (weights[name],) = weights[name]
        first, old = next(iter(op.reads().items()))
        whole = op.whole_rows or (isinstance(op, ops.Norm) and not op.head_dim)
        if whole and any(reads[name].width != v.width for name, v in op.reads().items()):
            self.made[op.out.buffer] = {(0, op.out.width): self.of_shared_row(op, reads[first], old)}
            return
        shared = (op.head_dim or old.width, reads[first].width) if isinstance(op, ops.Norm) else ()
        if isinstance(op, ops.Norm) and op.weight is not None and weights["weight"].rows not in shared:
            raise Unsupported("norm by head of a product that ranks share", op.weight.name, (), _ONE_RANK)
        is_linear = isinstance(op, ops.Linear)
        width = weights["weight"].rows if is_linear else op.out.width * reads[first].width // old.width
        out = self.tape.new(op.out.spec.rows, width, op.out.spec.dtype)
        others = {name: v for name, v in op.results().items() if name != "out"}
        results = {name: self.tape.new(v.spec.rows, v.width, v.spec.dtype) for name, v in others.items()}
        new = replace(op, out=out, **results, **reads, **weights)
        self.tape.ops.append(new)
        kind = new.shard
        if kind == "row" or (kind == "vocab" and isinstance(op, ops.Embed)):
            out = out.record(ops.AllReduce, x=out)
        if kind == "vocab" and is_linear:
            out = out.record(ops.Gather, op.out.width, x=out)
        self.made[op.out.buffer] = {(0, op.out.width): out}
        self.made |= {v.buffer: {(0, v.width): results[name]} for name, v in others.items()}
        if kind == "column" and isinstance(op, ops.Linear):
            self.units[op.out.buffer] = op.weight.unit
            self.remember_parts(op, weights["weight"], out)

    def of_shared_row(self, op: Op, x: Value, old: Value) -> Value:
        """Return the result of an operation that needs the sums of a row that ranks share."""
        share = old.width / (x.width * self.size)  # below 1 if ranks share heads, which then count several times
        is_norm = type(op) is ops.Norm and not op.center and op.bias is None
        if not is_norm and not isinstance(op, special.Sparsify):
            what = "operation on the whole row of a product that ranks share"
            raise Unsupported(what, type(op).__name__, (), _ONE_RANK)
        moments = x.record(special.Moments, 2, x=x, share=share)
        moments = moments.record(ops.AllReduce, x=moments)
        if isinstance(op, special.Sparsify):
            return x.record(type(op), x=x, deviations=op.deviations, moments=moments, columns=old.width)
        assert isinstance(op, ops.Norm)
        weight = op.weight and self.cut(replace(op.weight, shard="column", unit=self.units.get(old.buffer, 1)))
        return x.record(special.NormOfShare, x=x, moments=moments, weight=weight, eps=op.eps, columns=old.width)

    def remember_parts(self, op: ops.Linear, weight: Weight, out: Value) -> None:
        old = new = 0
        for part in op.weight.parts:
            n = weight.local(part)
            self.made[op.out.buffer][old, part.rows] = replace(out, start=new, width=n)
            old, new = old + part.rows, new + n


def check_divisible(w: Weight, size: int) -> None:
    """Raise ArgumentError if `size` ranks cannot share `w`. Fewer heads than ranks must divide the ranks evenly."""
    if w.shard == "row":
        if w.columns and w.columns % size:
            raise _indivisible(w, w.columns, 1, size)
        return
    for part in w.parts:
        groups = part.rows // w.unit
        if groups % size and (w.unit == 1 or size % groups):
            raise _indivisible(w, groups, w.unit, size)


def _indivisible(w: Weight, n: int, unit: int, size: int) -> ArgumentError:
    what = f"{n} heads" if unit > 1 else f"{n} columns"
    fits = ", ".join(str(k) for k in range(1, 17) if n % k == 0)
    return ArgumentError(f"num-shard {size} does not divide the {what} of {w.name}. Counts that do: {fits}.")
