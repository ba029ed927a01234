"""Vector operations over a row of logits, for sampling (`sampling_rows.py`).

A score is a logit divided by the temperature, `s = x / t`. `x` is the address of a row, padded with minus infinity to a
multiple of 16. Float arguments are passed as words (`word`); results are float32. The code does not depend on the
instruction set: LLVM splits vectors for narrower registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tokenmill.backends.cpu.ir import Emitter, Val, Vector, emit, f32, f32x16, i1, i16, i32, i64

f64 = ir.DoubleType()
Real = Any
"""A float32 in compiled code, where `float` is a float64. Type checkers do not distinguish the two."""
LOWEST = np.float32(np.finfo(np.float32).min)
"""A finite stand-in for minus infinity, so that differences are not NaN"""
BLOCK_VECTORS = 4
"""Vectors of a block. Block maxima are stored, so that most blocks are read only once."""
STEPS = 8
"""Number of depths below the best score at which `masses` measures"""


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
    """Pack 16 booleans into the bits of an int64."""
    return g.b.zext(g.b.bitcast(lanes, i16), i64)


# ---- memory ----

peek_float = emit(1, lambda g, address: g.ld(f32, address), types.float32)
"""(address) -> its float32"""
poke_float = emit(2, lambda g, address, v: g.st(g.bits(v), address))
"""(address, word): store a float32"""
peek_double = emit(1, lambda g, address: g.ld(f64, address), types.float64)
"""(address) -> its float64; `poke` stores one"""
double_of = emit(1, lambda g, v: g.b.bitcast(v, f64), types.float64)
"""(word) -> the float64 with these bits"""
poke32 = emit(2, lambda g, address, v: g.st(g.b.trunc(v, i32), address))
"""(address, int64): store its low half"""
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
    g.st(g.rmax(g.vmin(best, g.k(f32x16, -float(LOWEST)))), out)  # rmax requires finite lanes
    return _mask(g, broken)


block_maximum = emit(3, _block_maximum, types.int64)
"""(vectors, x, out): store the maximum, at least LOWEST. Not 0 if an element is NaN or plus infinity."""


def _masses(g: Emitter, vectors: Val, x: Val, t: Val, best: Val, least: Val, depths: Val, out: Val) -> None:
    b = g.b
    limits = [g.splat(g.ld(f32, depths, 4 * i)) for i in range(STEPS)]
    t_, best_, least_ = _lanes(g, t), _lanes(g, best), _lanes(g, least)

    def one(i: Val, sums: list[Val]) -> list[Val]:
        below = b.fsub(best_, s := b.fdiv(g.vec(x, i), t_))
        counts, zero = b.fcmp_ordered(">=", s, least_), g.k(f32x16, 0.0)
        e = b.select(counts, g.exp(b.fneg(below)), zero)
        moment = b.select(counts, b.fmul(e, below), zero)  # 0 times infinity is NaN
        within = [b.select(b.fcmp_ordered("<=", below, limit), e, zero) for limit in limits]
        return [b.fadd(total, v) for total, v in zip(sums, [e, moment, *within], strict=True)]

    sums = g.loop(vectors, [g.k(f32x16, 0.0)] * (2 + STEPS), one)
    for i, total in enumerate(sums):
        g.st(g.rsum(total), out, 4 * i)


masses = emit(7, _masses)
"""(vectors, x, t, best, least, depths, out): store sums over s >= least: of e^(s − best); of e^(s − best) · (best − s);
and, for each of the STEPS depths, of e^(s − best) where best − s is at most the depth."""


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
"""(x, t, least): bits of the scores of one vector that are at least `least`; minus infinity never is"""


def _between(g: Emitter, x: Val, t: Val, best: Val, low: Val, high: Val) -> Val:
    below = g.b.fsub(_lanes(g, best), g.b.fdiv(g.ld(f32x16, x), _lanes(g, t)))
    beyond, within = (g.b.fcmp_ordered(*how) for how in ((">", below, _lanes(g, low)), ("<=", below, _lanes(g, high))))
    return _mask(g, g.b.and_(beyond, within))


between = emit(5, _between, types.int64)
"""(x, t, best, low, high): bits of the scores of one vector with low < best − s <= high"""


def _weigh(g: Emitter, vectors: Val, scores: Val, best: Val, out: Val) -> None:
    best_ = _lanes(g, best)
    g.loop(vectors, (), lambda i, _: g.put(g.exp(g.b.fsub(g.vec(scores, i), best_)), out, i))


weigh = emit(4, _weigh)
"""(vectors, scores, best, out): e^(s − best)"""


exponential = emit(1, lambda g, x: g.first(g.exp(_lanes(g, x))), types.float32)
"""(word) -> e^x of the float32"""


# ---- noise, as defined in backends/sampling.py ----


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
"""(low half of the seed, high half, position) -> key of the noise at this position"""


def _uniform_of(g: Emitter, ids: Val, key: Val, floats: Val) -> Val:
    b, ty = g.b, ids.type
    bits = _mix(g, b.add(b.mul(ids, g.k(ty, 0x9E3779B9)), key))
    drawn = b.sitofp(b.and_(bits, g.k(ty, 0x7FFFFFFF)), floats)
    return g.vmin(b.fmul(b.fadd(drawn, g.k(floats, 0.5)), g.k(floats, 2.0**-31)), g.k(floats, 1 - 2.0**-24))


def _uniform(g: Emitter, key: Val, token: Val) -> Val:
    return _uniform_of(g, g.b.trunc(token, i32), g.b.trunc(key, i32), f32)


uniform = emit(2, _uniform, types.float32)
"""(key, id) -> u, uniform in (0, 1); the noise is −log(−log1p(−u))"""


def _contenders(g: Emitter, x: Val, first: Val, t: Val, best: Val, least: Val, key: Val, bound: Val) -> Val:
    b = g.b
    s = b.fdiv(g.ld(f32x16, x), _lanes(g, t))
    e = g.exp(b.fsub(s, _lanes(g, best)))
    ids = b.add(g.splat(b.trunc(first, i32)), g.lanes())
    u = _uniform_of(g, ids, g.splat(b.trunc(key, i32)), f32x16)
    may = b.fcmp_ordered(">=", e, b.fmul(_lanes(g, bound), u))
    return _mask(g, b.and_(may, b.fcmp_ordered(">=", s, _lanes(g, least))))


contenders = emit(7, _contenders, types.int64)
"""(x, first id, t, best, least, key, bound): bits of the ids of one vector whose score is at least `least` and
for which e^(score + noise − best) >= bound is possible.

−log1p(−u) is at least u, so only ids with e^(s − best) >= bound · u need a logarithm: few ids of a row."""
