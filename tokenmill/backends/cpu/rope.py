"""Rotary position embedding: the cosines and sines of a step, and rotation of heads.

There is no table by position. One row of the step table computes cosines and sines of the step's tokens for all layers,
so their memory does not grow with the context. The angle is position · frequency in float32, as in the reference. Its
sine and cosine are computed in float64, so they are equal on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from math import factorial, pi

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.ir import Emitter, Val, Vector, compiled, copy, emit, f32, i32, inline, kernel, peek
from tokenmill.backends.cpu.isa import Isa
from tokenmill.program.rope import RopeTable

_LANES = 8
f64x8, f32x8, i32x8 = Vector(ir.DoubleType(), _LANES), Vector(f32, _LANES), Vector(i32, _LANES)
_BELOW_HALF_PI = 6.123233995736766e-17  # π / 2 minus its float64


def cos_sin_stride(half: int) -> int:
    """Return the bytes of a row: `half` cosines and as many sines, each padded to a multiple of 16."""
    return -(-half // 16) * 128


def frequencies(table: RopeTable, max_positions: int) -> NDArray[np.float32]:
    """Return (1, n) frequencies for FREQUENCIES, or (max_positions, n) if they depend on the position.

    n is padded to a multiple of 16.
    """
    found = table.frequencies_at(np.arange(max_positions)) if table.moves else table.inverse_frequencies()[None]
    out = np.zeros((len(found), -(-found.shape[1] // 16) * 16), np.float32)
    out[:, : found.shape[1]] = found
    return out


def _double(g: Emitter, name: str, *args: Val) -> Val:
    return g.call(f"llvm.{name}.v{_LANES}f64", f64x8, args)


def _series(g: Emitter, x2: Val, terms: list[float]) -> Val:
    """Emit the polynomial in x2 with coefficients `terms`, lowest first."""
    p = g.k(f64x8, terms[-1])
    for term in reversed(terms[:-1]):
        p = _double(g, "fma", p, x2, g.k(f64x8, term))
    return p


def sine_cosine(g: Emitter, x: Val) -> tuple[Val, Val]:
    """Emit sine and cosine of 8 float64, as float32.

    For |x| up to 2^30 they are exact to the last but one bit of float32.
    """
    b = g.b

    def k(v: float) -> Val:
        return g.k(f64x8, v)

    n = _double(g, "nearbyint", b.fmul(x, k(2 / pi)))
    r = _double(g, "fma", n, k(-pi / 2), x)
    r = _double(g, "fma", n, k(-_BELOW_HALF_PI), r)  # within ±π / 4
    r2 = b.fmul(r, r)
    sine = b.fmul(r, _series(g, r2, [(-1) ** i / factorial(2 * i + 1) for i in range(7)]))
    cosine = _series(g, r2, [(-1) ** i / factorial(2 * i) for i in range(8)])
    quarter, one, two = b.fptosi(n, i32x8), g.k(i32x8, 1), g.k(i32x8, 2)

    def nonzero(v: Val) -> Val:
        return b.icmp_signed("!=", v, g.k(i32x8, 0))

    odd = nonzero(b.and_(quarter, one))
    s, c = b.select(odd, cosine, sine), b.select(odd, sine, cosine)
    s = b.select(nonzero(b.and_(quarter, two)), b.fneg(s), s)
    c = b.select(nonzero(b.and_(b.add(quarter, one), two)), b.fneg(c), c)
    return b.fptrunc(s, f32x8), b.fptrunc(c, f32x8)


def _cos_sin(g: Emitter, n: Val, position: Val, frequency: Val, magnitude: Val, cosines: Val, sines: Val) -> None:
    b, at = g.b, g.splat(g.b.sitofp(position, f32), _LANES)
    size = g.splat(g.bits(magnitude), _LANES)

    def eight(i: Val, _: list[Val]) -> None:
        offset = b.mul(i, g.c(4 * _LANES))
        angle = b.fmul(at, g.ld(f32x8, frequency, offset))
        s, c = sine_cosine(g, b.fpext(angle, f64x8))
        g.st(b.fmul(c, size), cosines, offset)
        g.st(b.fmul(s, size), sines, offset)

    g.loop(n, (), eight)


def _rotate(g: Emitter, x: Val, cos_sin: Val, half: Val) -> None:
    b = g.b
    second_half = b.shl(half, g.c(2))
    sines = b.shl(b.lshr(g.at(half, 15), g.c(4)), g.c(6))

    def rotate_pair(ty: Val, o: Val) -> None:
        c, s = g.ld(ty, cos_sin, o), g.ld(ty, cos_sin, g.at(sines, o))
        u, v = g.ld(ty, x, o), g.ld(ty, x, g.at(second_half, o))
        g.st(b.fsub(b.fmul(u, c), b.fmul(v, s)), x, o)
        g.st(b.fadd(b.fmul(u, s), b.fmul(v, c)), x, g.at(second_half, o))

    whole = b.lshr(half, g.c(3))
    g.loop(whole, (), lambda i, _: rotate_pair(f32x8, b.mul(i, g.c(32))))
    g.loop(b.and_(half, g.c(7)), (), lambda i, _: rotate_pair(f32, g.at(b.mul(whole, g.c(32)), b.mul(i, g.c(4)))))


def _rotate_pairs(g: Emitter, x: Val, cos_sin: Val, half: Val) -> None:
    b = g.b
    sines = b.shl(b.lshr(g.at(half, 15), g.c(4)), g.c(6))

    def pick(a: Val, c: Val, first: int, step: int) -> Val:
        """Emit every `step`th of the 16 elements of a and c, or alternating ones if `step` is 0."""
        order = [first + step * i if step else first + i // 2 + _LANES * (i % 2) for i in range(_LANES)]
        return b.shuffle_vector(a, c, ir.Constant(i32x8, order))

    def eight(i: Val, _: list[Val]) -> None:
        at, o = g.at(x, b.mul(i, g.c(64))), b.mul(i, g.c(32))
        low, high = g.ld(f32x8, at), g.ld(f32x8, at, 32)
        c, s = g.ld(f32x8, cos_sin, o), g.ld(f32x8, cos_sin, g.at(sines, o))
        u, v = pick(low, high, 0, 2), pick(low, high, 1, 2)
        first, second = b.fsub(b.fmul(u, c), b.fmul(v, s)), b.fadd(b.fmul(u, s), b.fmul(v, c))
        g.st(pick(first, second, 0, 0), at)
        g.st(pick(first, second, _LANES // 2, 0), at, 32)

    def one(i: Val, _: list[Val]) -> None:
        pair = g.at(b.mul(whole, g.c(8)), i)
        at, o = g.at(x, b.shl(pair, g.c(3))), b.shl(pair, g.c(2))
        c, s = g.ld(f32, cos_sin, o), g.ld(f32, cos_sin, g.at(sines, o))
        u, v = g.ld(f32, at), g.ld(f32, at, 4)
        g.st(b.fsub(b.fmul(u, c), b.fmul(v, s)), at)
        g.st(b.fadd(b.fmul(u, s), b.fmul(v, c)), at, 4)

    whole = b.lshr(half, g.c(3))
    g.loop(whole, (), eight)
    g.loop(b.and_(half, g.c(7)), (), one)


write_cos_sin = emit(6, _cos_sin)
"""(vectors of 8, position, frequencies, bits of the magnitude, cosines, sines): those of one position"""
_split = emit(3, _rotate)
_pairs = emit(3, _rotate_pairs)


@inline
def rotate(head: int, cos_sin: int, half: int, interleaved: int) -> None:
    """Rotate a head in place. `cos_sin`: cosines and sines of its row. `half`: half of the rotary columns."""
    if interleaved:
        _pairs(head, cos_sin, half)
    else:
        _split(head, cos_sin, half)


# ---- kernels ----

(_FREQUENCIES, _FREQUENCY_STRIDE, _MAGNITUDE, _HALF, _OUT, _OUT_STRIDE, _X, _X_STRIDE, _WIDTH) = (
    8 * c
    for c in (
        *(
            layout.FREQUENCIES,
            layout.FREQUENCY_STRIDE,
            layout.MAGNITUDE,
            layout.ROPE_HALF,
            layout.OUT,
            layout.OUT_STRIDE,
            layout.X,
            layout.X_STRIDE,
            layout.WIDTH,
        ),
    )
)
(_ROPE, _STRIDE, _INTERLEAVED) = (8 * c for c in (layout.ROPE, layout.ROPE_STRIDE, layout.ROPE_INTERLEAVED))
_HEAD_DIM, _HEADS = 8 * layout.HEAD_DIM, 8 * layout.HEADS
(_HEAD_BYTES, _ROTATED_BYTES, _OUT_HEAD_BYTES, _LATENT, _LATENT_STRIDE, _KEYS, _KEY_STRIDE, _VALUES, _VALUE_STRIDE) = (
    8 * c
    for c in (
        *(layout.HEAD_BYTES, layout.ROTATED_BYTES, layout.OUT_HEAD_BYTES, layout.LATENT, layout.LATENT_STRIDE),
        *(layout.KEYS, layout.KEY_STRIDE, layout.VALUES, layout.VALUE_STRIDE),
    )
)
_THREADS, _TOKENS, _POSITIONS = 8 * layout.THREADS, 8 * layout.TOKENS, 8 * layout.POSITIONS


def _cos_sin_rows(tid: int, row: int, context: int, counter: int) -> int:
    """Compute the cosines and sines of a step. The barrier of Embed, the next row of the table, serves this row too."""
    vectors = (peek(row + _HALF) + 15) // 16
    for r in range(tid, peek(context + _TOKENS), peek(context + _THREADS)):
        position = peek(peek(context + _POSITIONS) + r * 8)
        out = peek(row + _OUT) + r * peek(row + _OUT_STRIDE)
        found = peek(row + _FREQUENCIES) + position * peek(row + _FREQUENCY_STRIDE)
        write_cos_sin(2 * vectors, position, found, peek(row + _MAGNITUDE), out, out + vectors * 64)
    return 1


@inline
def copy_row(vectors: int, x: int, out: int) -> None:
    """Copy a row, unless source and destination are the same."""
    if x != out:
        copy(vectors, x, out)


def _rope_rows(tid: int, row: int, context: int, counter: int) -> int:
    """Rotate heads, for programs whose rotation is not fused into attention."""
    dim, heads = peek(row + _HEAD_DIM), peek(row + _HEADS)
    for r in range(tid, peek(context + _TOKENS), peek(context + _THREADS)):
        x, out = peek(row + _X) + r * peek(row + _X_STRIDE), peek(row + _OUT) + r * peek(row + _OUT_STRIDE)
        copy_row(heads * dim // 16, x, out)
        for h in range(heads):
            cos_sin = peek(row + _ROPE) + r * peek(row + _STRIDE)
            rotate(out + h * dim * 4, cos_sin, peek(row + _HALF), peek(row + _INTERLEAVED))
    return 0


def _latent_rows(tid: int, row: int, context: int, counter: int) -> int:
    """Write the rotated columns of queries, and the rows of the cache: each latent, then the rotated key.

    The next row of the table reads other columns of the queries, so its barrier serves this row too.
    """
    heads, head, rotated = peek(row + _WIDTH), peek(row + _HEAD_BYTES), peek(row + _ROTATED_BYTES)
    latent, size = peek(row + _OUT_HEAD_BYTES) - rotated, rotated // 64
    for r in range(tid, peek(context + _TOKENS), peek(context + _THREADS)):
        x = peek(row + _X) + r * peek(row + _X_STRIDE) + head - rotated
        out = peek(row + _OUT) + r * peek(row + _OUT_STRIDE) + latent
        kept = peek(row + _LATENT) + r * peek(row + _LATENT_STRIDE)
        copy(latent // 64, peek(row + _VALUES) + r * peek(row + _VALUE_STRIDE), kept)
        copy(size, peek(row + _KEYS) + r * peek(row + _KEY_STRIDE), kept + latent)
        for h in range(heads):
            copy(size, x + h * head, out + h * (latent + rotated))
        if peek(row + _ROPE):
            cos_sin = peek(row + _ROPE) + r * peek(row + _STRIDE)
            half, interleaved = peek(row + _HALF), peek(row + _INTERLEAVED)
            rotate(kept + latent, cos_sin, half, interleaved)
            for h in range(heads):
                rotate(out + h * (latent + rotated), cos_sin, half, interleaved)
    return 1


def kernels(isa: Isa) -> dict[str, Callable[[], Callable[..., int]]]:
    """Return makers of cos_sin, rope and latent, whose source is the same for every instruction set."""
    return {
        "cos_sin": lambda: kernel("cos_sin", compiled("rope_cos_sin_rows", _cos_sin_rows)),
        "rope": lambda: kernel("rope", compiled("rope_rope_rows", _rope_rows)),
        "latent": lambda: kernel("latent", compiled("rope_latent_rows", _latent_rows)),
    }
