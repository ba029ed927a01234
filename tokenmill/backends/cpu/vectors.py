"""Vector code that several kernels share: activation functions and int8 quantization."""

from __future__ import annotations

from functools import partial

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.ir import Emitter, Val, Vector, f32, i8, i32, i32x16

_QUICK = 1.702  # factor within the sigmoid of the quick GELU


def logistic(g: Emitter, x: Val, act: Val) -> Val:
    """Emit SiLU x / (1 + e^−x), the quick GELU x / (1 + e^−1.702x) or the sigmoid, by the number `act`."""
    b, one = g.b, g.k(x.type, 1.0)
    plain, quick = (b.icmp_signed("==", act, g.c(number)) for number in (layout.SIGMOID, layout.QUICK_GELU))
    power = g.exp(b.fneg(b.fmul(x, b.select(quick, g.k(x.type, _QUICK), one))))
    return b.fdiv(b.select(plain, one, x), b.fadd(one, power))


def softplus(g: Emitter, x: Val) -> Val:
    """Emit ln(1 + e^x) as max(x, 0) + 2 · artanh(u / (2 + u)), u = e^−|x|. Relative error below 1e-6."""
    b, k = g.b, partial(g.k, x.type)
    power = g.exp(b.fneg(g.each_lane("fabs", x)))
    z = b.fdiv(power, b.fadd(power, k(2.0)))
    z2, p = b.fmul(z, z), k(1 / 15)
    for term in (13, 11, 9, 7, 5, 3, 1):
        p = g.fma(p, z2, k(1 / term))
    return g.fma(b.fmul(z, k(2.0)), p, relu(g, x))


def xielu(g: Emitter, x: Val, slopes: Val) -> Val:
    """Emit xIELU. `slopes`: a float32 for numbers above 0 in the low half, one for the others in the high half."""
    b, k = g.b, partial(g.k, x.type)
    above, below = (g.splat(g.bits(word)) for word in (slopes, b.lshr(slopes, g.c(32))))
    power = b.fsub(g.exp(g.vmin(x, k(-1e-6))), k(1.0))
    curved = b.select(b.fcmp_ordered(">", x, k(0.0)), b.fmul(b.fmul(above, x), x), b.fmul(b.fsub(power, x), below))
    return g.fma(x, k(0.5), curved)


def gelu_tanh(g: Emitter, x: Val) -> Val:
    """Emit the tanh approximation of GELU."""
    b, k = g.b, partial(g.k, x.type)
    inner = b.fmul(b.fmul(x, k(0.7978845608)), g.fma(b.fmul(x, x), k(0.044715), k(1.0)))
    return b.fmul(b.fmul(x, k(0.5)), b.fadd(g.tanh(inner), k(1.0)))


def erf(g: Emitter, x: Val) -> Val:
    """Emit the error function, absolute error about 2e-7 (Abramowitz and Stegun 7.1.26)."""
    b, k = g.b, partial(g.k, x.type)
    size = g.each_lane("fabs", x)
    u = b.fdiv(k(1.0), g.fma(size, k(0.3275911), k(1.0)))
    p = k(1.061405429)
    for term in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = g.fma(p, u, k(term))
    y = b.fsub(k(1.0), b.fmul(b.fmul(p, u), g.exp(b.fneg(b.fmul(size, size)))))
    return g.each_lane("copysign", y, x)


def gelu_erf(g: Emitter, x: Val) -> Val:
    """Emit exact GELU: x · Φ(x)."""
    b = g.b
    return b.fmul(b.fmul(x, g.k(x.type, 0.5)), b.fadd(erf(g, b.fmul(x, g.k(x.type, 0.70710678))), g.k(x.type, 1.0)))


def relu(g: Emitter, x: Val) -> Val:
    """Emit ReLU: max(x, 0), NaN for NaN."""
    zero = g.k(x.type, 0.0)
    return g.b.select(g.b.fcmp_ordered("<", x, zero), zero, x)


def relu2(g: Emitter, x: Val) -> Val:
    """Emit the square of ReLU."""
    y = relu(g, x)
    return g.b.fmul(y, y)


ACTS = {
    layout.GELU_TANH: gelu_tanh, layout.GELU_ERF: gelu_erf, layout.RELU: relu, layout.RELU2: relu2,
}  # fmt: skip
"""Emitters of activations for one vector, by the numbers of `layout.ACTS`, besides those of `logistic`"""


_MIN_MAGNITUDE = 1e-30  # a block whose largest magnitude is not above this quantizes to zeros


def quantize_block(g: Emitter, x0: Val, x1: Val, codes: Val, scales: Val) -> None:
    """Quantize a block of 32 float32, two vectors.

    Stores 32 int8 at `codes`; the scale s and s · (sum of codes), float32, at `scales`. A NaN in the block makes s NaN,
    so it propagates to every result.
    """
    b, bytes16 = g.b, Vector(i8, 16)
    # Magnitudes are compared as integers, where a NaN is the largest.
    size0, size1 = (b.and_(b.bitcast(x, i32x16), g.k(i32x16, 0x7FFFFFFF)) for x in (x0, x1))
    top_bits = g.call("llvm.vector.reduce.smax.v16i32", i32, [g.call("llvm.smax.v16i32", i32x16, [size0, size1])])
    top = b.bitcast(top_bits, f32)
    nonzero = b.fcmp_unordered(">", top, g.f(_MIN_MAGNITUDE))
    inverse = g.splat(b.select(nonzero, b.fdiv(g.f(127.0), top), g.f(0.0)))
    r0, r1 = (g.each_lane("nearbyint", b.fmul(x, inverse)) for x in (x0, x1))
    q0, q1 = (b.fptosi(r, i32x16) for r in (r0, r1))
    fit, norm = (g.rsum(g.fma(r0, u0, b.fmul(r1, u1))) for u0, u1 in ((x0, x1), (r0, r1)))
    scale = b.select(nonzero, b.fdiv(fit, norm), g.f(0.0))
    g.st(b.trunc(q0, bytes16), codes)
    g.st(b.trunc(q1, bytes16), codes, 16)
    g.st(scale, scales)
    g.st(b.fmul(scale, b.sitofp(g.rsum_int(b.add(q0, q1)), f32)), scales, 4)
