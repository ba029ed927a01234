"""Code of the innermost loops of products with quantized weights: rows of x times one panel of 16 outputs.

Invariant: a tile sums columns in the same order for every number of rows, so products are batch-invariant. int8
activations and unsigned weight codes are multiplied in integers within a block of 32 columns, then scaled and summed in
float32. Instruction sets differ only in the integer dot product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from llvmlite import ir

from tokenmill.backends.cpu.dense_tiles import DenseTile, PairTile, load_floats
from tokenmill.backends.cpu.forms import PAIRS, PANEL, DenseForm, Form
from tokenmill.backends.cpu.ir import Emitter, Val, Vector, f16, f32, i1, i8, i16, i32, i64
from tokenmill.backends.cpu.isa import Isa
from tokenmill.backends.cpu.operands import Operands, panel_parts, prefetch_distance, store

Act = Callable[[int, int], Val]
"""(row, j) -> four int8 activations, columns [4 · j, 4 · j + 4), broadcast to every int32 lane"""


Codes = Callable[[int], Val]
"""j -> the j-th of a block's eight vectors of codes, for the outputs of one register. Codes are unpacked at each call:
all eight vectors together would fill the registers."""

_BY_BYTE = (0, 4, 1, 5, 2, 6, 3, 7)  # an order in which vectors that share bytes are adjacent

Factors = dict[tuple[int, int], Val]
"""(offset of int8 scales or lows in a block, register of the panel) -> their factor"""


def codes_at(g: Emitter, form: Form, address: Val, offset: int, size: int) -> Codes:
    """Return the unsigned codes of a block: `size` bytes of each vector, from byte `offset` on."""
    b, ty, wide = g.b, Vector(i8, size), Vector(i16, size // 2)
    if form.bits == 8:
        return lambda j: g.ld(ty, address, 64 * j + offset)

    def shifted(v: Val, left: int) -> Val:
        """Shift each byte. The caller masks the bits that come from the neighbouring byte."""
        if left == 0:
            return v
        v, by = b.bitcast(v, wide), g.k(wide, abs(left))
        return b.bitcast(b.shl(v, by) if left > 0 else b.lshr(v, by), ty)

    extra = form.bits - 4  # bits of each vector in a plane of the upper bits

    def codes(j: int) -> Val:
        raw = g.ld(ty, address, 64 * (j % 4) + offset)
        low = b.and_(shifted(raw, -4 if j >= 4 else 0), g.k(ty, 15))
        if not extra:
            return low
        per_plane = 8 // extra
        plane = g.ld(ty, address, 256 + 64 * (j // per_plane) + offset)
        upper = shifted(plane, 4 - extra * (j % per_plane))
        return b.or_(low, b.and_(upper, g.k(ty, (1 << form.bits) - 16)))

    return codes


class Dots:
    """Integer dot products of a block's codes with the activations of several rows, by instruction set."""

    def __init__(self, g: Emitter, isa: Isa, form: Form) -> None:
        self.g, self.isa, self.bits = g, isa, form.bits
        self.ints, self.bytes = Vector(i32, isa.lanes), Vector(i8, 4 * isa.lanes)
        self.signed = form.bits == 8 and isa.name in ("avx2", "neon")
        """True if 8-bit codes are converted to signed ones, so that no offset has to be subtracted."""

    def prepared(self, codes: Codes) -> Codes:
        """Convert codes to signed if needed, for `sums`."""
        return (lambda j: self.g.b.xor(codes(j), self.g.k(self.bytes, -128))) if self.signed else codes

    def sums(self, parts: Sequence[Codes], columns: Sequence[int], act: Act, rows: int) -> list[list[Val]]:
        """Emit int32 sums over the vectors `columns`, for each part of the panel and each row.

        An activation is loaded once for all parts: with short registers these loads are the bottleneck of a tile.
        """
        if self.isa.name == "avx2":
            kind = self._signed if self.signed else self._in_pairs
            return kind(parts, columns, act, rows)
        out = [[self.g.k(self.ints, 0) for _ in range(rows)] for _ in parts]
        for j in columns:
            vectors = [codes(j) for codes in parts]
            for r in range(rows):
                four = act(r, j)
                for sums, vector in zip(out, vectors, strict=True):
                    sums[r] = self._dot(sums[r], vector, four)
        return out

    def _dot(self, total: Val, codes: Val, four: Val) -> Val:
        g, b = self.g, self.g.b
        if self.isa.name == "neon":
            return g.call("llvm.aarch64.neon.sdot.v4i32.v16i8", self.ints, [total, codes, b.bitcast(four, self.bytes)])
        bits = 32 * self.isa.lanes  # VNNI, of AVX-512 or AVX
        return g.call(f"llvm.x86.avx512.vpdpbusd.{bits}", self.ints, [total, b.bitcast(codes, self.ints), four])

    def _pairs(self, codes: Val, four: Val) -> Val:
        """Emit sums of two products each, int16."""
        return self.g.call("llvm.x86.avx2.pmadd.ub.sw", Vector(i16, 16), [codes, self.g.b.bitcast(four, self.bytes)])

    def _widen(self, pairs: Val) -> Val:
        return self.g.call("llvm.x86.avx2.pmadd.wd", self.ints, [pairs, self.g.k(Vector(i16, 16), 1)])

    def _in_pairs(self, parts: Sequence[Codes], columns: Sequence[int], act: Act, rows: int) -> list[list[Val]]:
        """Emit sums for AVX2 with unsigned codes.

        A pair of products is at most 2 · 127 · (2^bits − 1), so only a few are added in int16 before widening.
        """
        b, safe = self.g.b, {4: 8, 5: 4, 6: 2}[self.bits]
        out: list[list[Val]] = [[None] * rows for _ in parts]
        for start in range(0, len(columns), safe):
            pairs: list[list[Val]] = [[None] * rows for _ in parts]
            for j in columns[start : start + safe]:
                vectors = [codes(j) for codes in parts]
                for r in range(rows):
                    four = act(r, j)
                    for sums, vector in zip(pairs, vectors, strict=True):
                        new = self._pairs(vector, four)
                        sums[r] = new if sums[r] is None else b.add(sums[r], new)
            for totals, sums in zip(out, pairs, strict=True):
                for r in range(rows):
                    new = self._widen(sums[r])
                    totals[r] = new if totals[r] is None else b.add(totals[r], new)
        return out

    def _signed(self, parts: Sequence[Codes], columns: Sequence[int], act: Act, rows: int) -> list[list[Val]]:
        """Emit sums for AVX2 with signed codes.

        They are sums of |code| · (activation with the code's sign): a pair is at most 2 · 128 · 127, which fits int16.
        """
        g, b = self.g, self.g.b
        out: list[list[Val]] = [[g.k(self.ints, 0)] * rows for _ in parts]
        for j in columns:
            vectors = [codes(j) for codes in parts]
            sizes = [g.call("llvm.abs.v32i8", self.bytes, [v, ir.Constant(i1, 0)]) for v in vectors]
            for r in range(rows):
                four = b.bitcast(act(r, j), self.bytes)
                for n, vector in enumerate(vectors):
                    flipped = g.call("llvm.x86.avx2.psign.b", self.bytes, [four, vector])
                    out[n][r] = b.add(out[n][r], self._widen(self._pairs(sizes[n], flipped)))
        return out


class BlockTile:
    """The code generator of a tile: `rows` rows of int8 by one panel of a quantized form."""

    def __init__(self, g: Emitter, isa: Isa, form: Form, rows: int, o: Operands) -> None:
        self.g, self.isa, self.form, self.rows, self.o = g, isa, form, rows, o
        self.floats, self.dots = Vector(f32, isa.lanes), Dots(g, isa, form)
        self.blocks = g.b.lshr(o.columns, g.c(5))
        self.factors: Factors = {}
        self.spilled = _on_stack(g, 8 * rows * isa.lanes) if isa.lanes == 8 and rows > 2 else None
        """Address of the sums between blocks, on the stack; None if they fit the registers with a block's integers."""

    def write(self) -> None:
        """Emit the tile. With short registers, each pass over the panel computes some of its outputs."""
        g, o, lanes = self.g, self.o, self.isa.lanes
        for parts in panel_parts(lanes, self.rows, 2 if lanes == 4 or 2 < self.rows < 8 else 1):
            zero = self._spill([g.k(self.floats, 0.0)] * (len(parts) * self.rows))
            if self.form.group == 1:
                sums = g.loop(self.blocks, zero, partial(self._block, parts, o.weight, g.c(0), {}))
            else:
                sums = g.loop(g.b.udiv(self.blocks, g.c(self.form.group)), zero, partial(self._group, parts))
            for n, part in enumerate(parts):
                store(g, o, self._sums_of(sums, n), 4 * lanes * part)

    def _spill(self, sums: list[Val], first: int = 0) -> list[Val]:
        """Keep sums between blocks: return them as carried values, or store them on the stack and return []."""
        if self.spilled is None:
            return sums
        for i, total in enumerate(sums):
            self.g.st(total, self.spilled, 4 * self.isa.lanes * (first + i))
        return []

    def _sums_of(self, carried: list[Val], n: int) -> list[Val]:
        """Return the sums of all rows for the n-th part of this pass."""
        if self.spilled is None:
            return carried[n * self.rows : (n + 1) * self.rows]
        first = n * self.rows
        return [self.g.ld(self.floats, self.spilled, 4 * self.isa.lanes * (first + r)) for r in range(self.rows)]

    def _group(self, parts: Sequence[int], i: Val, acc: list[Val]) -> list[Val]:
        """Emit blocks that share factors, or scales and lows."""
        g, form = self.g, self.form
        start = g.at(self.o.weight, g.b.mul(i, g.c(form.group_size)))
        factors = {}
        for part in parts:
            offset = 2 * self.isa.lanes * part
            scale = g.half(start, offset, self.isa.lanes)
            low = g.half(start, 2 * PANEL + offset, self.isa.lanes) if form.adds else None
            for n in range(form.halves):
                factors[form.codes + PANEL * n, part] = scale
                if low is not None:
                    factors[form.lows + PANEL * n, part] = low
        first = g.b.mul(i, g.c(form.group))
        return g.loop(g.c(form.group), acc, partial(self._block, parts, g.at(start, form.factors), first, factors))

    def _block(
        self, parts: Sequence[int], start: Val, first: Val, factors: Factors, i: Val, acc: list[Val]
    ) -> list[Val]:
        """Emit the i-th block at `start`. `first`: index within the panel of the block at `start`."""
        g, b, o = self.g, self.g.b, self.o
        weight, n = g.at(start, b.mul(i, g.c(self.form.size))), b.add(first, i)
        column, scale = (g.at(address, b.mul(n, g.c(size))) for address, size in ((o.x, 32), (o.scales, 8)))
        self.factors = factors
        if parts[0] == 0:
            self._prefetch(weight)
        xs = [g.at(column, b.mul(o.x_stride, g.c(r))) for r in range(self.rows)]
        at = [g.at(scale, b.mul(o.scales_stride, g.c(r))) for r in range(self.rows)]
        scales = [(g.ld(f32, a), g.ld(f32, a, 4)) for a in at]

        def act(r: int, j: int) -> Val:
            return g.splat(g.ld(i32, xs[r], 4 * j), self.isa.lanes)

        size = 4 * self.isa.lanes
        codes = [self.dots.prepared(codes_at(g, self.form, weight, size * part, size)) for part in parts]
        sums = [self.dots.sums(codes, columns, act, self.rows) for columns in halves_of(self.form)]
        if self.form.halves == 2:
            first_sums = self.dots.sums([lambda _: g.k(self.dots.bytes, 1)], range(4), act, self.rows)[0]
        out: list[Val] = []
        for n, part in enumerate(parts):
            old = self._sums_of(acc, n)
            if self.form.halves == 2:
                new = self._halves(weight, part, sums[0][n], sums[1][n], first_sums, scales, old)
            else:
                new = self._whole(weight, part, sums[0][n], scales, old)
            out += self._spill(new, n * self.rows)
        return out

    def _prefetch(self, weight: Val) -> None:
        """Emit prefetches of one block of the weights to be read next."""
        g = self.g
        groups = g.b.lshr(self.blocks, g.c(self.form.group.bit_length() - 1))
        ahead = prefetch_distance(g, self.rows, g.b.mul(groups, g.c(self.form.group_size)))
        for line in range(0, self.form.size, 64):
            g.prefetch(weight, g.at(ahead, line))

    def _numbers(self, weight: Val, offset: int, item: int, part: int) -> Val:
        """Load one scale or low for each output, from byte `offset` of the block on, as float32."""
        g, lanes = self.g, self.isa.lanes
        if item == 0:
            return self.factors[offset, part]
        at = offset + item * lanes * part
        if item == 1:
            codes = g.b.sext(g.ld(Vector(i8, lanes), weight, at), Vector(i32, lanes))
            return g.b.fmul(g.b.sitofp(codes, self.floats), self.factors[offset, part])
        return g.half(weight, at, lanes) if item == 2 else g.ld(self.floats, weight, at)

    def _whole(
        self, weight: Val, part: int, sums: list[Val], scales: list[tuple[Val, Val]], acc: list[Val]
    ) -> list[Val]:
        """Emit the scaled sums of a block with one scale for each output."""
        g, b, form, lanes = self.g, self.g.b, self.form, self.isa.lanes
        d = self._numbers(weight, form.codes, form.scale, part)
        low = self._numbers(weight, form.lows, form.low, part) if form.adds else None
        offset = 0 if self.dots.signed else form.offset
        out = []
        for total, (s, s_sum), old in zip(sums, scales, acc, strict=True):
            exact = b.sitofp(total, self.floats)
            if offset:
                mine = g.splat(b.fmul(s_sum, g.f(-offset)), lanes)
                new = g.fma(g.fma(exact, g.splat(s, lanes), mine), d, old)
            else:
                new = g.fma(exact, b.fmul(d, g.splat(s, lanes)), old)
            out.append(new if low is None else g.fma(low, g.splat(s_sum, lanes), new))
        return out

    def _halves(
        self,
        weight: Val,
        part: int,
        first: list[Val],
        second: list[Val],
        first_sums: list[Val],
        scales: list[tuple[Val, Val]],
        acc: list[Val],
    ) -> list[Val]:
        """Emit the scaled sums of a block with a scale, and an addend if the form has one, for each 16 columns.

        `first_sums`: sums of the first 16 activations, which the offset or the first addend is multiplied with.
        """
        g, b, form, lanes = self.g, self.g.b, self.form, self.isa.lanes
        d0, d1 = (self._numbers(weight, form.codes + PANEL * form.scale * n, form.scale, part) for n in range(2))
        if form.low:
            lows = [self._numbers(weight, form.lows + PANEL * form.low * n, form.low, part) for n in range(2)]
        out = []
        for r, (s, s_sum) in enumerate(scales):
            if form.low:
                mine = b.fmul(b.sitofp(first_sums[r], self.floats), g.splat(s, lanes))
                rest = b.fsub(g.splat(s_sum, lanes), mine)
                new = g.fma(lows[1], rest, g.fma(lows[0], mine, acc[r]))
                t0, t1 = (b.fmul(b.sitofp(total[r], self.floats), g.splat(s, lanes)) for total in (first, second))
                out.append(g.fma(t1, d1, g.fma(t0, d0, new)))
                continue
            mine = b.fmul(b.sitofp(first_sums[r], self.floats), g.splat(b.fmul(s, g.f(form.offset)), lanes))
            rest = b.fsub(g.splat(b.fmul(s_sum, g.f(form.offset)), lanes), mine)
            t0, t1 = (
                g.fma(b.sitofp(total, self.floats), g.splat(s, lanes), b.fneg(less))
                for total, less in ((first[r], mine), (second[r], rest))
            )
            out.append(g.fma(t1, d1, g.fma(t0, d0, acc[r])))
        return out


def _on_stack(g: Emitter, size: int) -> Val:
    """Allocate bytes on the stack, 64-byte aligned, valid until the function returns."""
    with g.b.goto_entry_block():
        buffer = g.b.alloca(ir.ArrayType(i8, size))
        buffer.align = 64
        return g.b.ptrtoint(buffer, i64)


def halves_of(form: Form) -> list[Sequence[int]]:
    """Return the vectors of a block, grouped by scale."""
    if form.halves == 2:
        return [range(4), range(4, 8)]
    return [range(8) if form.bits == 8 else _BY_BYTE]


def max_rows(isa: Isa, form: Form | DenseForm) -> int:
    """Return the rows of a form's largest tile. The two sums for each row of dense forms must stay in registers."""
    return isa.rows if isinstance(form, Form) or isa.lanes == 16 else min(isa.rows, 4)


def tile(isa: Isa, form: Form | DenseForm, rows: int) -> Callable[..., None]:
    """Make a generator for `ir.emit` of a tile.

    Its parameters: (columns, weight, x, stride, scales, stride, base, stride, out, stride), see `Operands`.
    """

    def write(g: Emitter, *args: Val) -> None:
        o = Operands(*args)
        if isinstance(form, Form):
            BlockTile(g, isa, form, rows, o).write()
        elif form == PAIRS:
            PairTile(g, rows, o).write()
        else:
            DenseTile(g, isa, form, rows, o).write()

    return write


def look_up(form: Form | DenseForm) -> Callable[..., None]:
    """Make a generator for `ir.emit` that dequantizes one row of a matrix to `out`, float32.

    Its parameters: (row of the matrix, columns, bytes of a panel, weight, out).
    """

    def write(g: Emitter, row: Val, columns: Val, panel: Val, weight: Val, out: Val) -> None:
        b = g.b
        lane, base = b.and_(row, g.c(15)), g.at(weight, b.mul(b.lshr(row, g.c(4)), panel))
        if isinstance(form, Form):
            g.loop(b.lshr(columns, g.c(5)), (), lambda i, _: _look_up_block(g, form, base, lane, i, out))
        else:
            g.loop(columns, (), lambda i, _: _look_up_number(g, form, base, lane, i, out))

    return write


def _look_up_number(g: Emitter, form: DenseForm, base: Val, lane: Val, i: Val, out: Val) -> None:
    b = g.b
    group, place = b.udiv(i, g.c(form.together)), b.urem(i, g.c(form.together))
    column = g.at(base, b.mul(group, g.c(form.group_size)))
    address = g.at(column, b.mul(b.add(b.mul(lane, g.c(form.together)), place), g.c(form.item)))
    g.st(g.first(load_floats(g, form, address, 0, 1)), g.at(out, b.mul(i, g.c(4))))


def _look_up_block(g: Emitter, form: Form, base: Val, lane: Val, i: Val, out: Val) -> None:
    b, four = g.b, Vector(f32, 4)
    group = g.at(base, b.mul(b.udiv(i, g.c(form.group)), g.c(form.group_size)))
    block = g.at(g.at(group, form.factors), b.mul(b.urem(i, g.c(form.group)), g.c(form.size)))

    def number(offset: int, item: int, factor: int) -> Val:
        at = b.mul(lane, g.c(item))
        if item < 2:
            shared = b.fpext(g.ld(f16, g.at(group, b.mul(lane, g.c(2))), factor), f32)
            return b.fmul(b.sitofp(g.ld(i8, g.at(block, at), offset), f32), shared) if item else shared
        value = g.ld(f16 if item == 2 else f32, g.at(block, at), offset)
        return b.fpext(value, f32) if item == 2 else value

    scales = [number(form.codes + PANEL * form.scale * n, form.scale, 0) for n in range(form.halves)]
    halves = range(form.halves if form.adds else 0)
    lows = [number(form.lows + PANEL * form.low * n, form.low, 2 * PANEL) for n in halves]
    codes = codes_at(g, form, g.at(block, b.mul(lane, g.c(4))), 0, 4)
    for j in range(8):
        exact = b.sitofp(b.sub(b.zext(codes(j), Vector(i32, 4)), g.k(Vector(i32, 4), form.offset)), four)
        half = j * form.halves // 8
        scale = g.splat(scales[half], 4)
        value = g.fma(exact, scale, g.splat(lows[half], 4)) if lows else b.fmul(exact, scale)
        g.st(value, g.at(out, b.mul(i, g.c(128))), 16 * j)
