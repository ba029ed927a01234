"""Matrix kernels for every form of weights: plain and gated products, products by head, and embedding lookup.

Threads take a few panels at a time from the counter of the table row. A form has tiles of 1, 2, 4 and (with long
registers) 8 rows. Invariant: the result of a row does not depend on the tile that computes it. Products with bfloat16
pairs read activations that the kernel `narrow` converted to bfloat16 before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.dense_tiles import narrow
from tokenmill.backends.cpu.forms import FLOATS, NAMES, PAIRS, DenseForm, Form, form_named
from tokenmill.backends.cpu.ir import atomic_add, clear, compiled, emit, field, inline, kernel, peek, peek32
from tokenmill.backends.cpu.isa import Isa
from tokenmill.backends.cpu.rows import activate, add, gate, quantize, scale
from tokenmill.backends.cpu.tiles import look_up, max_rows, tile

Function = Callable[..., Any]

_FAR = 1 << 18  # bytes of x that stay in a near cache while several panels are multiplied with it
_FEW, _ROW, _PIECE = layout.FEW, 8, 4
_TOKENS, _SAMPLES, _THREADS, _ZEROS = (8 * w for w in (layout.TOKENS, layout.SAMPLES, layout.THREADS, layout.ZEROS))


@inline
def count_rows(row: int, context: int) -> int:
    """Return the number of rows that a table row processes."""
    return int(peek(context + _SAMPLES) if field(row, layout.ROWS) else peek(context + _TOKENS))


@inline
def private_copy(row: int, tid: int, rows: int, column: int, base: int, size: int) -> int:
    """Return the address of a thread's private copy if there is one, else `base`. `size`: bytes of a row."""
    copy_of_first = field(row, column) - 1
    return base + (copy_of_first + tid) * _FEW * size if copy_of_first >= 0 and rows <= _FEW else base


@inline
def _input_address(tid: int, row: int, rows: int, context: int) -> int:
    """Return the address of a product's x."""
    return private_copy(row, tid, rows, layout.PRIVATE_X, field(row, layout.X), field(row, layout.X_STRIDE))


@inline
def _bf16_address(tid: int, row: int, rows: int, context: int) -> int:
    """Return the address of a product's x in bfloat16."""
    return field(context, layout.NARROW) + (tid * field(context, layout.NARROW_SIZE) if rows <= _FEW else 0)


def product(isa: Isa, form: Form | DenseForm) -> Function:
    """Make a function that computes out = base + x · weightᵀ for panels of 16 outputs.

    Its parameters: (rows, columns, weight, bytes of a panel, panels, x, stride, scales, base, stride, step, out,
    stride). `step`: bytes from the base of a panel to the base of the next one, 0 or 64.
    """
    most = max_rows(isa, form)
    t1, t2, t4, t8 = (emit(10, tile(isa, form, min(rows, most))) for rows in (1, 2, 4, 8))

    def multiply_panel(rows, columns, w, x, xs, s, ss, base, bs, out, os) -> None:  # type: ignore[no-untyped-def]
        r = 0
        while rows - r >= most:
            t8(columns, w, x + r * xs, xs, s + r * ss, ss, base + r * bs, bs, out + r * os, os)
            r += most
        if most > 4 and rows - r >= 4:
            t4(columns, w, x + r * xs, xs, s + r * ss, ss, base + r * bs, bs, out + r * os, os)
            r += 4
        if rows - r >= 2:
            t2(columns, w, x + r * xs, xs, s + r * ss, ss, base + r * bs, bs, out + r * os, os)
            r += 2
        if rows - r >= 1:
            t1(columns, w, x + r * xs, xs, s + r * ss, ss, base + r * bs, bs, out + r * os, os)

    panel: Function = compiled(f"panel_{form.name}_{isa.name}", multiply_panel, inside=True)

    def panels(rows, columns, w, size, count, x, xs, s, base, bs, step, out, os):  # type: ignore[no-untyped-def]
        chunk_rows = rows if rows * xs <= _FAR else max(_ROW, _FAR // xs // _ROW * _ROW)
        for r in range(0, rows, chunk_rows):
            n, ss = min(chunk_rows, rows - r), xs // 4
            for p in range(count):
                b, o = base + r * bs + p * step, out + r * os + p * 64
                panel(n, columns, w + p * size, x + r * xs, xs, s + r * ss, ss, b, bs, o, os)

    return compiled(f"product_{form.name}_{isa.name}", panels, inside=True)


def _linear(isa: Isa, form: Form | DenseForm) -> Function:
    multiply: Function = product(isa, form)
    address_of_x: Function = _bf16_address if form == PAIRS else _input_address

    def linear(tid, row, context, counter):  # type: ignore[no-untyped-def]
        rows, columns, panels = count_rows(row, context), field(row, layout.WIDTH), field(row, layout.PANELS)
        xs, out, os = field(row, layout.X_STRIDE), field(row, layout.OUT), field(row, layout.OUT_STRIDE)
        quantized, gated = field(row, layout.OUT_SCALES), field(row, layout.GATED)
        x = address_of_x(tid, row, rows, context)
        scales = private_copy(row, tid, rows, layout.PRIVATE_X, field(row, layout.X_SCALES), xs // 4)
        weight, size, act = field(row, layout.WEIGHT), field(row, layout.PANEL_BYTES), field(row, layout.ACT)
        residual, rs, bias = field(row, layout.RESIDUAL), field(row, layout.RESIDUAL_STRIDE), field(row, layout.BIAS)
        zeros, scratch = peek(context + _ZEROS), field(context, layout.TILE) + tid * field(context, layout.TILE_SIZE)
        grain = 4 if gated else _grain(rows, panels, quantized)
        while True:
            p = atomic_add(counter, 1) * grain
            if p >= panels:
                return 0
            n = min(grain, panels - p)
            o, s = (scratch, 64 * grain) if quantized or gated else (out + p * 64, os)
            base, bs, step = zeros, 0, 0
            if residual:
                base, bs, step = residual + p * 64, rs, 64
            elif bias:
                base, bs, step = bias + p * 64, 0, 64
            multiply(rows, columns, weight + p * size, size, n, x, xs, scales, base, bs, step, o, s)
            if gated:
                gate_rows(rows, p, o, act, out, os, quantized)
            elif act or quantized or (bias and residual):
                _finish(rows, p, n, o, s, act, bias if residual else 0, out, os, quantized)

    return compiled(f"linear_{form.name}_{isa.name}_body", linear)


@inline
def _grain(rows: int, panels: int, quantized: int) -> int:
    """Return the panels that a thread takes at a time: few, so that no thread waits long at the barrier.

    The number is even if outputs are quantized, because a block of 32 outputs is two panels.
    """
    if quantized:
        return 4 if rows > 64 and panels >= 64 else 2
    if panels > 1000:
        return 16
    if rows > 64 and panels >= 64:
        return 4
    return 3 if rows <= 8 and panels > 40 else 1


@inline
def _finish(rows: int, p: int, n: int, o: int, s: int, act: int, bias: int, out: int, os: int, quantized: int) -> None:
    """Apply bias, activation and quantization to n panels from p on. `o`: their address; `s`: bytes from row to row."""
    for r in range(rows):
        a = o + r * s
        if bias:
            add(n, a, bias + p * 64, a)
        activate(act, n, a, a)
        for q in range(0, n if quantized else 0, 2):
            at = r * os + (p + q) * 16
            quantize(1, a + q * 64, out + at, quantized + at // 4)


@inline
def gate_rows(rows: int, p: int, o: int, act: int, out: int, os: int, quantized: int) -> None:
    """Compute 32 gated outputs from the four panels from p on: two of gate, two of up.

    `o`: their address; rows are 256 bytes apart.
    """
    for r in range(rows):
        a, at = o + r * 256, r * os + p * 8
        if quantized:
            gate(act, 2, a, a + 128, a)
            quantize(1, a, out + at, quantized + at // 4)
        else:
            gate(act, 2, a, a + 128, out + r * os + p * 32)


def _embed(isa: Isa, form: Form | DenseForm) -> Function:
    take = emit(5, look_up(form))

    def embed(tid, row, context, counter):  # type: ignore[no-untyped-def]
        rows, columns = count_rows(row, context), field(row, layout.WIDTH)
        table, size, factor = (
            field(row, layout.TABLE),
            field(row, layout.TABLE_PANEL_BYTES),
            field(row, layout.TABLE_SCALE),
        )
        positions, slots = field(context, layout.POSITIONS), field(context, layout.SEQUENCES)
        within, first, held = (
            field(row, layout.ROWS_WITHIN), field(row, layout.FIRST_ID), field(row, layout.TABLE_ROWS),
        )  # fmt: skip
        known, stride = field(context, layout.TOKEN_IDS), field(context, layout.TOKEN_IDS_STRIDE)
        for r in range(tid, rows, peek(context + _THREADS)):
            out, index = field(row, layout.OUT) + r * field(row, layout.OUT_STRIDE), peek(positions + 8 * r)
            if not field(row, layout.BY_POSITION):
                index = peek32(known + peek(slots + 8 * r) * stride + index * 4)
                index = 0 if within and index >= within else index
            if held and not first <= index < first + held:  # a row of another rank's table
                clear((columns + 15) // 16, out)
                continue
            take(index - first, columns, size, table, out)
            if factor:
                scale((columns + 15) // 16, out, factor, out)
        return 0

    return compiled(f"embed_{form.name}_{isa.name}_body", embed)


def _heads(isa: Isa, form: Form | DenseForm) -> Function:
    multiply: Function = product(isa, form)

    def heads(tid, row, context, counter):  # type: ignore[no-untyped-def]
        """Multiply the columns of each head with a matrix of its own. An item is some panels of a head."""
        rows, columns, panels = count_rows(row, context), field(row, layout.WIDTH), field(row, layout.HEAD_PANELS)
        x, xs, size = field(row, layout.X), field(row, layout.X_STRIDE), field(row, layout.PANEL_BYTES)
        os, act, pieces = field(row, layout.OUT_STRIDE), field(row, layout.ACT), (panels + _PIECE - 1) // _PIECE
        while True:
            i = atomic_add(counter, 1)
            head, p = i // pieces, i % pieces * _PIECE
            if head * panels >= field(row, layout.PANELS):
                return 0
            n, w = min(_PIECE, panels - p), field(row, layout.WEIGHT) + (head * panels + p) * size
            out = field(row, layout.OUT) + head * field(row, layout.OUT_STEP) + p * 64
            base, step = peek(context + _ZEROS), 0
            if field(row, layout.BIAS):
                base, step = field(row, layout.BIAS) + (head * panels + p) * 64, 64
            start = x + head * field(row, layout.X_STEP)
            multiply(rows, columns, w, size, n, start, xs, 0, base, 0, step, out, os)
            for r in range(rows if act else 0):
                activate(act, n, out + r * os, out + r * os)

    return compiled(f"heads_{form.name}_{isa.name}_body", heads)


def _narrow(isa: Isa) -> Function:
    to_bf16 = emit(3, narrow)

    def rows_to_bf16(tid, row, context, counter):  # type: ignore[no-untyped-def]
        rows, columns, stride = count_rows(row, context), field(row, layout.WIDTH), field(row, layout.OUT_STRIDE)
        x, xs, out = (
            _input_address(tid, row, rows, context),
            field(row, layout.X_STRIDE),
            _bf16_address(tid, row, rows, context),
        )
        if rows <= _FEW:
            for r in range(rows):
                to_bf16(columns, x + r * xs, out + r * stride)
            return 1
        while True:
            first = atomic_add(counter, 1) * _ROW
            if first >= rows:
                return 0
            for r in range(first, min(rows, first + _ROW)):
                to_bf16(columns, x + r * xs, out + r * stride)

    return kernel(f"narrow_{isa.name}", compiled(f"narrow_{isa.name}_body", rows_to_bf16))


_KINDS = {"linear": _linear, "embed": _embed, "heads": _heads}


def _make(kind: str, name: str, isa: Isa) -> Function:
    return kernel(f"{kind}_{name}_{isa.name}", _KINDS[kind](isa, form_named(name)))


def kernels(isa: Isa) -> dict[str, Callable[[], Function]]:
    """Return makers of linear_<form> (plain and gated), embed_<form>, heads_<form> and, for bfloat16 pairs, narrow."""
    names = [name for name in NAMES if isa.pairs or name != PAIRS.name]
    made: dict[str, Callable[[], Function]] = {
        f"{kind}_{name}": partial(_make, kind, name, isa)
        for kind in _KINDS
        for name in (FLOATS if kind == "heads" else names)
    }
    return made | ({"narrow": partial(_narrow, isa)} if isa.pairs else {})
