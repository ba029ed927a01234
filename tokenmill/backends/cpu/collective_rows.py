"""Kernels of ranks: a meeting with the others, and operations on values of all ranks in shared memory.

Threads divide the work by rows. Invariant: the result of a row does not depend on the other rows or on the thread, and
its sums over the ranks are in their order, so all ranks have equal bits.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.ir import (
    Emitter,
    Val,
    acquire,
    atomic_add,
    emit,
    f32,
    f32x16,
    field,
    i32,
    inline,
    kernels_of,
    pause,
    peek,
    peek32,
    poke,
    poke32,
)
from tokenmill.backends.cpu.isa import Isa
from tokenmill.backends.cpu.layout import LINE
from tokenmill.backends.cpu.rows import first_row, row_step, rows_of
from tokenmill.backends.cpu.step import call_yield

_SPINS = 2000  # polls of a rank's line, some 80 µs, before a thread yields its core
_YIELDS = 4000  # polls, some ms, before it sleeps between them
_SHORT, _LONG = 50, 500  # µs of a nap; the first naps are short
_SHORT_NAPS = 40
_FEW = layout.FEW


def _call_nap(g: Emitter, address: Val, us: Val) -> None:
    kind = ir.FunctionType(i32, [i32]).as_pointer()
    g.b.call(g.b.inttoptr(address, kind), [g.b.trunc(us, i32)])


def _call_probe(g: Emitter, address: Val, process: Val) -> Val:
    kind = ir.FunctionType(i32, [i32, i32]).as_pointer()
    found = g.b.call(g.b.inttoptr(address, kind), [g.b.trunc(process, i32), ir.Constant(i32, 0)])
    return g.b.sext(found, ir.IntType(64))


call_nap = emit(2, _call_nap)
call_probe = emit(2, _call_probe, types.int64)


@inline
def _wait_for(rank: int, line: int, target: int, context: int) -> None:
    """Wait until a rank has reached a meeting, or is lost (LOST).

    It is lost if it has left, if its process is gone, or if it takes more naps than PATIENCE.
    """
    polls, naps = 0, 0
    while acquire(line) < target:
        polls += 1
        if polls < _SPINS:
            pause()
        elif polls < _YIELDS:
            call_yield(field(context, layout.YIELD))
        else:
            if field(context, layout.LOST):
                return
            process = acquire(line + 8)
            if process == 0 or call_probe(field(context, layout.PROBE), process) != 0:
                poke(context + 8 * layout.LOST, rank + 1)
            elif field(context, layout.PATIENCE) and naps > field(context, layout.PATIENCE):
                poke(context + 8 * layout.LOST, -rank - 1)
            call_nap(field(context, layout.NAP), _SHORT if naps < _SHORT_NAPS else _LONG)
            naps += 1


def _meet(tid: int, row: int, context: int, counter: int) -> int:
    """Tell the other ranks that this one has come so far, and wait until all have. The threads of a rank have met."""
    if field(row, layout.ALWAYS) == 0 and rows_of(row, context) <= _FEW:
        return 1
    lines, own = field(context, layout.RANK_LINES), field(context, layout.MEETINGS) + 64 * tid
    target, rank = peek(own) + 1, field(context, layout.RANK)
    poke(own, target)
    if tid == 0:
        atomic_add(lines + rank * LINE, 1)
    for other in range(field(context, layout.RANKS)):
        if other != rank and field(context, layout.LOST) == 0:
            _wait_for(other, lines + other * LINE, target, context)
    return 1


def _add_slots(g: Emitter, n: Val, x: Val, slot: Val, ranks: Val, residual: Val | None, out: Val) -> None:
    """Emit the sum of the ranks' vectors. Each is stored once, because another rank may be reading it by then."""
    b = g.b

    def one(i: Val, _: list[Val]) -> None:
        def add(rank: Val, sums: list[Val]) -> list[Val]:
            other = g.at(x, b.mul(slot, b.add(rank, g.c(1))))
            return [b.fadd(sums[0], g.vec(other, i))]

        total = g.loop(b.sub(ranks, g.c(1)), [g.vec(x, i)], add)[0]
        g.put(total if residual is None else b.fadd(total, g.vec(residual, i)), out, i)

    g.loop(n, (), one)


add_slots = emit(5, lambda g, n, x, slot, ranks, out: _add_slots(g, n, x, slot, ranks, None, out))
add_slots_and_residual = emit(6, _add_slots)


def _sum_ranks(tid: int, row: int, context: int, counter: int) -> int:
    """Add the rows of all ranks, then the residual."""
    n, slot = (field(row, layout.WIDTH) + 15) // 16, field(row, layout.SLOT_BYTES)
    rows = rows_of(row, context)
    for r in range(first_row(tid, row, rows), rows, row_step(row, context, rows)):
        x, out = (
            field(row, layout.X) + r * field(row, layout.X_STRIDE),
            field(row, layout.OUT) + r * field(row, layout.OUT_STRIDE),
        )
        if field(row, layout.Y):
            residual = field(row, layout.Y) + r * field(row, layout.Y_STRIDE)
            add_slots_and_residual(n, x, slot, field(context, layout.RANKS), residual, out)
        else:
            add_slots(n, x, slot, field(context, layout.RANKS), out)
    return 0


def _gather(tid: int, row: int, context: int, counter: int) -> int:
    """Copy the columns of all ranks side by side, as many as the result has."""
    width, slot = field(row, layout.WIDTH), field(row, layout.SLOT_BYTES)
    for r in range(tid, rows_of(row, context), field(context, layout.THREADS)):
        x, out = (
            field(row, layout.X) + r * field(row, layout.X_STRIDE),
            field(row, layout.OUT) + r * field(row, layout.OUT_STRIDE),
        )
        for column in range(field(row, layout.GATHERED)):
            poke32(out + 4 * column, peek32(x + column // width * slot + column % width * 4))
    return 0


def _sums(g: Emitter, n: Val, x: Val, share: Val, out: Val) -> None:
    """Emit the sum of n vectors and that of their squares, times `share`."""
    b, zero = g.b, g.k(f32x16, 0.0)

    def one(i: Val, sums: list[Val]) -> list[Val]:
        v = g.vec(x, i)
        return [b.fadd(sums[0], v), g.fma(v, v, sums[1])]

    for at, total in enumerate(g.loop(n, [zero, zero], one)):
        g.st(b.fmul(g.rsum(total), g.bits(share)), out, 4 * at)


def _scaled_by_root(g: Emitter, n: Val, x: Val, weight: Val, squares: Val, eps: Val, columns: Val, out: Val) -> None:
    """Emit x · weight / √(squares / columns + eps)."""
    b = g.b
    mean = b.fdiv(g.ld(f32, squares), b.sitofp(columns, f32))
    factor = g.splat(b.fdiv(g.f(1.0), g.each_lane("sqrt", b.fadd(mean, g.bits(eps)))))
    g.loop(n, (), lambda i, _: g.put(b.fmul(b.fmul(g.vec(x, i), factor), g.vec(weight, i)), out, i))


sums, scaled_by_root = emit(4, _sums), emit(7, _scaled_by_root)


def _moments(tid: int, row: int, context: int, counter: int) -> int:
    """Compute Σx and Σx² of a rank's columns."""
    for r in range(tid, rows_of(row, context), field(context, layout.THREADS)):
        x, out = (
            field(row, layout.X) + r * field(row, layout.X_STRIDE),
            field(row, layout.OUT) + r * field(row, layout.OUT_STRIDE),
        )
        sums(field(row, layout.WIDTH) // 16, x, field(row, layout.FACTOR), out)
    return 0


def _share_norm(tid: int, row: int, context: int, counter: int) -> int:
    """Normalize a rank's columns. Y: the moments of the whole row."""
    for r in range(tid, rows_of(row, context), field(context, layout.THREADS)):
        x, out = (
            field(row, layout.X) + r * field(row, layout.X_STRIDE),
            field(row, layout.OUT) + r * field(row, layout.OUT_STRIDE),
        )
        squares = field(row, layout.Y) + r * field(row, layout.Y_STRIDE) + 4
        n, weight, eps = field(row, layout.WIDTH) // 16, field(row, layout.NORM_WEIGHT), field(row, layout.NORM_EPS)
        scaled_by_root(n, x, weight, squares, eps, field(row, layout.SHARED_COLUMNS), out)
    return 0


_BODIES: dict[str, Callable[..., int]] = {
    "meet": _meet,
    "sum_ranks": _sum_ranks,
    "gather": _gather,
    "moments": _moments,
    "share_norm": _share_norm,
}


def kernels(isa: Isa) -> dict[str, Callable[[], Callable[..., int]]]:
    """Return makers by name. Their source is the same for every instruction set."""
    return kernels_of("ranks", _BODIES)
