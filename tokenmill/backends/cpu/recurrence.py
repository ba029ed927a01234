"""Kernels of operations with a state for each slot: short convolutions, selective scans, the delta rule, RG-LRU.

A work item is one sequence of the step and some columns or a head. Its tokens are computed one after another, however
many there are. Invariant: the results of a sequence do not depend on other sequences, on threads, or on the division
of its tokens among steps.

A slot has a ring of RING states: the one after p tokens is at place p % RING. A sequence that begins reads no state.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.ir import (
    Emitter,
    Val,
    atomic_add,
    clear,
    copy,
    each,
    emit,
    f32,
    f32x16,
    field,
    inline,
    kernels_of,
    peek,
    peek32,
    poke32,
)
from tokenmill.backends.cpu.isa import Isa
from tokenmill.backends.cpu.rows import activate
from tokenmill.backends.cpu.vectors import logistic, softplus

RING = layout.STATE_RING
WIDE = 4  # vectors of columns of a work item
CHUNK = 16  # tokens of a head of the delta rule whose queries, keys and decays are made at once
_ONE = layout.float_bits(1.0)
_EPS = 1e-6  # added to the square of a length
_SEQUENCES, _POSITIONS, _RUNS, _RUN_FIRST = (
    8 * word for word in (layout.SEQUENCES, layout.POSITIONS, layout.RUNS, layout.RUN_FIRST)
)


@inline
def begin_of(context: int, run: int) -> int:
    """Return the index of a sequence's first row."""
    return int(peek(peek(context + _RUN_FIRST) + 8 * run))


@inline
def state_at(row: int, context: int, first: int, count: int, at: int) -> int:
    """Return the address, `at` bytes into it, of the state after `count` tokens of the sequence whose rows begin there.

    0 if there is none: `count` is 0 and the sequence begins with this step.
    """
    position = peek(peek(context + _POSITIONS) + 8 * first) + count
    if position == 0:
        return 0
    slot = peek(peek(context + _SEQUENCES) + 8 * first)
    place = field(row, layout.STATE) + slot * field(row, layout.STATE_SLOT)
    return int(place + position % RING * field(row, layout.STATE_BYTES) + at)


@inline
def input_of(row: int, column: int, r: int) -> int:
    """Return the address of row r of an input. `column`: of its address; the next one has its stride."""
    return int(field(row, column) + r * field(row, column + 1))


@inline
def output_of(row: int, r: int) -> int:
    """Return the address of row r of the output."""
    return int(field(row, layout.OUT) + r * field(row, layout.OUT_STRIDE))


# ---- convolution ----

add_product = each(3, lambda g, i, x, w, out: g.put(g.fma(g.vec(x, i), g.vec(w, i), g.vec(out, i)), out, i))
"""(vectors, x, w, out): out += x · w"""


def _conv(tid: int, row: int, context: int, counter: int) -> int:
    """Convolve. An item is WIDE vectors of columns of a sequence."""
    width, taps = (field(row, layout.WIDTH) + 15) // 16, field(row, layout.TAPS)
    pieces, stride = (width + WIDE - 1) // WIDE, width * 64
    while True:
        i = atomic_add(counter, 1)
        if i >= peek(context + _RUNS) * pieces:
            return 0
        run, at, n = i // pieces, i % pieces * WIDE * 64, min(WIDE, width - i % pieces * WIDE)
        first = begin_of(context, run)
        count = begin_of(context, run + 1) - first
        before, after = state_at(row, context, first, 0, at), state_at(row, context, first, count, at)
        x, bias = input_of(row, layout.X, first) + at, field(row, layout.BIAS)
        for t in range(count):
            out = output_of(row, first + t) + at
            if bias:
                copy(n, bias + at, out)
            else:
                clear(n, out)
            for k in range(taps):
                j, weight = t + k - taps + 1, field(row, layout.TAP_WEIGHTS) + k * stride + at
                if j >= 0:
                    add_product(n, x + j * field(row, layout.X_STRIDE), weight, out)
                elif before:
                    add_product(n, before + (j + taps - 1) * stride, weight, out)
            activate(field(row, layout.ACT), n, out, out)
        for k in range(taps - 1):  # ascending, because both states may be at one place
            j, place = count + k - taps + 1, after + k * stride
            if j >= 0:
                copy(n, x + j * field(row, layout.X_STRIDE), place)
            elif before:
                copy(n, before + (j + taps - 1) * stride, place)
            else:
                clear(n, place)


# ---- selective scan ----


def _step(g: Emitter, dt: Val, bias: Val, low: Val, high: Val) -> Val:
    """Emit the steps of 16 columns: softplus(dt + bias), bounded."""
    b = g.b
    step = softplus(g, b.fadd(g.ld(f32x16, dt), g.ld(f32x16, bias)))
    for bound, sign in ((g.splat(g.bits(low)), "<"), (g.splat(g.bits(high)), ">")):
        step = b.select(b.fcmp_ordered(sign, step, bound), bound, step)
    return step


def _scan(by_column: bool) -> Callable[..., None]:
    """Return a generator of the code for one token and 16 columns of x."""

    def token(
        g: Emitter, n: Val, dt: Val, bias: Val, decay: Val, x: Val, b_row: Val, c_row: Val, skip: Val, low: Val,
        high: Val, before: Val, after: Val, out: Val,
    ) -> None:  # fmt: skip
        b, step, v = g.b, _step(g, dt, bias, low, high), g.ld(f32x16, x)
        added, whole = b.fmul(step, v), None if by_column else g.exp(b.fmul(step, g.ld(f32x16, decay)))

        def four(i: Val, sums: list[Val]) -> list[Val]:
            found, at = [], b.shl(i, g.c(2))
            for u in range(4):
                kept = g.exp(b.fmul(step, g.vec(decay, at, 64 * u))) if whole is None else whole
                number, weight = (g.splat(g.ld(f32, g.at(of, b.shl(at, g.c(2))), 4 * u)) for of in (b_row, c_row))
                state = g.fma(g.vec(before, at, 64 * u), kept, b.fmul(added, number))
                g.st(state, g.at(after, b.mul(at, g.c(64))), 64 * u)
                found.append(g.fma(state, weight, sums[u]))
            return found

        s = g.loop(b.lshr(n, g.c(2)), [g.k(f32x16, 0.0)] * 4, four)
        total = b.fadd(b.fadd(s[0], s[1]), b.fadd(s[2], s[3]))
        g.st(g.fma(g.ld(f32x16, skip), v, total), out)

    return token


scan_by_head, scan_by_column = (emit(13, _scan(by_column)) for by_column in (False, True))
"""(columns of the state, dt, bias, decay, x, b, c, skip, bits of limits, state before, state after, out)"""


@inline
def _steps_at(row: int, r: int, column: int, scratch: int) -> int:
    """Return the address of the dt of 16 columns of row r from `column` on. Columns of a head share one."""
    dt, width = input_of(row, layout.DT, r), field(row, layout.HEAD_COLUMNS)
    if width == 1:
        return int(dt + 4 * column)
    last = field(row, layout.WIDTH) - 1
    if width % 16 == 0:
        one = peek32(dt + column // width * 4)
        for lane in range(16):
            poke32(scratch + 4 * lane, one)
    else:
        for lane in range(16):
            poke32(scratch + 4 * lane, peek32(dt + min(column + lane, last) // width * 4))
    return int(scratch)


def _scan_rows(tid: int, row: int, context: int, counter: int) -> int:
    """Scan. An item is WIDE vectors of columns of a sequence."""
    width, n = (field(row, layout.WIDTH) + 15) // 16, field(row, layout.STATE_COLUMNS)
    pieces, size = (width + WIDE - 1) // WIDE, 64 * n
    scratch = field(context, layout.ROW) + tid * field(context, layout.ROW_SIZE)
    low, high, by_column = field(row, layout.LOW), field(row, layout.HIGH), field(row, layout.DECAY_BY_COLUMN)
    while True:
        i = atomic_add(counter, 1)
        if i >= peek(context + _RUNS) * pieces:
            return 0
        run = i // pieces
        first, last = begin_of(context, run), begin_of(context, run + 1)
        for v in range(i % pieces * WIDE, min(width, (i % pieces + 1) * WIDE)):
            after = state_at(row, context, first, last - first, v * size)
            before = state_at(row, context, first, 0, v * size)
            if not before:
                clear(n, after)
                before = after
            group = v * 16 // field(row, layout.GROUP_COLUMNS) * n * 4
            bias, skip = field(row, layout.DT_BIAS) + v * 64, field(row, layout.SKIP) + v * 64
            decay = field(row, layout.DECAY) + v * (size if by_column else 64)
            for r in range(first, last):
                x, out = input_of(row, layout.X, r) + v * 64, output_of(row, r) + v * 64
                b, c = input_of(row, layout.B, r) + group, input_of(row, layout.C, r) + group
                dt = _steps_at(row, r, v * 16, scratch)
                if by_column:
                    scan_by_column(n, dt, bias, decay, x, b, c, skip, low, high, before, after, out)
                else:
                    scan_by_head(n, dt, bias, decay, x, b, c, skip, low, high, before, after, out)
                before = after


# ---- delta rule ----


def _unit(g: Emitter, n: Val, x: Val, out: Val, factor: Val) -> None:
    """Emit x / its length, times the float of bits `factor`. n: vectors."""
    b = g.b
    squares = g.rsum(g.loop(n, [g.k(f32x16, 0.0)], lambda i, s: [g.fma(g.vec(x, i), g.vec(x, i), s[0])])[0])
    by = b.fdiv(g.bits(factor), g.each_lane("sqrt", b.fadd(squares, g.f(_EPS))))
    g.loop(n, (), lambda i, _: g.put(b.fmul(g.vec(x, i), g.splat(by)), out, i))


def _decays(g: Emitter, n: Val, dt: Val, bias: Val, speed: Val, one: Val, out: Val) -> None:
    """Emit exp(speed · softplus(dt + bias)) for n vectors; with `one`, that of the first number for all."""
    b = g.b
    single = b.icmp_signed("!=", one, g.c(0))

    def sixteen(i: Val, _: list[Val]) -> None:
        def numbers(of: Val) -> Val:
            whole = g.at(of, b.select(single, g.c(0), b.mul(i, g.c(64))))
            return b.select(single, g.splat(g.ld(f32, of)), g.ld(f32x16, whole))

        step = softplus(g, b.fadd(numbers(dt), numbers(bias)))
        g.put(g.exp(b.fmul(step, g.splat(g.ld(f32, speed)))), out, i)

    g.loop(n, (), sixteen)


def _rate(g: Emitter, x: Val, rate: Val, out: Val) -> None:
    share = logistic(g, g.splat(g.ld(f32, x)), g.c(layout.SIGMOID))
    g.st(g.b.fmul(share, g.splat(g.bits(rate))), out)


def _correct(
    g: Emitter, n: Val, q: Val, k: Val, decay: Val, v: Val, rate: Val, before: Val, after: Val, out: Val
) -> None:
    """Emit one token and 16 columns of a value: read what the state returns for k, correct it, read it for q."""
    b, zero = g.b, g.k(f32x16, 0.0)

    def number(of: Val, at: Val, u: int) -> Val:
        return g.splat(g.ld(f32, g.at(of, b.shl(at, g.c(2))), 4 * u))

    def returned(i: Val, sums: list[Val]) -> list[Val]:
        at = b.shl(i, g.c(2))
        return [
            g.fma(b.fmul(g.vec(before, at, 64 * u), number(decay, at, u)), number(k, at, u), sums[u]) for u in range(4)
        ]

    def corrected(i: Val, sums: list[Val]) -> list[Val]:
        at, found = b.shl(i, g.c(2)), []
        for u in range(4):
            kept = b.fmul(g.vec(before, at, 64 * u), number(decay, at, u))
            state = g.fma(number(k, at, u), error, kept)
            g.st(state, g.at(after, b.mul(at, g.c(64))), 64 * u)
            found.append(g.fma(state, number(q, at, u), sums[u]))
        return found

    def total(s: list[Val]) -> Val:
        return b.fadd(b.fadd(s[0], s[1]), b.fadd(s[2], s[3]))

    fours = b.lshr(n, g.c(2))
    error = b.fmul(b.fsub(g.ld(f32x16, v), total(g.loop(fours, [zero] * 4, returned))), g.ld(f32x16, rate))
    g.st(total(g.loop(fours, [zero] * 4, corrected)), out)


unit, decays, rate_of, correct = emit(4, _unit), emit(6, _decays), emit(3, _rate), emit(9, _correct)


@inline
def _prepare(row: int, r: int, head: int, at: int, size: int) -> None:
    """Write query, key and decays of a token, `size` bytes each, and 16 times its rate."""
    heads, n = field(row, layout.VALUE_HEADS), size // 64
    shared = head // (heads // field(row, layout.KEY_HEADS)) * size
    unit(n, input_of(row, layout.X, r) + shared, at, field(row, layout.QUERY_FACTOR))
    unit(n, input_of(row, layout.K, r) + shared, at + size, _ONE)
    each_column = field(row, layout.DT_COLUMNS) * 4 * head
    dt, bias = input_of(row, layout.DT, r) + each_column, field(row, layout.DT_BIAS) + each_column
    single = 1 if field(row, layout.DT_COLUMNS) == 1 else 0
    decays(n, dt, bias, field(row, layout.DECAY) + 4 * head, single, at + 2 * size)
    rate_of(input_of(row, layout.RATES, r) + 4 * head, field(row, layout.RATE), at + 3 * size)


def _delta(tid: int, row: int, context: int, counter: int) -> int:
    """Apply the delta rule. An item is a head of a sequence."""
    heads, n = field(row, layout.VALUE_HEADS), field(row, layout.STATE_COLUMNS)
    vectors, size = field(row, layout.VALUE_COLUMNS) // 16, 4 * n
    each_token = 3 * size + 64
    scratch = field(context, layout.ROW) + tid * field(context, layout.ROW_SIZE)
    while True:
        i = atomic_add(counter, 1)
        if i >= peek(context + _RUNS) * heads:
            return 0
        run, head = i // heads, i % heads
        first, last = begin_of(context, run), begin_of(context, run + 1)
        for start in range(first, last, CHUNK):
            stop = min(start + CHUNK, last)
            for r in range(start, stop):
                _prepare(row, r, head, scratch + (r - start) * each_token, size)
            for v in range(vectors):
                place, column = (head * vectors + v) * n * 64, (head * vectors + v) * 64
                after = state_at(row, context, first, last - first, place)
                before = after if start > first else state_at(row, context, first, 0, place)
                if not before:
                    clear(n, after)
                    before = after
                for r in range(start, stop):
                    at = scratch + (r - start) * each_token
                    value, out = input_of(row, layout.V, r) + column, output_of(row, r) + column
                    correct(n, at, at + size, at + 2 * size, value, at + 3 * size, before, after, out)
                    before = after


# ---- RG-LRU ----


def _lru_token(
    g: Emitter, i: Val, x: Val, into: Val, gates: Val, decay: Val, fresh: Val, before: Val, after: Val, out: Val
) -> None:
    b = g.b
    log = b.fmul(g.vec(gates, i), g.vec(decay, i))
    one, kept = g.k(f32x16, 1.0), g.exp(log)
    root = g.each_lane("sqrt", b.fsub(one, g.exp(b.fadd(log, log))))
    new = b.icmp_signed("!=", fresh, g.c(0))
    added = b.fmul(b.fmul(g.vec(into, i), g.vec(x, i)), b.select(new, one, root))
    state = g.fma(kept, g.vec(before, i), added)
    g.put(state, after, i)
    g.put(state, out, i)


lru_token = each(8, _lru_token)
"""(vectors, x, input gates, recurrence gates, decay, 1 at position 0, state before, state after, out)"""


def _lru(tid: int, row: int, context: int, counter: int) -> int:
    """Apply the recurrent unit. An item is WIDE vectors of columns of a sequence."""
    width = (field(row, layout.WIDTH) + 15) // 16
    pieces = (width + WIDE - 1) // WIDE
    while True:
        i = atomic_add(counter, 1)
        if i >= peek(context + _RUNS) * pieces:
            return 0
        run, at, n = i // pieces, i % pieces * WIDE * 64, min(WIDE, width - i % pieces * WIDE)
        first, last = begin_of(context, run), begin_of(context, run + 1)
        after, before = state_at(row, context, first, last - first, at), state_at(row, context, first, 0, at)
        fresh = 0 if before else 1
        if fresh:
            clear(n, after)
            before = after
        for r in range(first, last):
            gates = r * field(row, layout.GATES_STRIDE) + at
            into, kept = field(row, layout.INPUT_GATES) + gates, field(row, layout.RECURRENCE_GATES) + gates
            x, out = input_of(row, layout.X, r) + at, output_of(row, r) + at
            lru_token(n, x, into, kept, field(row, layout.DECAY) + at, fresh, before, after, out)
            before, fresh = after, 0


_BODIES: dict[str, Callable[..., int]] = {"conv": _conv, "scan": _scan_rows, "delta": _delta, "lru": _lru}


def kernels(isa: Isa) -> dict[str, Callable[[], Callable[..., int]]]:
    """Return makers by name. Their source is the same for every instruction set."""
    return kernels_of("recurrence", _BODIES)
