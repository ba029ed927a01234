"""Kernels of mixtures of experts: routing, sorting rows by expert, grouped products, and the weighted sum.

A (row, expert) pair is an item of the sorted order: those of the first expert come first. The product's input, inner
values and results are matrices with a row for each item, so an expert's rows are adjacent. Invariant: the result of a
row does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numba import types

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.dense_tiles import narrow
from tokenmill.backends.cpu.forms import NAMES, PAIRS, form_named
from tokenmill.backends.cpu.ir import (
    Emitter,
    Val,
    atomic_add,
    clear,
    compiled,
    copy,
    each,
    emit,
    f32,
    f32x16,
    field,
    i32,
    i32x16,
    i64,
    inline,
    kernel,
    peek,
    peek32,
    poke,
    poke32,
)  # fmt: skip
from tokenmill.backends.cpu.isa import Isa
from tokenmill.backends.cpu.products import count_rows, gate_rows, product
from tokenmill.backends.cpu.rows import activate, add, add_scaled, quantize, scale

Function = Callable[..., Any]

_MINUS_INFINITY = -(1 << 23)  # its bits as an int32: the mark of an expert or group that cannot be chosen any more
_THREADS, _ZEROS = 8 * layout.THREADS, 8 * layout.ZEROS
_SPARSEMIXER = layout.SCORES_OF_EXPERTS.index("sparsemixer")
_PANELS = 4  # that a thread takes at a time; of a gated product two of gate and two of up

load_float = emit(1, lambda g, address: g.ld(f32, address), types.float32)
store_float = emit((types.int64, types.float32), lambda g, address, v: g.st(v, address))


def _bounded(g: Emitter, i: Val, x: Val, limit: Val, offset: Val) -> None:
    """Bound vector i of gate and of up, and add `offset` to up. Numbers that are none stay as they are."""
    b, none = g.b, g.b.icmp_signed("==", limit, g.c(0))
    most = g.splat(b.select(none, g.f(float("inf")), g.bits(limit)))
    at = g.at(x, b.add(b.mul(b.lshr(i, g.c(1)), g.c(256)), b.mul(b.and_(i, g.c(1)), g.c(64))))
    gate, up = g.ld(f32x16, at), g.ld(f32x16, at, 128)
    up = b.select(b.fcmp_ordered("<", up, b.fneg(most)), b.fneg(most), up)
    gate, up = (b.select(b.fcmp_ordered(">", v, most), most, v) for v in (gate, up))
    g.st(gate, at)
    g.st(b.fadd(up, g.splat(g.bits(offset))), at, 128)


bounded = each(3, _bounded)
"""(vectors of gate, x, bits of the limit, bits of the offset): bound rows of 32 gates and 32 ups in place"""


# ---- routing ----


def _scores(g: Emitter, count: Val, x: Val, kind: Val) -> None:
    """Replace `count` logits, padded to whole vectors, by their sigmoids or their softmax. `kind`: SCORE."""
    b = g.b
    vectors = b.lshr(b.add(count, g.c(15)), g.c(4))

    def number(i: Val) -> Val:
        return g.ld(f32, g.at(x, b.shl(i, g.c(2))))

    def greater(i: Val, found: list[Val]) -> list[Val]:
        return [b.select(b.fcmp_ordered(">", number(i), found[0]), number(i), found[0])]

    single = b.icmp_signed("!=", kind, g.c(0))
    top = g.splat(g.loop(count, [number(g.c(0))], greater)[0])
    one = g.k(f32x16, 1.0)

    def score(i: Val, _: list[Val]) -> None:
        v = g.vec(x, i)
        power = g.exp(b.select(single, b.fneg(v), b.fsub(v, top)))
        g.put(b.select(single, b.fdiv(one, b.fadd(one, power)), power), x, i)

    g.loop(vectors, (), score)
    total = g.loop(count, [g.f(0.0)], lambda i, sums: [b.fadd(sums[0], number(i))])[0]
    divisor = g.splat(b.select(single, g.f(1.0), total))
    g.loop(vectors, (), lambda i, _: g.put(b.fdiv(g.vec(x, i), divisor), x, i))


def _finished(g: Emitter, count: Val, x: Val, renormalize: Val, least: Val, scale: Val) -> None:
    """Divide numbers by their sum, no less than the float of bits `least`, if `renormalize`; multiply by `scale`."""
    b = g.b

    def number(i: Val) -> Val:
        return g.ld(f32, g.at(x, b.shl(i, g.c(2))))

    total = g.loop(count, [g.f(0.0)], lambda i, sums: [b.fadd(sums[0], number(i))])[0]
    bounded = b.select(b.fcmp_ordered("<", total, g.bits(least)), g.bits(least), total)
    divisor = b.select(b.icmp_signed("!=", renormalize, g.c(0)), bounded, g.f(1.0))

    def finish(i: Val, _: list[Val]) -> None:
        g.st(b.fmul(b.fdiv(number(i), divisor), g.bits(scale)), g.at(x, b.shl(i, g.c(2))))

    g.loop(count, (), finish)


def _share(g: Emitter, count: Val, x: Val, left: Val, best: Val, margin: Val) -> Val:
    """Return the bits of an expert's share in a softmax over those left whose logits are near its own.

    `x`: the logits; `left`: the same, with marks; `best`: the address of its logit.
    """
    b, ints = g.b, i32x16
    top = g.splat(g.ld(f32, best))

    def term(i: Val, sums: list[Val]) -> list[Val]:
        v, w = g.vec(x, i), g.vec(left, i)
        size = g.each_lane("fabs", v)
        divisor = b.select(b.fcmp_ordered("<", size, top), top, size)
        far = b.fcmp_ordered(">", b.fdiv(b.fsub(top, v), divisor), g.splat(g.bits(margin)))
        marked = b.icmp_signed("==", b.bitcast(w, ints), g.k(ints, _MINUS_INFINITY))
        index = b.add(g.splat(b.trunc(b.shl(i, g.c(4)), i32)), g.lanes())
        beyond = b.icmp_signed(">=", index, g.splat(b.trunc(count, i32)))
        none = b.or_(b.or_(far, marked), beyond)
        return [b.fadd(sums[0], b.select(none, g.k(f32x16, 0.0), g.exp(b.fsub(v, top))))]

    total = g.rsum(g.loop(b.lshr(b.add(count, g.c(15)), g.c(4)), [g.k(f32x16, 0.0)], term)[0])
    return b.zext(b.bitcast(b.fdiv(g.f(1.0), total), i32), i64)


scores = emit(3, _scores)
share = emit(5, _share, types.int64)
finished = emit(5, _finished)


@inline
def _best(count: int, at: int) -> int:
    """Return the index of the largest of `count` numbers without a mark; −1 if all are marked."""
    best, top = -1, np.float32(0)
    for i in range(count):
        if peek32(at + 4 * i) != _MINUS_INFINITY:
            v = load_float(at + 4 * i)
            if best < 0 or v > top:
                best, top = i, v
    return best


@inline
def _unused(ids: int, count: int) -> int:
    """Return the smallest id that is not among `count` ids."""
    found = 0
    while True:
        used = False
        for j in range(count):
            used = used or peek32(ids + 4 * j) == found
        if not used:
            return found
        found += 1


@inline
def _keep_best_groups(count: int, groups: int, top: int, best: int, choice: int, sums: int) -> None:
    """Mark the experts of all but the `top` groups. A group counts as its best score, or the sum of its two best."""
    size = count // groups
    for group in range(groups):
        at = choice + 4 * group * size
        first, second = np.float32(-np.inf), np.float32(-np.inf)
        for i in range(size):
            v = load_float(at + 4 * i)
            if v > first:
                first, second = v, first
            elif v > second:
                second = v
        store_float(sums + 4 * group, first + second if best == 2 and size > 1 else first)
    for _ in range(top):
        group = _best(groups, sums)
        if group >= 0:
            poke32(sums + 4 * group, _MINUS_INFINITY)
    for group in range(groups):
        if peek32(sums + 4 * group) != _MINUS_INFINITY:
            for i in range(size):
                poke32(choice + 4 * (group * size + i), _MINUS_INFINITY)


@inline
def _route(tid: int, row: int, context: int, counter: int) -> int:
    """Choose the experts of each row. X: logits, behind which a row has room for as many numbers, twice."""
    count, top_k, groups = field(row, layout.EXPERTS), field(row, layout.TOP_K), field(row, layout.GROUPS)
    width = (count + 15) // 16
    for r in range(tid, count_rows(row, context), peek(context + _THREADS)):
        x = field(row, layout.X) + r * field(row, layout.X_STRIDE)
        ids = field(row, layout.OUT) + r * field(row, layout.OUT_STRIDE)
        factors = field(row, layout.FACTORS) + r * field(row, layout.FACTORS_STRIDE)
        choice = x + 64 * width
        kind = field(row, layout.SCORE)
        if kind != _SPARSEMIXER:
            scores(count, x, kind)
        if field(row, layout.CORRECTION):
            add(width, x, field(row, layout.CORRECTION), choice)
        else:
            copy(width, x, choice)
        if groups > 1:
            top, best = field(row, layout.TOP_GROUPS), field(row, layout.GROUP_BEST)
            _keep_best_groups(count, groups, top, best, choice, choice + 64 * width)
        for j in range(top_k):
            e = _best(count, choice)
            if e < 0:
                e = _unused(ids, j)
            factor = peek32(x + 4 * e)
            if kind == _SPARSEMIXER:
                factor = share(count, x, choice, x + 4 * e, field(row, layout.MARGIN))
            poke32(choice + 4 * e, _MINUS_INFINITY)
            poke32(ids + 4 * j, e)
            poke32(factors + 4 * j, factor)
        renormalize, least = field(row, layout.RENORMALIZE), field(row, layout.LEAST_SUM)
        finished(top_k, factors, renormalize, least, field(row, layout.FACTOR_SCALE))
    return 0


# ---- the order of items ----


@inline
def _sort(tid: int, row: int, context: int, counter: int) -> int:
    """Sort the items by expert, on one thread. X: ids of the experts.

    ACTIVE: the number of experts that have rows, then for each of them its id, its first item and its number of items.
    SOURCE: the pair of each item. PLACE: the item of each pair. COUNTS: scratch.
    """
    if tid:
        return 0
    count, top_k, rows = field(row, layout.EXPERTS), field(row, layout.TOP_K), count_rows(row, context)
    counts, active, least = field(row, layout.COUNTS), field(row, layout.ACTIVE), field(row, layout.FIRST_EXPERT)
    source, place = field(row, layout.SOURCE), field(row, layout.PLACE)
    for e in range(count):
        poke(counts + 8 * e, 0)
    for r in range(rows):
        for j in range(top_k):
            e = peek32(field(row, layout.X) + r * field(row, layout.X_STRIDE) + 4 * j) - least
            if 0 <= e < count:
                poke(counts + 8 * e, peek(counts + 8 * e) + 1)
    first, used = 0, 0
    for e in range(count):
        own = peek(counts + 8 * e)
        if own:
            poke(active + 8 + 24 * used, e)
            poke(active + 16 + 24 * used, first)
            poke(active + 24 + 24 * used, own)
            used += 1
        poke(counts + 8 * e, first)
        first += own
    poke(active, used)
    poke(counts + 8 * count, first)
    for r in range(rows):
        for j in range(top_k):
            e, item = peek32(field(row, layout.X) + r * field(row, layout.X_STRIDE) + 4 * j) - least, -1
            if 0 <= e < count:
                item = peek(counts + 8 * e)
                poke(counts + 8 * e, item + 1)
                poke(source + 8 * item, r * top_k + j)
            poke(place + 8 * (r * top_k + j), item)
    return 0


@inline
def _num_items(row: int) -> int:
    """Return the number of items of the step."""
    return int(peek(field(row, layout.COUNTS) + 8 * field(row, layout.EXPERTS)))


@inline
def _row_of(row: int, item: int) -> int:
    """Return the address of the input row of an item. SOURCE 0: rows are items already."""
    source = field(row, layout.SOURCE)
    r = peek(source + 8 * item) // field(row, layout.TOP_K) if source else item
    return int(field(row, layout.X) + r * field(row, layout.X_STRIDE))


@inline
def _scaled_row(tid: int, row: int, context: int, item: int) -> int:
    """Return the address of the input row of an item, which is in scratch if FACTORS multiply the inputs."""
    x, factors = _row_of(row, item), field(row, layout.FACTORS)
    if not factors:
        return int(x)
    pair, top_k = peek(field(row, layout.SOURCE) + 8 * item), field(row, layout.TOP_K)
    scratch = field(context, layout.ROW) + tid * field(context, layout.ROW_SIZE)
    factor = factors + pair // top_k * field(row, layout.FACTORS_STRIDE) + pair % top_k * 4
    scale(field(row, layout.WIDTH) // 16, x, peek32(factor), scratch)
    return int(scratch)


@inline
def _spread(tid: int, row: int, context: int, counter: int) -> int:
    """Write the input of each item, as float32 or int8."""
    width, stride, scales = field(row, layout.WIDTH), field(row, layout.OUT_STRIDE), field(row, layout.OUT_SCALES)
    for item in range(tid, _num_items(row), peek(context + _THREADS)):
        x, out = _scaled_row(tid, row, context, item), field(row, layout.OUT) + item * stride
        if scales:
            quantize(width // 32, x, out, scales + item * (width // 4))
        else:
            copy(width // 16, x, out)
    return 0


def _spread_narrow(isa: Isa) -> Function:
    to_bf16 = emit(3, narrow)

    def rows_to_bf16(tid, row, context, counter):  # type: ignore[no-untyped-def]
        width, stride = field(row, layout.WIDTH), field(row, layout.OUT_STRIDE)
        for item in range(tid, _num_items(row), peek(context + _THREADS)):
            to_bf16(width, _scaled_row(tid, row, context, item), field(row, layout.OUT) + item * stride)
        return 0

    return kernel(f"spread_narrow_{isa.name}", compiled(f"spread_narrow_{isa.name}_body", rows_to_bf16))


# ---- products ----


def _experts(name: str, isa: Isa) -> Function:
    multiply: Function = product(isa, form_named(name))

    def experts(tid, row, context, counter):  # type: ignore[no-untyped-def]
        columns, panels, size = field(row, layout.WIDTH), field(row, layout.PANELS), field(row, layout.PANEL_BYTES)
        xs, os, gated = field(row, layout.X_STRIDE), field(row, layout.OUT_STRIDE), field(row, layout.GATED)
        scratch = field(context, layout.TILE) + tid * field(context, layout.TILE_SIZE)
        groups, active = (panels + _PANELS - 1) // _PANELS, field(row, layout.ACTIVE)
        while True:
            i = atomic_add(counter, 1)
            if i >= peek(active) * groups:
                return 0
            at, p = active + 8 + 24 * (i // groups), i % groups * _PANELS
            e, first, rows, n = peek(at), peek(at + 8), peek(at + 16), min(_PANELS, panels - p)
            weight = peek(field(row, layout.WEIGHT) + 8 * e) + p * size
            base, step = peek(context + _ZEROS), 0
            if field(row, layout.BIAS):
                base, step = peek(field(row, layout.BIAS) + 8 * e) + p * 64, 64
            x, scales = field(row, layout.X) + first * xs, field(row, layout.X_SCALES) + first * (xs // 4)
            out = field(row, layout.OUT) + first * os
            o, s = (scratch, 64 * _PANELS) if gated else (out + p * 64, os)
            multiply(rows, columns, weight, size, n, x, xs, scales, base, 0, step, o, s)
            if gated:
                limit, offset = field(row, layout.LIMIT), field(row, layout.UP_OFFSET)
                if limit or offset:
                    bounded(2 * rows, o, limit, offset)
                gate_rows(rows, p, o, field(row, layout.ACT), out, os, 0)
            elif field(row, layout.ACT):
                for r in range(rows):
                    activate(field(row, layout.ACT), n, o + r * s, o + r * s)

    return kernel(f"experts_{name}_{isa.name}", compiled(f"experts_{name}_{isa.name}_body", experts))


@inline
def _combine(tid: int, row: int, context: int, counter: int) -> int:
    """Sum the results of each row's items, times FACTORS if set, in the order in which the experts were chosen."""
    top_k, vectors = field(row, layout.TOP_K), field(row, layout.WIDTH) // 16
    for r in range(tid, count_rows(row, context), peek(context + _THREADS)):
        out = field(row, layout.OUT) + r * field(row, layout.OUT_STRIDE)
        factors = field(row, layout.FACTORS)
        factors += r * field(row, layout.FACTORS_STRIDE) if factors else 0
        clear(vectors, out)
        for j in range(top_k):
            item = peek(field(row, layout.PLACE) + 8 * (r * top_k + j))
            if item < 0:
                continue
            y = field(row, layout.X) + item * field(row, layout.X_STRIDE)
            if factors:
                add_scaled(vectors, y, peek32(factors + 4 * j), out)
            else:
                add(vectors, y, out, out)
    return 0


KERNELS = {
    "route": kernel("route", _route),
    "sort_items": kernel("sort_items", _sort),
    "spread": kernel("spread", _spread),
    "combine": kernel("combine", _combine),
}


def kernels(isa: Isa) -> dict[str, Callable[[], Function]]:
    """Return makers of experts_<form> and, for bfloat16 pairs, spread_narrow."""
    names = [name for name in NAMES if isa.pairs or name != PAIRS.name]
    made: dict[str, Callable[[], Function]] = {f"experts_{name}": partial(_experts, name, isa) for name in names}
    return made | ({"spread_narrow": partial(_spread_narrow, isa)} if isa.pairs else {})
