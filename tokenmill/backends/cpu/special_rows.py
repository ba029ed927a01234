"""Row kernels of operations of single architectures (`program/special.py`).

Threads divide the work by rows. Invariant: the result of a row does not depend on the other rows or on the thread.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.ir import (
    Emitter,
    Val,
    copy,
    each,
    emit,
    f32,
    f32x16,
    field,
    kernels_of,
    peek,
    peek32,
)
from tokenmill.backends.cpu.isa import Isa
from tokenmill.backends.cpu.rows import add, add_scaled, in_pieces, rows_of

_THREADS, _ROW, _ROW_SIZE = (8 * word for word in (layout.THREADS, layout.ROW, layout.ROW_SIZE))
_MINUS_ONE = layout.float_bits(-1.0)


def _bounded(g: Emitter, i: Val, x: Val, limit: Val, out: Val) -> None:
    b, v, most = g.b, g.vec(x, i), g.splat(g.bits(limit))
    v = b.select(b.fcmp_ordered(">", v, most), most, v)
    g.put(b.select(b.fcmp_ordered("<", v, b.fneg(most)), b.fneg(most), v), out, i)


def _mean_square(g: Emitter, n: Val, x: Val, less: Val) -> Val:
    """Emit the mean of (x - less)², a float32, of n vectors."""

    def one(i: Val, sums: list[Val]) -> list[Val]:
        v = g.b.fsub(g.vec(x, i), less)
        return [g.fma(v, v, sums[0])]

    total = g.rsum(g.loop(n, [g.k(f32x16, 0.0)], one)[0])
    return g.b.fdiv(total, g.b.sitofp(g.b.mul(n, g.c(16)), f32))


def _with_magnitude(g: Emitter, n: Val, x: Val, like: Val, least: Val, out: Val) -> None:
    b, zero = g.b, g.k(f32x16, 0.0)
    wanted, own = (_mean_square(g, n, of, zero) for of in (like, x))
    lowest = b.fmul(g.bits(least), g.bits(least))
    own = b.select(b.fcmp_ordered("<", own, lowest), lowest, own)
    by = g.splat(b.fdiv(g.each_lane("sqrt", wanted), g.each_lane("sqrt", own)))
    g.loop(n, (), lambda i, _: g.put(b.fmul(g.vec(x, i), by), out, i))


def _sparse(g: Emitter, n: Val, x: Val, deviations: Val, out: Val) -> None:
    b, zero = g.b, g.k(f32x16, 0.0)
    total = g.rsum(g.loop(n, [zero], lambda i, sums: [b.fadd(sums[0], g.vec(x, i))])[0])
    mean = b.fdiv(total, b.sitofp(b.mul(n, g.c(16)), f32))
    deviation = g.each_lane("sqrt", _mean_square(g, n, x, g.splat(mean)))
    _above(g, n, x, g.splat(g.fma(deviation, g.bits(deviations), mean)), out)


def _sparse_share(g: Emitter, n: Val, x: Val, moments: Val, columns: Val, deviations: Val, out: Val) -> None:
    """Emit as `_sparse`, of a part of a row of so many columns. `moments`: sums of the row and of its squares."""
    b, count = g.b, g.b.sitofp(columns, f32)
    mean, squares = (b.fdiv(g.ld(f32, moments, at), count) for at in (0, 4))
    variance = b.fsub(squares, b.fmul(mean, mean))
    variance = b.select(b.fcmp_ordered("<", variance, g.f(0.0)), g.f(0.0), variance)
    deviation = g.each_lane("sqrt", variance)
    _above(g, n, x, g.splat(g.fma(deviation, g.bits(deviations), mean)), out)


def _above(g: Emitter, n: Val, x: Val, threshold: Val, out: Val) -> None:
    """Emit what exceeds a threshold."""
    b, zero = g.b, g.k(f32x16, 0.0)

    def one(i: Val, _: list[Val]) -> None:
        v = b.fsub(g.vec(x, i), threshold)
        g.put(b.select(b.fcmp_ordered("<", v, zero), zero, v), out, i)

    g.loop(n, (), one)


def _times_number(g: Emitter, x: Val, weight: Val, out: Val) -> None:
    g.st(g.b.fmul(g.ld(f32, x), g.ld(f32, weight)), out)


bounded = each(3, _bounded)
with_magnitude, sparse, times_number = emit(5, _with_magnitude), emit(4, _sparse), emit(3, _times_number)
sparse_share = emit(6, _sparse_share)


def _magnitude_rows(tid: int, row: int, context: int, counter: int) -> int:
    """Give each part of X, WIDTH columns, the magnitude of Y."""
    size = field(row, layout.WIDTH) * 4
    for r in range(tid, rows_of(row, context), peek(context + _THREADS)):
        x, y = (
            field(row, layout.X) + r * field(row, layout.X_STRIDE),
            field(row, layout.Y) + r * field(row, layout.Y_STRIDE),
        )
        out = field(row, layout.OUT) + r * field(row, layout.OUT_STRIDE)
        for part in range(field(row, layout.STREAMS)):
            with_magnitude(size // 64, x + part * size, y, field(row, layout.FACTOR), out + part * size)
    return 0


def _sparsify_rows(tid: int, row: int, context: int, counter: int) -> int:
    """Leave what exceeds a threshold of the row."""
    for r in range(tid, rows_of(row, context), peek(context + _THREADS)):
        x = field(row, layout.X) + r * field(row, layout.X_STRIDE)
        out = field(row, layout.OUT) + r * field(row, layout.OUT_STRIDE)
        sparse(field(row, layout.WIDTH) // 16, x, field(row, layout.FACTOR), out)
    return 0


def _sparsify_share(tid: int, row: int, context: int, counter: int) -> int:
    """Leave what exceeds a threshold of the whole row in a rank's columns. Y: the moments of the row."""
    for r in range(tid, rows_of(row, context), peek(context + _THREADS)):
        x = field(row, layout.X) + r * field(row, layout.X_STRIDE)
        out = field(row, layout.OUT) + r * field(row, layout.OUT_STRIDE)
        moments = field(row, layout.Y) + r * field(row, layout.Y_STRIDE)
        n, columns = field(row, layout.WIDTH) // 16, field(row, layout.SHARED_COLUMNS)
        sparse_share(n, x, moments, columns, field(row, layout.FACTOR), out)
    return 0


def _mix_streams(tid: int, row: int, context: int, counter: int) -> int:
    """Add a sum of all streams to each."""
    n, streams = field(row, layout.WIDTH) // 16, field(row, layout.STREAMS)
    for r in range(tid, rows_of(row, context), peek(context + _THREADS)):
        x = field(row, layout.X) + r * field(row, layout.X_STRIDE)
        out = field(row, layout.OUT) + r * field(row, layout.OUT_STRIDE)
        factor = field(row, layout.FACTORS) + r * field(row, layout.FACTORS_STRIDE)
        for j in range(streams):
            copy(n, x + j * n * 64, out + j * n * 64)
            for i in range(streams):
                add_scaled(n, x + i * n * 64, peek32(factor), out + j * n * 64)
                factor += 4
    return 0


def _correct_streams(tid: int, row: int, context: int, counter: int) -> int:
    """Add to each stream its share of what is new in the first: Y less the first stream."""
    n, scratch = field(row, layout.WIDTH) // 16, peek(context + _ROW) + tid * peek(context + _ROW_SIZE)
    for r in range(tid, rows_of(row, context), peek(context + _THREADS)):
        x = field(row, layout.X) + r * field(row, layout.X_STRIDE)
        out = field(row, layout.OUT) + r * field(row, layout.OUT_STRIDE)
        factor = field(row, layout.FACTORS) + r * field(row, layout.FACTORS_STRIDE)
        copy(n, field(row, layout.Y) + r * field(row, layout.Y_STRIDE), scratch)
        add_scaled(n, x, _MINUS_ONE, scratch)
        for j in range(field(row, layout.STREAMS)):
            add(n, x + j * n * 64, scratch, out + j * n * 64)
            add_scaled(n, scratch, peek32(factor + 4 * j), out + j * n * 64)
    return 0


def _factors_by_expert(tid: int, row: int, context: int, counter: int) -> int:
    """Multiply each factor by the number of its expert. X: the experts' ids; WIDTH: of a row."""
    for r in range(tid, rows_of(row, context), peek(context + _THREADS)):
        ids = field(row, layout.X) + r * field(row, layout.X_STRIDE)
        out = field(row, layout.OUT) + r * field(row, layout.OUT_STRIDE)
        factors = field(row, layout.FACTORS) + r * field(row, layout.FACTORS_STRIDE)
        for j in range(field(row, layout.WIDTH)):
            times_number(factors + 4 * j, field(row, layout.WEIGHT) + 4 * peek32(ids + 4 * j), out + 4 * j)
    return 0


_BODIES: dict[str, Callable[..., int]] = {
    "clip": in_pieces(bounded),
    "magnitude": _magnitude_rows,
    "sparsify": _sparsify_rows,
    "sparsify_share": _sparsify_share,
    "mix_streams": _mix_streams,
    "correct_streams": _correct_streams,
    "factors_by_expert": _factors_by_expert,
}


def kernels(isa: Isa) -> dict[str, Callable[[], Callable[..., int]]]:
    """Return makers by name. Their source is the same for every instruction set."""
    return kernels_of("special", _BODIES)
