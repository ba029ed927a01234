"""The memory layout of KV cache pages, and code to read and write them.

A page holds 16 tokens of one key-value head of one layer. Keys come first and are transposed, [head size][16], so a
vector of 16 scores needs no horizontal sums. Values follow, [16][value size]. The pages of a block's heads are
adjacent, and so are blocks. There are two forms:

* f16: float16.
* int8: codes, then a float32 scale for each of 16 keys and each of 16 values. It takes a little over half the bytes.

Invariant: pages hold only finite numbers, because pages are reused without being cleared and stale entries are
multiplied by probabilities of 0. So written numbers are clamped to ±65504, and NaN is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenmill.backends.cpu.ir import Emitter, Val, Vector, f16x16, f32, f32x16, i8, i32, i32x16
from tokenmill.backends.cpu.layout import BLOCK

KvForm = Literal["f16", "int8"]
_LARGEST = 65504.0  # the largest float16
_SCALES = 2 * BLOCK * 4


@dataclass(frozen=True, slots=True)
class Pages:
    """The layout of pages for heads of so many columns, each a multiple of 16."""

    form: KvForm
    dim: int  # columns of a key
    value_dim: int  # columns of a value

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return 2 if self.form == "f16" else 1

    @property
    def values(self) -> int:
        """Offset of the values, which is also the bytes of the keys."""
        return BLOCK * self.dim * self.item

    @property
    def key_scales(self) -> int:
        """Offset of the scales of keys in an int8 page."""
        return self.values + BLOCK * self.value_dim * self.item

    @property
    def value_scales(self) -> int:
        """Offset of the scales of values in an int8 page."""
        return self.key_scales + BLOCK * 4

    @property
    def size(self) -> int:
        """Bytes of a page, a multiple of 64."""
        return self.key_scales + (0 if self.form == "f16" else _SCALES)

    def load(self, g: Emitter, address: Val, offset: int, lanes: int) -> Val:
        """Load elements as float32, without the scales of int8. `offset` is in bytes."""
        if self.form == "f16":
            return g.half(address, offset, lanes)
        return g.b.sitofp(g.ld(Vector(i8, lanes), address, offset), Vector(f32, lanes))

    def store(self, g: Emitter, key: Val, value: Val, page: Val, token: Val) -> None:
        """Store the key and value (float32 rows) of the page's `token`th token."""
        b = g.b
        columns = g.at(page, b.mul(token, g.c(self.item)))
        row = g.at(page, g.at(b.mul(token, g.c(self.value_dim * self.item)), self.values))
        key_encoder, value_encoder = self._encoder(g, key, self.dim), self._encoder(g, value, self.value_dim)
        if self.form == "int8":
            g.st(key_encoder[1], g.at(page, b.shl(token, g.c(2))), self.key_scales)
            g.st(value_encoder[1], g.at(page, b.shl(token, g.c(2))), self.value_scales)

        def of_key(i: Val, _: list[Val]) -> None:
            k = self._encode(g, g.vec(key, i), key_encoder)
            down = g.at(columns, b.mul(i, g.c(16 * BLOCK * self.item)))
            for lane in range(16):
                g.st(b.extract_element(k, i32(lane)), down, lane * BLOCK * self.item)

        def of_value(i: Val, _: list[Val]) -> None:
            g.st(self._encode(g, g.vec(value, i), value_encoder), g.at(row, b.mul(i, g.c(16 * self.item))))

        g.loop(g.c(self.dim // 16), (), of_key)
        g.loop(g.c(self.value_dim // 16), (), of_value)

    def _encoder(self, g: Emitter, x: Val, dim: int) -> tuple[Val, Val]:
        """Return (inverse scale in all lanes, scale) of a row; (None, None) for f16."""
        if self.form == "f16":
            return None, None

        def larger(i: Val, best: list[Val]) -> list[Val]:
            return [g.vmax(best[0], g.each_lane("fabs", _clamped(g, g.vec(x, i))))]

        top = g.rmax(g.loop(g.c(dim // 16), [g.k(f32x16, 0.0)], larger)[0])
        nonzero = g.b.fcmp_ordered(">", top, g.f(0.0))
        inverse = g.b.select(nonzero, g.b.fdiv(g.f(127.0), top), g.f(0.0))
        return g.splat(inverse), g.b.fmul(top, g.f(1 / 127.0))

    def _encode(self, g: Emitter, x: Val, encoder: tuple[Val, Val]) -> Val:
        """Convert a vector to its stored form."""
        if self.form == "f16":
            return g.b.fptrunc(_clamped(g, x), f16x16)
        code = g.each_lane("nearbyint", g.b.fmul(_clamped(g, x), encoder[0]))
        return g.b.trunc(g.b.fptosi(code, i32x16), Vector(i8, 16))


def _clamped(g: Emitter, x: Val) -> Val:
    return g.vmin(g.vmax(x, g.k(f32x16, -_LARGEST)), g.k(f32x16, _LARGEST))
