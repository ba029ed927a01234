"""Code of attention's inner loops: several (query row, head) pairs at once against the pages of a sequence.

Scores go to scratch, then softmax, then probabilities times values, so no partial sums are rescaled. All pairs of a
tile share each load of a key or a value. Pages are prefetched. Invariant: the result of a pair does not depend on the
other pairs or the size of its tile, nor on masked positions, which add exact zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llvmlite import ir

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.ir import Emitter, Val, Vector, f32, f32x16, i32, i64
from tokenmill.backends.cpu.isa import Isa
from tokenmill.backends.cpu.pages import KvForm, Pages
from tokenmill.backends.cpu.rows import capped

PAGES_AHEAD = 4  # prefetch distance in pages, chosen for a core's share of the memory bandwidth
PAIR_BYTES = 64
QUERY, OUTPUT, SCORES, END, BEGIN, TOP, INVERSE, SLOPE = range(0, 64, 8)
SINK = SLOPE + 4
"""A pair's words: addresses of query, output, scores; visible keys [BEGIN, END); largest score, 1 / sum, slope, sink.
Slope and sink are float32 and share a word."""
BIAS = SLOPE
"""Instead of slope and sink: the address that is as far before a key's bias as the key is from the cache's beginning"""
Span = Literal["", "input", "answer", "cross"]
"""What a row attends to: "" its sequence so far; "input" the whole of an encoder's input, with a bias by distance;
"answer" the tokens of the decoder so far, with a bias; "cross" the input, as the decoder does."""
_HIDDEN = -1e30  # score of a masked key
_MIN_EXPONENT = -80.0  # e^x counts as 0 below this x


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape that attention kernels are compiled for."""

    form: KvForm
    dim: int  # a multiple of 16
    group: int  # query heads of a key-value head, or that share a work item
    capped: bool = False
    alibi: bool = False
    sinks: bool = False
    latent: int = 0  # columns of a value, the first ones of the key; all heads share a page. 0: as wide as the key
    span: Span = ""

    @property
    def name(self) -> str:
        """The shape as a part of the kernels' names."""
        extras = "".join(f"_{name}" for name in ("capped", "alibi", "sinks") if getattr(self, name))
        extras += f"_latent{self.latent}" if self.latent else ""
        extras += f"_{self.span}" if self.span else ""
        return f"{self.form}_{self.dim}x{self.group}{extras}"

    @property
    def kernels(self) -> tuple[str, str]:
        """Names of the kernels, in the order of execution."""
        return f"write_{self.name}", f"attend_{self.name}"

    @property
    def pages(self) -> Pages:
        """The layout of cache pages."""
        return Pages(self.form, self.dim, self.value_dim)

    @property
    def value_dim(self) -> int:
        """Columns of a value."""
        return self.latent or self.dim

    @property
    def biased(self) -> bool:
        """True if scores have a bias by the distance of key and query."""
        return self.span in ("input", "answer")

    @property
    def writes_first(self) -> bool:
        """True if keys and values are never written by the kernel that attends."""
        return self.latent > 0 or self.span == "cross"

    @property
    def step(self) -> int:
        """Bytes from the page of a head to that of the next one."""
        return 0 if self.latent else self.pages.size

    @property
    def item_rows(self) -> int:
        """Query rows of an item: as many as fill the registers together with their heads."""
        return max(1, layout.SCORE_ROWS // self.group)

    def tiles(self, isa: Isa) -> tuple[int, int]:
        """Return the pairs of the tile for full items and of the tile for fewer rows."""
        most = layout.SCORE_ROWS if isa.lanes != 8 else 6  # more sums do not fit the registers

        return _even(self.group * self.item_rows, most), _even(self.group, most)

    def scored(self, isa: Isa, pairs: int) -> int:
        """Return the pairs whose scores are computed together.

        With few registers, fewer pairs of two pages at once are faster.
        """
        return _even(pairs, 3 if isa.lanes == 8 else pairs)


def _even(pairs: int, most: int) -> int:
    """Return the pairs of each piece if `pairs` is cut into the fewest pieces of at most `most`."""
    return -(-pairs // -(-pairs // most))


def _larger(g: Emitter, a: Val, b: Val) -> Val:
    """Emit the maximum; b if a is NaN. It takes one instruction where maxnum takes three."""
    return g.b.select(g.b.fcmp_ordered(">", a, b), a, b)


class Tile:
    """The code generator for a tile of `pairs` pairs. Methods take (p0, n, table, kv, stride, pair, …).

    They process pages [p0, p0 + n). `table`: block table; `kv`: the head's page of block 0; `stride`: bytes from page
    to page; `pair`: the words of the first pair. All but p0 and n are addresses or bytes.
    """

    def __init__(self, isa: Isa, heads: Heads, pairs: int) -> None:
        self.heads, self.pages, self.pairs, self.lanes = heads, heads.pages, pairs, isa.lanes
        self.parts = 16 // isa.lanes
        registers = 31 if isa.lanes != 8 else 15
        widest = max(1, (registers - 1) // (pairs + 1))
        self.two_pages = 4 * pairs + 3 <= registers  # a loaded query element then serves two pages
        # output vectors computed in one pass over the values
        self.wide = min(1 << (widest.bit_length() - 1), heads.value_dim // isa.lanes)

    def _page(self, g: Emitter, p0: Val, table: Val, kv: Val, stride: Val) -> Callable[[Val], Val]:
        """Return a function that emits the address of page p0 + i."""

        def at(i: Val) -> Val:
            block = g.ld(i32, g.at(table, g.b.shl(g.at(p0, i), g.c(2))))
            return g.at(kv, g.b.mul(g.b.sext(block, i64), stride))

        return at

    def _ahead(self, g: Emitter, i: Val, n: Val, page: Callable[[Val], Val], then: int = 0) -> Val:
        """Emit the address to prefetch at page i: page i + PAGES_AHEAD.

        Beyond the last page it is `then` bytes into an early page, or the last page if `then` is 0.
        """
        b, j = g.b, g.at(i, PAGES_AHEAD)
        more, last = b.icmp_signed("<", j, n), g.at(n, -1)
        behind = b.sub(j, n) if then else last
        behind = b.select(b.icmp_signed("<", behind, n), behind, last)
        return g.at(page(b.select(more, j, behind)), b.select(more, g.c(0), g.c(then)))

    def begin(self, g: Emitter, p0: Val, n: Val, table: Val, kv: Val, stride: Val) -> None:
        """Emit prefetches of the first keys."""
        page, more = self._page(g, p0, table, kv, stride), g.b.icmp_signed("<", n, g.c(PAGES_AHEAD))

        def one(i: Val, _: list[Val]) -> None:
            here = page(i)
            g.loop(g.c(self.pages.values // 64), (), lambda j, _: g.prefetch(here, g.b.shl(j, g.c(6))))
            self._scales(g, here)

        g.loop(g.b.select(more, n, g.c(PAGES_AHEAD)), (), one)

    def _scales(self, g: Emitter, page: Val) -> None:
        """Emit prefetches of a page's scales."""
        if self.heads.form == "int8":
            g.prefetch(page, self.pages.key_scales)
            g.prefetch(page, self.pages.value_scales)

    def _words(self, g: Emitter, pair: Val, word: int, ty: Val = i64) -> list[Val]:
        return [g.ld(ty, pair, PAIR_BYTES * r + word) for r in range(self.pairs)]

    def scores(
        self, g: Emitter, p0: Val, n: Val, table: Val, kv: Val, stride: Val, pair: Val, factor: Val, cap: Val
    ) -> None:
        """Emit the scores of all pairs and the largest score of each pair. `factor`, `cap`: bits of float32."""
        page = self._page(g, p0, table, kv, stride)
        hidden = g.k(Vector(f32, self.lanes), _HIDDEN)
        finish = self._finisher(g, p0, pair, factor, cap)

        def scores_of(first: Val, count: int, best: list[Val]) -> list[Val]:
            """Emit the scores of `count` pages from `first` on. Returns the largest scores so far, by part and pair."""
            page_indices = [g.at(first, k) for k in range(count)]
            here = [page(i) for i in page_indices]
            ahead = [self._ahead(g, i, n, page, self.pages.values) for i in page_indices]
            for i in page_indices:
                self._scales(
                    g, page(g.b.select(g.b.icmp_signed("<", g.at(i, PAGES_AHEAD), n), g.at(i, PAGES_AHEAD), i))
                )
            best = list(best)
            for part in range(self.parts):
                sums = self._products(g, here, self._words(g, pair, QUERY), part, ahead)
                for k in range(count):
                    for r, s in enumerate(finish(page_indices[k], here[k], part, sums[k])):
                        best[part * self.pairs + r] = _larger(g, s, best[part * self.pairs + r])
            return best

        best = [hidden] * (self.pairs * self.parts)
        if self.two_pages:
            best = g.loop(g.b.lshr(n, g.c(1)), best, lambda i, best: scores_of(g.b.shl(i, g.c(1)), 2, best))
        rest = g.b.and_(n, g.c(1)) if self.two_pages else n
        best = g.loop(rest, best, lambda i, best: scores_of(g.at(i, g.b.sub(n, rest)), 1, best))
        for r in range(self.pairs):
            top = best[r]
            for part in range(1, self.parts):
                top = _larger(g, top, best[part * self.pairs + r])
            g.st(g.rmax(top), pair, PAIR_BYTES * r + TOP)

    def _finisher(self, g: Emitter, p0: Val, pair: Val, factor: Val, cap: Val) -> Callable[..., list[Val]]:
        """Return a function (page index, address, part, sums) that scales, masks and stores the scores of a part."""
        ends, begins = ([g.b.trunc(w, i32) for w in self._words(g, pair, word)] for word in (END, BEGIN))
        scores, scale = self._words(g, pair, SCORES), g.splat(g.bits(factor), self.lanes)
        floats, ints = Vector(f32, self.lanes), Vector(i32, self.lanes)
        slopes = self._words(g, pair, SLOPE, f32) if self.heads.alibi else []
        biases = self._words(g, pair, BIAS) if self.heads.biased else []

        def finish(i: Val, here: Val, part: int, sums: list[Val]) -> list[Val]:
            b, out = g.b, []
            position = b.trunc(b.shl(g.at(p0, i), g.c(4)), i32)
            lane = ir.Constant(ints, list(range(part * self.lanes, (part + 1) * self.lanes)))
            positions, by = b.add(g.splat(position, self.lanes), lane), scale
            if self.heads.form == "int8":
                by = b.fmul(by, g.ld(floats, here, self.pages.key_scales + 4 * part * self.lanes))
            for r in range(self.pairs):
                end, begin = (g.splat(w[r], self.lanes) for w in (ends, begins))
                seen = b.and_(b.icmp_signed("<", positions, end), b.icmp_signed(">=", positions, begin))
                s = b.fmul(sums[r], by)
                s = capped(g, s, g.splat(g.bits(cap), self.lanes)) if self.heads.capped else s
                if self.heads.alibi:  # slope · (position of the key − that of the query)
                    behind = b.sitofp(b.add(b.sub(positions, end), g.k(ints, 1)), floats)
                    s = g.fma(behind, g.splat(slopes[r], self.lanes), s)
                if self.heads.biased:
                    page = g.at(biases[r], b.shl(g.at(p0, i), g.c(6)))
                    s = b.fadd(s, g.ld(floats, page, 4 * part * self.lanes))
                out.append(b.select(seen, s, g.k(floats, _HIDDEN)))
                g.st(out[-1], g.at(scores[r], b.shl(i, g.c(6))), 4 * part * self.lanes)
            return out

        return finish

    def _products(
        self, g: Emitter, pages: list[Val], queries: list[Val], part: int, ahead: list[Val]
    ) -> list[list[Val]]:
        """Emit queries times one part of the keys of some pages.

        Each pair has two sums: with one, the loop would wait for the latency of additions.
        """
        b, item, lanes, count = g.b, self.pages.item, self.lanes, len(pages)

        def four(j: Val, sums: list[Val]) -> list[Val]:
            sums, column = list(sums), b.mul(j, g.c(4 * 16 * item))
            for following in ahead if part == 0 else ():
                for line in range(item):
                    g.prefetch(g.at(following, column), 64 * line)
            for u in range(4):
                offset = (16 * u + part * lanes) * item
                keys = [self.pages.load(g, g.at(here, column), offset, lanes) for here in pages]
                for r in range(self.pairs):
                    q = g.splat(g.ld(f32, g.at(queries[r], b.shl(j, g.c(4))), 4 * u), lanes)
                    for k, key in enumerate(keys):
                        at = 2 * (self.pairs * k + r) + u % 2
                        sums[at] = g.fma(key, q, sums[at])
            return sums

        zero = g.k(Vector(f32, lanes), 0.0)
        sums = g.loop(g.c(self.heads.dim // 4), [zero] * (2 * self.pairs * count), four)
        totals = [b.fadd(sums[i], sums[i + 1]) for i in range(0, len(sums), 2)]
        return [totals[k * self.pairs : (k + 1) * self.pairs] for k in range(count)]

    def softmax(self, g: Emitter, p0: Val, n: Val, table: Val, kv: Val, stride: Val, pair: Val) -> None:
        """Emit e^(score − largest), times the scales of int8 values, and the inverse of the sum.

        A sink counts as a score, but has no value.
        """
        page = self._page(g, p0, table, kv, stride)
        scores = self._words(g, pair, SCORES)
        best = self._words(g, pair, TOP, f32)
        sinks = self._words(g, pair, SINK, f32) if self.heads.sinks else []
        best = [_larger(g, sink, top) for sink, top in zip(sinks, best, strict=True)] if sinks else best
        tops = [g.splat(top) for top in best]

        def one(i: Val, totals: list[Val]) -> list[Val]:
            b, out = g.b, []
            scale = g.ld(f32x16, page(i), self.pages.value_scales) if self.heads.form == "int8" else None
            for r in range(self.pairs):
                x = b.fsub(g.vec(scores[r], i), tops[r])
                e = b.select(b.fcmp_ordered(">", x, g.k(f32x16, _MIN_EXPONENT)), g.exp(x), g.k(f32x16, 0.0))
                g.put(e if scale is None else b.fmul(e, scale), scores[r], i)
                out.append(b.fadd(totals[r], e))
            return out

        for r, total in enumerate(g.loop(n, [g.k(f32x16, 0.0)] * self.pairs, one)):
            whole = g.rsum(total)
            if sinks:
                whole = g.b.fadd(whole, g.first(g.exp(g.splat(g.b.fsub(sinks[r], best[r])))))
            g.st(g.b.fdiv(g.f(1.0), whole), pair, PAIR_BYTES * r + INVERSE)

    def values(self, g: Emitter, p0: Val, n: Val, table: Val, kv: Val, stride: Val, pair: Val) -> None:
        """Emit probabilities times values and store the outputs."""
        page = self._page(g, p0, table, kv, stride)
        vectors = self.heads.value_dim // self.lanes

        def chunk(i: Val, _: list[Val]) -> None:
            self._columns(g, n, page, pair, g.b.mul(i, g.c(self.wide * self.lanes)), self.wide)

        g.loop(g.c(vectors // self.wide), (), chunk)
        if rest := vectors % self.wide:
            self._columns(g, n, page, pair, g.c((vectors - rest) * self.lanes), rest)

    def _columns(self, g: Emitter, n: Val, page: Callable[[Val], Val], pair: Val, column: Val, wide: int) -> None:
        """Emit `wide` vectors of the outputs from `column` on."""
        b, item, lanes = g.b, self.pages.item, self.lanes
        scores, offset = self._words(g, pair, SCORES), g.at(b.mul(column, g.c(item)), self.pages.values)

        def one(i: Val, sums: list[Val]) -> list[Val]:
            here = page(i)
            following = self._ahead(g, i, n, page)

            def token(k: Val, sums: list[Val]) -> list[Val]:
                sums, at = list(sums), g.at(b.mul(k, g.c(self.heads.value_dim * item)), offset)
                for line in range(-(-wide * lanes * item // 64)):
                    g.prefetch(g.at(following, at), 64 * line)
                loaded = [self.pages.load(g, g.at(here, at), u * lanes * item, lanes) for u in range(wide)]
                for r in range(self.pairs):
                    p = g.splat(g.ld(f32, g.at(scores[r], g.at(b.shl(i, g.c(6)), b.shl(k, g.c(2))))), lanes)
                    for u in range(wide):
                        sums[wide * r + u] = g.fma(loaded[u], p, sums[wide * r + u])
                return sums

            return g.loop(g.c(16), sums, token)

        sums = g.loop(n, [g.k(Vector(f32, lanes), 0.0)] * (wide * self.pairs), one)
        for r in range(self.pairs):
            inverse = g.splat(g.ld(f32, pair, PAIR_BYTES * r + INVERSE), lanes)
            out = g.at(g.ld(i64, pair, PAIR_BYTES * r + OUTPUT), b.shl(column, g.c(2)))
            for u in range(wide):
                g.st(b.fmul(sums[wide * r + u], inverse), out, 4 * lanes * u)
