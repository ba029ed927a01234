"""Vector code that several kernels share: activations, and quantizing 32 columns."""

from __future__ import annotations

from functools import partial

from tokenmill.backends.cpu import layout as t
from tokenmill.backends.cpu.ir import G, V, Val, f32, i8, i32, vi


def silu(g: G, x: Val) -> Val:
    """x / (1 + e^−x)"""
    return g.b.fdiv(x, g.b.fadd(g.k(x.type, 1.0), g.exp(g.b.fneg(x))))


def gelu_tanh(g: G, x: Val) -> Val:
    """GELU by its usual approximation with tanh."""
    b, k = g.b, partial(g.k, x.type)
    inner = b.fmul(b.fmul(x, k(0.7978845608)), g.fma(b.fmul(x, x), k(0.044715), k(1.0)))
    return b.fmul(b.fmul(x, k(0.5)), b.fadd(g.tanh(inner), k(1.0)))


def erf(g: G, x: Val) -> Val:
    """The error function, to some 2e-7 (Abramowitz and Stegun 7.1.26)."""
    b, k = g.b, partial(g.k, x.type)
    size = g.each_lane("fabs", x)
    u = b.fdiv(k(1.0), g.fma(size, k(0.3275911), k(1.0)))
    p = k(1.061405429)
    for term in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = g.fma(p, u, k(term))
    y = b.fsub(k(1.0), b.fmul(b.fmul(p, u), g.exp(b.fneg(b.fmul(size, size)))))
    return g.each_lane("copysign", y, x)


def gelu_erf(g: G, x: Val) -> Val:
    """x · Φ(x)"""
    b = g.b
    return b.fmul(b.fmul(x, g.k(x.type, 0.5)), b.fadd(erf(g, b.fmul(x, g.k(x.type, 0.70710678))), g.k(x.type, 1.0)))


def relu(g: G, x: Val) -> Val:
    """max(x, 0), NaN where x is"""
    zero = g.k(x.type, 0.0)
    return g.b.select(g.b.fcmp_ordered("<", x, zero), zero, x)


ACTS = {t.SILU: silu, t.GELU_TANH: gelu_tanh, t.GELU_ERF: gelu_erf, t.RELU: relu}
"""What `layout.ACTS` numbers, as code for a vector."""


_NOTHING = 1e-30  # a block whose largest is not above this is zero


def quantize_block(g: G, x0: Val, x1: Val, codes: Val, scales: Val) -> None:
    """Two vectors to 32 int8 at `codes`; their scale s and s · sum of codes, float32, at `scales`.

    One NaN makes s a NaN, and so whatever is computed with it.
    """
    b, bytes16 = g.b, V(i8, 16)
    size0, size1 = (b.and_(b.bitcast(x, vi), g.k(vi, 0x7FFFFFFF)) for x in (x0, x1))  # as integers a NaN is largest
    top_bits = g.call("llvm.vector.reduce.smax.v16i32", i32, [g.call("llvm.smax.v16i32", vi, [size0, size1])])
    top = b.bitcast(top_bits, f32)
    some = b.fcmp_unordered(">", top, g.f(_NOTHING))
    inverse = g.splat(b.select(some, b.fdiv(g.f(127.0), top), g.f(0.0)))
    r0, r1 = (g.each_lane("nearbyint", b.fmul(x, inverse)) for x in (x0, x1))
    q0, q1 = (b.fptosi(r, vi) for r in (r0, r1))
    fit, norm = (g.rsum(g.fma(r0, u0, b.fmul(r1, u1))) for u0, u1 in ((x0, x1), (r0, r1)))
    scale = b.select(some, b.fdiv(fit, norm), g.f(0.0))
    g.st(b.trunc(q0, bytes16), codes)
    g.st(b.trunc(q1, bytes16), codes, 16)
    g.st(scale, scales)
    g.st(b.fmul(scale, b.sitofp(g.rsum_int(b.add(q0, q1)), f32)), scales, 4)


