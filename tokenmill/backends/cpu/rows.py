"""Row-wise kernels: norms, activations, sums, quantization and selection of rows.

Threads divide the work by rows. Invariant: the result of a row does not depend on the other rows or on the thread.
Other kernels call the operations (`quantize`, `rms_norm` …). The columns of the kernels' table rows are in `layout.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.ir import (
    Emitter,
    Val,
    atomic_add,
    copy,
    each,
    emit,
    f32,
    f32x16,
    inline,
    kernels_of,
    peek,
    peek32,
)
from tokenmill.backends.cpu.isa import Isa
from tokenmill.backends.cpu.vectors import ACTS, logistic, quantize_block, xielu

# ---- activations ----


def _activating(act: int) -> Callable[[Emitter, Val, Val, Val], None]:
    return lambda g, i, x, out: g.put(ACTS[act](g, g.vec(x, i)), out, i)


def _gating(act: int) -> Callable[[Emitter, Val, Val, Val, Val], None]:
    return lambda g, i, x, y, out: g.put(g.b.fmul(ACTS[act](g, g.vec(x, i)), g.vec(y, i)), out, i)


_gelu_tanh, _gelu_erf, _relu, _relu2 = (each(2, _activating(act)) for act in ACTS)
_gelu_tanh_gate, _gelu_erf_gate, _relu_gate, _relu2_gate = (each(3, _gating(act)) for act in ACTS)
_logistic = each(3, lambda g, i, x, act, out: g.put(logistic(g, g.vec(x, i), act), out, i))
_logistic_gate = each(
    4, lambda g, i, x, y, act, out: g.put(g.b.fmul(logistic(g, g.vec(x, i), act), g.vec(y, i)), out, i)
)
multiply = each(3, lambda g, i, x, y, out: g.put(g.b.fmul(g.vec(x, i), g.vec(y, i)), out, i))
"""(vectors, x, y, out): x · y"""
GELU_TANH, GELU_ERF, RELU, RELU2 = ACTS  # numba reads globals of this module
NO_ACT, LINEAR = layout.NO_ACT, layout.LINEAR


@inline
def activate(act: int, n: int, x: int, out: int) -> None:
    """Apply an activation to n vectors. `out` may be `x`. NO_ACT does nothing."""
    if act == NO_ACT:
        return
    if act == LINEAR:
        copy(n, x, out)
    elif act == GELU_TANH:
        _gelu_tanh(n, x, out)
    elif act == GELU_ERF:
        _gelu_erf(n, x, out)
    elif act == RELU:
        _relu(n, x, out)
    elif act == RELU2:
        _relu2(n, x, out)
    else:
        _logistic(n, x, act, out)


@inline
def gate(act: int, n: int, x: int, y: int, out: int) -> None:
    """Compute act(x) · y of n vectors. `out` may be `x` or `y`."""
    if act == LINEAR:
        multiply(n, x, y, out)
    elif act == GELU_TANH:
        _gelu_tanh_gate(n, x, y, out)
    elif act == GELU_ERF:
        _gelu_erf_gate(n, x, y, out)
    elif act == RELU:
        _relu_gate(n, x, y, out)
    elif act == RELU2:
        _relu2_gate(n, x, y, out)
    else:
        _logistic_gate(n, x, y, act, out)


# ---- quantization ----


def _quantize(g: Emitter, n: Val, x: Val, codes: Val, scales: Val) -> None:
    def block(i: Val, _: list[Val]) -> None:
        at = g.at(x, g.b.mul(i, g.c(128)))
        low, high = g.ld(f32x16, at), g.ld(f32x16, at, 64)
        quantize_block(g, low, high, g.at(codes, g.b.mul(i, g.c(32))), g.at(scales, g.b.mul(i, g.c(8))))

    g.loop(n, (), block)


quantize = emit(4, _quantize)
"""(blocks of 32, x, codes, scales): quantize float32 to int8, see `vectors.quantize_block`"""

# ---- norms: two passes over the row (three if centered), then one that writes ----


def _statistics(g: Emitter, n: Val, x: Val, eps: Val, center: bool) -> tuple[Val, Val]:
    """Emit mean and 1 / standard deviation of n vectors, in all lanes. Without `center` the mean is 0."""
    b = g.b
    width = b.sitofp(b.mul(n, g.c(16)), f32)
    mean = g.k(f32x16, 0.0)
    if center:
        total = g.loop(n, [g.k(f32x16, 0.0)], lambda i, p: [b.fadd(p[0], g.vec(x, i))])
        mean = g.splat(b.fdiv(g.rsum(total[0]), width))

    def square(i: Val, p: list[Val]) -> list[Val]:
        v = b.fsub(g.vec(x, i), mean) if center else g.vec(x, i)
        return [g.fma(v, v, p[0])]

    squares = g.rsum(g.loop(n, [g.k(f32x16, 0.0)], square)[0])
    return mean, g.splat(b.fdiv(g.f(1.0), g.each_lane("sqrt", b.fadd(b.fdiv(squares, width), g.bits(eps)))))


Normed = Callable[[Val, int], Val]


def _normed(g: Emitter, n: Val, x: Val, weight: Val, bias: Val | None, eps: Val) -> Normed:
    """Return a function that emits vector i + k of the normalized row: LayerNorm if there is a bias, else RMSNorm."""
    b = g.b
    mean, factor = _statistics(g, n, x, eps, bias is not None)

    def at(i: Val, k: int = 0) -> Val:
        v, w = g.vec(x, i, 64 * k), g.vec(weight, i, 64 * k)
        if bias is None:
            return b.fmul(b.fmul(v, factor), w)
        return b.fadd(b.fmul(b.fmul(b.fsub(v, mean), factor), w), g.vec(bias, i, 64 * k))

    return at


def _to_floats(g: Emitter, n: Val, x: Val, weight: Val, bias: Val | None, out: Val, eps: Val) -> None:
    at = _normed(g, n, x, weight, bias, eps)
    g.loop(n, (), lambda i, _: g.put(at(i, 0), out, i))


def _to_codes(g: Emitter, n: Val, x: Val, weight: Val, bias: Val | None, codes: Val, scales: Val, eps: Val) -> None:
    b, at = g.b, _normed(g, n, x, weight, bias, eps)

    def block(i: Val, _: list[Val]) -> None:
        two = b.shl(i, g.c(1))
        quantize_block(g, at(two, 0), at(two, 1), g.at(codes, b.mul(i, g.c(32))), g.at(scales, b.mul(i, g.c(8))))

    g.loop(b.lshr(n, g.c(1)), (), block)


rms_norm = emit(5, lambda g, n, x, w, out, eps: _to_floats(g, n, x, w, None, out, eps))
"""(vectors, x, weight, out, bits of eps): RMSNorm; `out` may be `x`"""
layer_norm = emit(6, lambda g, n, x, w, bias, out, eps: _to_floats(g, n, x, w, bias, out, eps))
_rms_codes = emit(6, lambda g, n, x, w, codes, scales, eps: _to_codes(g, n, x, w, None, codes, scales, eps))
_layer_codes = emit(7, lambda g, n, x, w, bias, c, s, eps: _to_codes(g, n, x, w, bias, c, s, eps))

add = each(3, lambda g, i, x, y, out: g.put(g.b.fadd(g.vec(x, i), g.vec(y, i)), out, i))
"""(vectors, x, y, out): x + y"""
scale = each(3, lambda g, i, x, s, out: g.put(g.b.fmul(g.vec(x, i), g.splat(g.bits(s))), out, i))
"""(vectors, x, bits of a float, out): multiply by a scalar"""

add_scaled = each(3, lambda g, i, x, s, out: g.put(g.fma(g.vec(x, i), g.splat(g.bits(s)), g.vec(out, i)), out, i))
"""(vectors, x, bits of a float, out): out += x · float"""


def capped(g: Emitter, x: Val, cap: Val) -> Val:
    """Emit the soft cap: cap · tanh(x / cap)."""
    return g.b.fmul(g.tanh(g.b.fdiv(x, cap)), cap)


_xielu = each(3, lambda g, i, x, slopes, out: g.put(xielu(g, g.vec(x, i), slopes), out, i))
_cap = each(3, lambda g, i, x, cap, out: g.put(capped(g, g.vec(x, i), g.splat(g.bits(cap))), out, i))

# ---- kernels ----

# Compiled Python reads byte offsets of the layout as globals of this module.
(_ROWS, _X, _X_STRIDE, _OUT, _OUT_STRIDE, _OUT_SCALES, _WIDTH, _PRIVATE_OUT) = (
    8 * c
    for c in (
        layout.ROWS,
        layout.X,
        layout.X_STRIDE,
        layout.OUT,
        layout.OUT_STRIDE,
        layout.OUT_SCALES,
        layout.WIDTH,
        layout.PRIVATE_OUT,
    )
)
(_WEIGHT, _BIAS, _EPS, _CENTER, _HEADS, _Y, _Y_STRIDE, _TOTAL, _TOTAL_STRIDE, _ACT, _FACTOR) = (
    8 * c
    for c in (
        *(layout.NORM_WEIGHT, layout.NORM_BIAS, layout.NORM_EPS, layout.CENTER, layout.HEADS),
        *(layout.Y, layout.Y_STRIDE, layout.TOTAL, layout.TOTAL_STRIDE, layout.ACT, layout.FACTOR),
    )
)
_NORM_STEP, _FACTORS, _LENGTH, _OFFSET = (
    8 * c for c in (layout.NORM_STEP, layout.POSITION_FACTORS, layout.LENGTH, layout.POSITION_OFFSET)
)
_OWN_FIRST, _OWN_STEP = 8 * layout.OWN_FIRST, 8 * layout.OWN_STEP
_POSITIONS, _THREADS, _TOKENS, _SAMPLES, _SAMPLED, _FEW = (
    8 * layout.POSITIONS,
    8 * layout.THREADS,
    8 * layout.TOKENS,
    8 * layout.SAMPLES,
    8 * layout.SAMPLED,
    layout.FEW,
)


@inline
def rows_of(row: int, context: int) -> int:
    """Return the number of rows that a table row processes in this step."""
    return int(peek(context + _SAMPLES) if peek(row + _ROWS) else peek(context + _TOKENS))


@inline
def first_row(tid: int, row: int, rows: int) -> int:
    """Return the first row that a thread computes: of all, or of those of its rank."""
    return int(tid + peek(row + _OWN_FIRST) if rows > _FEW else tid)


@inline
def row_step(row: int, context: int, rows: int) -> int:
    """Return the number of rows from one that a thread computes to its next one."""
    step = peek(row + _OWN_STEP)
    return int(step if step and rows > _FEW else peek(context + _THREADS))


@inline
def _norm_row(row: int, x: int, out: int, scales: int) -> None:
    """Normalize the row at x."""
    n, weight, eps = peek(row + _WIDTH) // 16, peek(row + _WEIGHT), peek(row + _EPS)
    bias, center = peek(row + _BIAS), peek(row + _CENTER)
    if peek(row + _OUT_SCALES):
        if center:
            _layer_codes(n, x, weight, bias, out, scales, eps)
        else:
            _rms_codes(n, x, weight, out, scales, eps)
        return
    step = peek(row + _NORM_STEP)
    for h in range(max(1, peek(row + _HEADS))):
        if center:
            layer_norm(n, x + h * n * 64, weight + h * step, bias + h * step, out + h * n * 64, eps)
        else:
            rms_norm(n, x + h * n * 64, weight + h * step, out + h * n * 64, eps)


def _norm(tid: int, row: int, context: int, counter: int) -> int:
    """Normalize rows to float32 or int8; by heads only to float32."""
    rows, stride, width = rows_of(row, context), peek(row + _OUT_STRIDE), peek(row + _WIDTH)
    copy_of_first = peek(row + _PRIVATE_OUT) - 1
    alone = copy_of_first >= 0 and rows <= _FEW
    out, scales = peek(row + _OUT), peek(row + _OUT_SCALES)
    first, by = first_row(tid, row, rows), row_step(row, context, rows)
    if alone:
        rows_before = (copy_of_first + tid) * _FEW
        out, scales = out + rows_before * stride, scales + rows_before * (width // 4)
        first, by = 0, 1
    for r in range(first, rows, by):
        x = peek(row + _X) + r * peek(row + _X_STRIDE)
        _norm_row(row, x, out + r * stride, scales + r * (width // 4))
    return 1 if alone else 0


def _add_norm(tid: int, row: int, context: int, counter: int) -> int:
    """Compute total = x + y and its norm. `total` may be x or y. The norm never has private copies."""
    stride, width = peek(row + _OUT_STRIDE), peek(row + _WIDTH)
    rows = rows_of(row, context)
    for r in range(first_row(tid, row, rows), rows, row_step(row, context, rows)):
        x, y = peek(row + _X) + r * peek(row + _X_STRIDE), peek(row + _Y) + r * peek(row + _Y_STRIDE)
        total = peek(row + _TOTAL) + r * peek(row + _TOTAL_STRIDE)
        add(width // 16, x, y, total)
        _norm_row(row, total, peek(row + _OUT) + r * stride, peek(row + _OUT_SCALES) + r * (width // 4))
    return 0


def _add(tid: int, row: int, context: int, counter: int) -> int:
    """Add x and y."""
    rows = rows_of(row, context)
    for r in range(first_row(tid, row, rows), rows, row_step(row, context, rows)):
        x, y = peek(row + _X) + r * peek(row + _X_STRIDE), peek(row + _Y) + r * peek(row + _Y_STRIDE)
        add((peek(row + _WIDTH) + 15) // 16, x, y, peek(row + _OUT) + r * peek(row + _OUT_STRIDE))
    return 0


def _act(tid: int, row: int, context: int, counter: int) -> int:
    """Apply an activation."""
    rows = rows_of(row, context)
    for r in range(first_row(tid, row, rows), rows, row_step(row, context, rows)):
        x, out = peek(row + _X) + r * peek(row + _X_STRIDE), peek(row + _OUT) + r * peek(row + _OUT_STRIDE)
        activate(peek(row + _ACT), (peek(row + _WIDTH) + 15) // 16, x, out)
    return 0


def _gated_act(tid: int, row: int, context: int, counter: int) -> int:
    """Compute act(x) · y."""
    rows = rows_of(row, context)
    for r in range(first_row(tid, row, rows), rows, row_step(row, context, rows)):
        x, y = peek(row + _X) + r * peek(row + _X_STRIDE), peek(row + _Y) + r * peek(row + _Y_STRIDE)
        out = peek(row + _OUT) + r * peek(row + _OUT_STRIDE)
        gate(peek(row + _ACT), (peek(row + _WIDTH) + 15) // 16, x, y, out)
    return 0


def in_pieces(operation: Callable[..., None]) -> Callable[..., int]:
    """Return a kernel that applies an operation (vectors, x, FACTOR, out).

    Rows may be long (logits), so a work item is 64 vectors of a row.
    """

    def body(tid: int, row: int, context: int, counter: int) -> int:
        rows, n = rows_of(row, context), (peek(row + _WIDTH) + 15) // 16
        first, every, threads = peek(row + _OWN_FIRST), peek(row + _OWN_STEP), peek(context + _THREADS)
        pieces = (n + 63) // 64
        while True:
            i = atomic_add(counter, 1)
            if i >= rows * pieces:
                return 0
            r, p = i // pieces, i % pieces * 64
            if every and rows > _FEW and not first <= r % every < first + threads:
                continue  # a row of another rank
            x, out = peek(row + _X) + r * peek(row + _X_STRIDE), peek(row + _OUT) + r * peek(row + _OUT_STRIDE)
            operation(min(64, n - p), x + p * 64, peek(row + _FACTOR), out + p * 64)

    return body


def _scale_by_position(tid: int, row: int, context: int, counter: int) -> int:
    """Multiply by the factor of the row's position: that at its index (position + offset) // LENGTH."""
    rows = rows_of(row, context)
    for r in range(first_row(tid, row, rows), rows, row_step(row, context, rows)):
        position = peek(peek(context + _POSITIONS) + r * 8) + peek(row + _OFFSET)
        factor = peek(row + _FACTORS) + position // peek(row + _LENGTH) * 4
        x, out = peek(row + _X) + r * peek(row + _X_STRIDE), peek(row + _OUT) + r * peek(row + _OUT_STRIDE)
        scale((peek(row + _WIDTH) + 15) // 16, x, peek32(factor), out)
    return 0


def _take_rows(tid: int, row: int, context: int, counter: int) -> int:
    """Copy the sampling rows."""
    rows = rows_of(row, context)
    for r in range(first_row(tid, row, rows), rows, row_step(row, context, rows)):
        x = peek(row + _X) + peek(peek(context + _SAMPLED) + r * 8) * peek(row + _X_STRIDE)
        copy((peek(row + _WIDTH) + 15) // 16, x, peek(row + _OUT) + r * peek(row + _OUT_STRIDE))
    return 0


def _quantize_rows(tid: int, row: int, context: int, counter: int) -> int:
    """Quantize rows from float32 to int8."""
    width = peek(row + _WIDTH)
    rows = rows_of(row, context)
    for r in range(first_row(tid, row, rows), rows, row_step(row, context, rows)):
        x, out = peek(row + _X) + r * peek(row + _X_STRIDE), peek(row + _OUT) + r * peek(row + _OUT_STRIDE)
        quantize(width // 32, x, out, peek(row + _OUT_SCALES) + r * (width // 4))
    return 0


_BODIES: dict[str, Callable[..., int]] = {
    "norm": _norm,
    "add_norm": _add_norm,
    "add": _add,
    "act": _act,
    "gated_act": _gated_act,
    "scale": in_pieces(scale),
    "scale_by_position": _scale_by_position,
    "soft_cap": in_pieces(_cap),
    "xielu": in_pieces(_xielu),
    "take_rows": _take_rows,
    "quantize_rows": _quantize_rows,
}


def kernels(isa: Isa) -> dict[str, Callable[[], Callable[..., int]]]:
    """Return makers by name. Their source is the same for every instruction set."""
    return kernels_of("rows", _BODIES)
