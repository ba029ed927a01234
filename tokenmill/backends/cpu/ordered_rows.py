"""Row kernel that quantizes activations in the order of a matrix's columns (`ordered.py`).

Threads divide the work by rows. Invariant: the result of a row does not depend on the other rows or on the thread.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.ir import Emitter, Val, emit, f32, f32x16, i32, i64, kernels_of, peek
from tokenmill.backends.cpu.isa import Isa
from tokenmill.backends.cpu.rows import rows_of
from tokenmill.backends.cpu.vectors import quantize_block


def _quantize(g: Emitter, n: Val, x: Val, order: Val, codes: Val, scales: Val) -> None:
    def gathered(at: Val, first: int) -> Val:
        vector = ir.Constant(f32x16, ir.Undefined)
        for lane in range(16):
            index = g.ld(i64, at, 8 * (first + lane))
            number = g.ld(f32, g.at(x, g.b.mul(index, g.c(4))))
            vector = g.b.insert_element(vector, number, ir.Constant(i32, lane))
        return vector

    def block(i: Val, _: list[Val]) -> None:
        at = g.at(order, g.b.mul(i, g.c(256)))
        low, high = gathered(at, 0), gathered(at, 16)
        quantize_block(g, low, high, g.at(codes, g.b.mul(i, g.c(32))), g.at(scales, g.b.mul(i, g.c(8))))

    g.loop(n, (), block)


quantize_gathered = emit(5, _quantize)
"""(blocks of 32, x, order, codes, scales): quantize x[order] to int8, see `vectors.quantize_block`"""
_X, _X_STRIDE, _WIDTH, _ORDER, _OUT, _OUT_STRIDE, _OUT_SCALES, _THREADS = (
    8 * word for word in (layout.X, layout.X_STRIDE, layout.WIDTH, layout.ORDER, layout.OUT, layout.OUT_STRIDE,
                          layout.OUT_SCALES, layout.THREADS)
)  # fmt: skip  # bytes; numba reads globals of this module


def _quantize_ordered(tid: int, row: int, context: int, counter: int) -> int:
    """Quantize rows from float32 to int8, in the order of a weight's columns."""
    width = peek(row + _WIDTH)
    for r in range(tid, rows_of(row, context), peek(context + _THREADS)):
        x, out = peek(row + _X) + r * peek(row + _X_STRIDE), peek(row + _OUT) + r * peek(row + _OUT_STRIDE)
        quantize_gathered(width // 32, x, peek(row + _ORDER), out, peek(row + _OUT_SCALES) + r * (width // 4))
    return 0


def kernels(isa: Isa) -> dict[str, Callable[[], Callable[..., int]]]:
    """Return makers by name. Their source is the same for every instruction set."""
    return kernels_of("rows", {"ordered_quantize": _quantize_ordered})
