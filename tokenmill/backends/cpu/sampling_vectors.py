"""Operations over a row of logits, 16 at a time: what sampling does to a whole vocabulary (see `sampling_rows.py`).

Score: a logit over a temperature, `s = x / t`. A row is `x`, an address, and has whole vectors; beyond the vocabulary
it holds minus infinity. Floats travel as words (`word`), results come as float32. Nothing here depends on the
instruction set: LLVM halves the vectors where registers are narrower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tokenmill.backends.cpu.ir import Emitter, Val, Vector, emit, f32, f32x16, i1, i8, i16, i32, i64

f64 = ir.DoubleType()
Real = Any
"""A float32 of compiled code, which type checkers do not tell from Python's float; `float` is a float64 there."""
LOWEST = np.float32(np.finfo(np.float32).min)
"""Stands for minus infinity where there must be something to subtract from."""
BLOCK_VECTORS = 4
"""Vectors of a block: the maximum of each is kept, so that most of a vocabulary is looked at once."""
STEPS = 8
"""Depths below the best score at which `masses` measures."""


def _word(typing_context: Any, x: Any) -> Any:

    def codegen(context: Any, builder: Val, signature: Any, args: Any) -> Val:
        if x == types.float64:
            return builder.bitcast(args[0], i64)
        return builder.zext(builder.bitcast(args[0], i32), i64)

    return types.int64(x), codegen


word: Callable[[Any], int] = cast("Callable[[Any], int]", intrinsic(_word))
"""(float32 or float64) -> its bits in an int64"""


def _lanes(g: Emitter, bits: Val) -> Val:
    return g.splat(g.bits(bits))


def _mask(g: Emitter, lanes: Val) -> Val:
    """16 booleans as the bits of an int64."""
    return g.b.zext(g.b.bitcast(lanes, i16), i64)


# ---- memory ----

peek_float = emit(1, lambda g, address: g.ld(f32, address), types.float32)
"""(address) -> its float32"""
poke_float = emit(2, lambda g, address, v: g.st(g.bits(v), address))
"""(address, word)"""
peek_double = emit(1, lambda g, address: g.ld(f64, address), types.float64)
"""(address) -> its float64; `poke` stores one"""
double_of = emit(1, lambda g, v: g.b.bitcast(v, f64), types.float64)
"""(word) -> the float64 that it is"""
peek_byte = emit(1, lambda g, address: g.b.zext(g.ld(i8, address), i64), types.int64)
"""(address) -> its byte"""
poke32 = emit(2, lambda g, address, v: g.st(g.b.trunc(v, i32), address))
"""(address, int64): its low half"""
lowest_bit = emit(1, lambda g, mask: g.call("llvm.cttz.i64", i64, [mask, ir.Constant(i1, 1)]), types.int64)
"""(mask, not 0) -> the number of its lowest bit"""


# ---- a row ----


def _block_maximum(g: Emitter, vectors: Val, x: Val, out: Val) -> Val:
    b, zero = g.b, ir.Constant(Vector(i1, 16), [0] * 16)

    def one(i: Val, carried: list[Val]) -> list[Val]:
        v = g.vec(x, i)
        best = b.select(b.fcmp_ordered(">", v, carried[0]), v, carried[0])
        return [best, b.or_(carried[1], b.fcmp_unordered("uge", v, g.k(f32x16, float("inf"))))]

    best, broken = g.loop(vectors, [g.k(f32x16, float(LOWEST)), zero], one)
    g.st(g.rmax(g.vmin(best, g.k(f32x16, -float(LOWEST)))), out)  # which may assume that there is no infinity
    return _mask(g, broken)


block_maximum = emit(3, _block_maximum, types.int64)
"""(vectors, x, out): stores the maximum, at least LOWEST; not 0 if there is a NaN or an infinity above."""


def _masses(g: Emitter, vectors: Val, x: Val, t: Val, best: Val, least: Val, depths: Val, out: Val) -> None:
    b = g.b
    limits = [g.splat(g.ld(f32, depths, 4 * i)) for i in range(STEPS)]
    t_, best_, least_ = _lanes(g, t), _lanes(g, best), _lanes(g, least)

    def one(i: Val, sums: list[Val]) -> list[Val]:
        below = b.fsub(best_, s := b.fdiv(g.vec(x, i), t_))
        counts, zero = b.fcmp_ordered(">=", s, least_), g.k(f32x16, 0.0)
        e = b.select(counts, g.exp(b.fneg(below)), zero)
        moment = b.select(counts, b.fmul(e, below), zero)  # 0 times infinity is no number
        within = [b.select(b.fcmp_ordered("<=", below, limit), e, zero) for limit in limits]
        return [b.fadd(total, v) for total, v in zip(sums, [e, moment, *within], strict=True)]

    sums = g.loop(vectors, [g.k(f32x16, 0.0)] * (2 + STEPS), one)
    for i, total in enumerate(sums):
        g.st(g.rsum(total), out, 4 * i)


masses = emit(7, _masses)
"""(vectors, x, t, best, least, depths, out): stores sums over s >= least: of e^(s − best), of that times best − s, and
of e^(s − best) where best − s is at most each of the STEPS depths."""


def _total(g: Emitter, vectors: Val, x: Val, t: Val, best: Val) -> Val:
    b, t_, best_ = g.b, _lanes(g, t), _lanes(g, best)
    sums = g.loop(
        vectors,
        [g.k(f32x16, 0.0)],
        lambda i, p: [b.fadd(p[0], g.exp(b.fsub(b.fdiv(g.vec(x, i), t_), best_)))],
    )
    return g.rsum(sums[0])


total = emit(4, _total, types.float32)
"""(vectors, x, t, best): the sum of e^(s − best)"""


def _reaching(g: Emitter, x: Val, t: Val, least: Val) -> Val:
    return _mask(g, g.b.fcmp_ordered(">=", g.b.fdiv(g.ld(f32x16, x), _lanes(g, t)), _lanes(g, least)))


reaching = emit(3, _reaching, types.int64)
"""(x, t, least): which of one vector's scores are at least that; never a minus infinity"""


def _between(g: Emitter, x: Val, t: Val, best: Val, low: Val, high: Val) -> Val:
    below = g.b.fsub(_lanes(g, best), g.b.fdiv(g.ld(f32x16, x), _lanes(g, t)))
    beyond, within = (g.b.fcmp_ordered(*how) for how in ((">", below, _lanes(g, low)), ("<=", below, _lanes(g, high))))
    return _mask(g, g.b.and_(beyond, within))


between = emit(5, _between, types.int64)
"""(x, t, best, low, high): of which of one vector's scores low < best − s <= high"""


def _weigh(g: Emitter, vectors: Val, scores: Val, best: Val, out: Val) -> None:
    best_ = _lanes(g, best)
    g.loop(vectors, (), lambda i, _: g.put(g.exp(g.b.fsub(g.vec(scores, i), best_)), out, i))


weigh = emit(4, _weigh)
"""(vectors, scores, best, out): e^(s − best)"""


exponential = emit(1, lambda g, x: g.first(g.exp(_lanes(g, x))), types.float32)
"""(x): e^x of one float"""


# ---- noise: backends/sampling.py defines it ----


def _mix(g: Emitter, x: Val) -> Val:
    b, ty = g.b, x.type
    x = b.xor(x, b.lshr(x, g.k(ty, 16)))
    for factor, shift in ((0x7FEB352D, 15), (0x846CA68B, 16)):
        x = b.mul(x, g.k(ty, factor))
        x = b.xor(x, b.lshr(x, g.k(ty, shift)))
    return x


def _noise_key(g: Emitter, low: Val, high: Val, position: Val) -> Val:
    b = g.b
    low, high, position = (b.trunc(v, i32) for v in (low, high, position))
    return b.zext(_mix(g, b.xor(low, _mix(g, b.xor(high, _mix(g, position))))), i64)


noise_key = emit(3, _noise_key, types.int64)
"""(low half of the seed, high half, position)"""


def _uniform_of(g: Emitter, ids: Val, key: Val, floats: Val) -> Val:
    b, ty = g.b, ids.type
    bits = _mix(g, b.add(b.mul(ids, g.k(ty, 0x9E3779B9)), key))
    drawn = b.sitofp(b.and_(bits, g.k(ty, 0x7FFFFFFF)), floats)
    return g.vmin(b.fmul(b.fadd(drawn, g.k(floats, 0.5)), g.k(floats, 2.0**-31)), g.k(floats, 1 - 2.0**-24))


def _uniform(g: Emitter, key: Val, token: Val) -> Val:
    return _uniform_of(g, g.b.trunc(token, i32), g.b.trunc(key, i32), f32)


uniform = emit(2, _uniform, types.float32)
"""(key, id): in (0, 1); the noise is −log(−log1p(−u))"""


def _contenders(g: Emitter, x: Val, first: Val, t: Val, best: Val, least: Val, key: Val, bound: Val) -> Val:
    b = g.b
    s = b.fdiv(g.ld(f32x16, x), _lanes(g, t))
    e = g.exp(b.fsub(s, _lanes(g, best)))
    ids = b.add(g.splat(b.trunc(first, i32)), g.lanes())
    u = _uniform_of(g, ids, g.splat(b.trunc(key, i32)), f32x16)
    may = b.fcmp_ordered(">=", e, b.fmul(_lanes(g, bound), u))
    return _mask(g, b.and_(may, b.fcmp_ordered(">=", s, _lanes(g, least))))


contenders = emit(7, _contenders, types.int64)
"""(x, id of its first, t, best, least, key, bound): which of one vector's ids have a score of at least `least`, and may
have e^(score + noise − best) >= bound.

−log1p(−u) is at least u, so logarithms are only needed where e^(s − best) >= bound · u: for few ids of a row."""
