"""Code of the innermost loops of products with unquantized weights: rows of x times one panel of 16 outputs.

Invariant: columns are summed in the same order for every number of rows (see `tiles.py`). Products are computed in
float32. With bfloat16 dot products (AVX-512 BF16), bfloat16 weights are multiplied by x rounded to bfloat16 (`narrow`),
and each instruction adds two products to a float32 sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from llvmlite import ir

from tokenmill.backends.cpu.forms import PAIRS, DenseForm
from tokenmill.backends.cpu.ir import Emitter, Val, Vector, f32, f32x16, i16, i32
from tokenmill.backends.cpu.isa import Isa
from tokenmill.backends.cpu.operands import Operands, panel_parts, prefetch_distance, store


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no types
    """The LLVM type bfloat, which llvmlite lacks."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(str(self))


_BF16 = _BFloat()
_DOT = "llvm.x86.avx512bf16.dpbf16ps.512"
_ROUND = "llvm.x86.avx512bf16.cvtneps2bf16.512"


class DenseTile:
    """The code generator of a tile: `rows` rows of float32 by one panel of a dense form.

    Each row has two sums, for even and odd columns.
    """

    def __init__(self, g: Emitter, isa: Isa, form: DenseForm, rows: int, o: Operands) -> None:
        self.g, self.isa, self.form, self.rows, self.o = g, isa, form, rows, o
        self.floats = Vector(f32, isa.lanes)
        self.xs = [g.at(o.x, g.b.mul(o.x_stride, g.c(r))) for r in range(rows)]
        self.ahead = prefetch_distance(g, rows, g.b.mul(o.columns, g.c(form.size)))

    def write(self) -> None:
        """Emit the tile: four columns at a time, then the remaining columns."""
        g, b, o, lanes, rows = self.g, self.g.b, self.o, self.isa.lanes, self.rows
        fours = b.lshr(o.columns, g.c(2))
        done = b.shl(fours, g.c(2))
        for parts in panel_parts(lanes, rows, 2 if lanes == 4 or rows == 2 else 1):
            acc = [g.k(self.floats, 0.0)] * (2 * rows * len(parts))
            acc = g.loop(fours, acc, partial(self._columns, parts, g.c(0), 4))
            acc = g.loop(b.sub(o.columns, done), acc, partial(self._columns, parts, done, 1))
            for n, part in enumerate(parts):
                mine = acc[2 * rows * n : 2 * rows * (n + 1)]
                store(g, o, [b.fadd(mine[2 * r], mine[2 * r + 1]) for r in range(rows)], 4 * lanes * part)

    def _columns(self, parts: Sequence[int], start: Val, count: int, i: Val, acc: list[Val]) -> list[Val]:
        """Emit the addition of the i-th group of `count` columns from `start` on."""
        g, b, rows = self.g, self.g.b, self.rows
        new, column = list(acc), b.add(start, b.mul(i, g.c(count)))
        weight = g.at(self.o.weight, b.mul(column, g.c(self.form.size)))
        offset = b.shl(column, g.c(2))
        for u in range(count):
            if parts[0] == 0:
                g.prefetch(weight, g.at(self.ahead, self.form.size * u))
            for n, part in enumerate(parts):
                place = self.form.size * u + self.form.item * self.isa.lanes * part
                w = load_floats(g, self.form, weight, place, self.isa.lanes)
                for r in range(rows):
                    x = g.splat(g.ld(f32, g.at(self.xs[r], offset), 4 * u), self.isa.lanes)
                    at = 2 * rows * n + 2 * r + u % 2
                    new[at] = g.fma(w, x, new[at])
        return new


class PairTile:
    """The code generator of a tile: `rows` rows of x in bfloat16 by one panel of bfloat16 pairs.

    Each row has two sums, for even and odd pairs: the latency of a dot product exceeds the time to multiply eight rows.
    """

    def __init__(self, g: Emitter, rows: int, o: Operands) -> None:
        self.g, self.rows, self.o = g, rows, o
        self.xs = [g.at(o.x, g.b.mul(o.x_stride, g.c(r))) for r in range(rows)]
        self.pairs = g.b.lshr(g.b.add(o.columns, g.c(1)), g.c(1))
        self.ahead = prefetch_distance(g, rows, g.b.mul(self.pairs, g.c(PAIRS.group_size)))

    def write(self) -> None:
        """Emit the tile: four pairs at a time, then the remaining pairs."""
        g, b, rows, pairs = self.g, self.g.b, self.rows, self.pairs
        fours = b.lshr(pairs, g.c(2))
        done = b.shl(fours, g.c(2))
        acc = g.loop(fours, [g.k(f32x16, 0.0)] * (2 * rows), partial(self._pairs, g.c(0), 4))
        acc = g.loop(b.sub(pairs, done), acc, partial(self._pairs, done, 1))
        store(g, self.o, [b.fadd(acc[2 * r], acc[2 * r + 1]) for r in range(rows)], 0)

    def _pairs(self, start: Val, count: int, i: Val, acc: list[Val]) -> list[Val]:
        """Emit the addition of the i-th group of `count` pairs from `start` on."""
        g, b, numbers = self.g, self.g.b, Vector(_BF16, 32)
        new, pair = list(acc), b.add(start, b.mul(i, g.c(count)))
        weight, offset = g.at(self.o.weight, b.mul(pair, g.c(PAIRS.group_size))), b.shl(pair, g.c(2))
        for u in range(count):
            g.prefetch(weight, g.at(self.ahead, PAIRS.group_size * u))
            w = g.ld(numbers, weight, PAIRS.group_size * u)
            for r in range(self.rows):
                two = g.splat(g.ld(i32, g.at(self.xs[r], offset), 4 * u))
                at = 2 * r + u % 2
                new[at] = g.call(_DOT, f32x16, [new[at], w, b.bitcast(two, numbers)])
        return new


def narrow(g: Emitter, columns: Val, x: Val, out: Val) -> None:
    """Emit the conversion of a float32 row to bfloat16, with a trailing zero. For `ir.emit`.

    Rounding is to nearest, ties to even. Nothing beyond the row's columns is read: it may belong to another value.
    """
    b = g.b
    whole = b.lshr(columns, g.c(4))
    done = b.shl(whole, g.c(4))

    def rounded(v: Val) -> Val:
        return b.bitcast(g.call(_ROUND, Vector(_BF16, 16), [v]), Vector(i16, 16))

    def vector(i: Val, _: list[Val]) -> None:
        g.st(rounded(g.vec(x, i)), g.at(out, b.shl(i, g.c(5))))

    def number(i: Val, _: list[Val]) -> None:
        at = b.add(done, i)
        g.st(g.first(rounded(g.splat(g.ld(f32, g.at(x, b.shl(at, g.c(2))))))), g.at(out, b.shl(at, g.c(1))))

    g.loop(whole, (), vector)
    g.loop(b.sub(columns, done), (), number)
    g.st(g.k(i16, 0), g.at(out, b.shl(columns, g.c(1))))


def load_floats(g: Emitter, form: DenseForm, address: Val, offset: int, lanes: int) -> Val:
    """Load `lanes` elements of a dense form and convert them to float32."""
    b, floats = g.b, Vector(f32, lanes)
    if form.name == "f32":
        return g.ld(floats, address, offset)
    if form.name == "f16":
        return g.half(address, offset, lanes)
    ints = Vector(i32, lanes)
    return b.bitcast(b.shl(b.zext(g.ld(Vector(i16, lanes), address, offset), ints), g.k(ints, 16)), floats)
