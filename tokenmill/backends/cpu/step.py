"""Execution of a step table: every thread walks the table and synchronizes with the others at barriers.

`walk` runs one step on one thread. `serve` is the main loop of a worker thread: sleep until a step begins, walk it,
sleep again. Both are compiled (`compiler.py`) and called by address, so they run without Python's global interpreter
lock. A worker that had to acquire the lock would start milliseconds late whenever the engine plans the next step.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.ir import Emitter, Val, acquire, atomic_add, emit, i32, i64, inline, kernel, pause, peek

_SPINS = 500  # polls of a barrier, some 20 µs, before the thread yields its core
_IDLE_SPINS = 200  # polls for the next step before a worker sleeps
_ROW_BYTES = layout.ROW_BYTES


def _call_kernel(g: Emitter, address: Val, tid: Val, row: Val, context: Val, counter: Val) -> Val:
    kind = ir.FunctionType(i64, [i64] * 4).as_pointer()
    return g.b.call(g.b.inttoptr(address, kind), [tid, row, context, counter])


def _call_wait(g: Emitter, address: Val, semaphore: Val) -> None:
    kind = ir.FunctionType(i32, [i64, i64]).as_pointer()
    g.b.call(g.b.inttoptr(address, kind), [semaphore, g.c(-1)])


def _call_yield(g: Emitter, address: Val) -> None:
    g.b.call(g.b.inttoptr(address, ir.FunctionType(i32, []).as_pointer()), [])


call_kernel = emit(5, _call_kernel, types.int64)
call_wait = emit(2, _call_wait)
call_yield = emit(1, _call_yield)
address_of = emit(1, lambda g, pointer: pointer, types.int64)


@inline
def barrier(address: int, target: int, yield_address: int) -> None:
    """Wait until all threads have arrived.

    Threads yield after _SPINS polls: pure spinning makes a step 200 times slower once another process shares a core.
    """
    atomic_add(address, 1)
    spins = 0
    while acquire(address) < target:
        pause()
        spins += 1
        if spins > _SPINS:
            call_yield(yield_address)


@inline
def walk_rows(tid: int, context: int) -> int:
    """Execute the rows from FIRST_ROW to LAST_ROW. Returns the value of the barrier at the end."""
    threads, target = peek(context + 8 * layout.THREADS), peek(context + 8 * layout.BARRIER_BASE)
    row, last = peek(context + 8 * layout.FIRST_ROW), peek(context + 8 * layout.LAST_ROW)
    counter, barrier_address = peek(context + 8 * layout.COUNTERS), peek(context + 8 * layout.BARRIER)
    yield_address = peek(context + 8 * layout.YIELD)
    while row < last:
        if call_kernel(peek(row), tid, row, context, counter) == 0:
            target += threads
            barrier(barrier_address, target, yield_address)
        row += _ROW_BYTES
        counter += 64
    target += threads
    barrier(barrier_address, target, yield_address)
    return int(target)


@inline
def _walk(tid: int, row: int, context: int, counter: int) -> int:
    return walk_rows(tid, context)


@inline
def _serve(tid: int, row: int, context: int, semaphore: int) -> int:
    seen = 0
    while True:
        spins = 0
        while acquire(context + 8 * layout.GENERATION) == seen:
            pause()
            spins += 1
            if spins > _IDLE_SPINS:
                call_wait(peek(context + 8 * layout.WAIT), semaphore)
        seen = acquire(context + 8 * layout.GENERATION)
        if peek(context + 8 * layout.STOP) != 0:
            return 0
        walk_rows(tid, context)


KERNELS = {"walk": kernel("walk", _walk), "serve": kernel("serve", _serve)}
"""walk (tid, 0, context, 0): run one step as thread `tid`; all threads must call it. Returns the next BARRIER_BASE.
serve (tid, 0, context, semaphore): run all steps until STOP. The caller posts the semaphore once for each step."""
