"""Kernels of single rows: embedding, norm, activation, selection of rows; and writes to block tables."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ACTS = (
    "silu", "quick_gelu", "linear", "relu", "sigmoid", "relu2", "gelu", "gelu_new", "gelu_pytorch_tanh",
)  # fmt: skip


@triton.jit(do_not_specialize=["first"])
def embed_rows(pairs_ptr, tokens_ptr, table_ptr, out_ptr, tokens_stride, scale, most, first,
               WIDTH: tl.constexpr, BLOCK: tl.constexpr, BY_POSITION: tl.constexpr, BOUND: tl.constexpr,
               PART: tl.constexpr):  # fmt: skip
    """Set out[t] = table[id of token t] · scale, or with BY_POSITION table[position of token t] · scale. With BOUND ids
    that are not less than `most` count as 0. If PART, the table has so many rows from `first` on; others are zeros.
    Grid (T,).
    """
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(pairs_ptr + 2 * t).to(tl.int64)
    row = tl.load(pairs_ptr + 2 * t + 1).to(tl.int64)
    if not BY_POSITION:
        row = tl.load(tokens_ptr + slot * tokens_stride + row).to(tl.int64)
    if BOUND:
        row = tl.where(row < most, row, 0)
    if PART:
        row -= first
        scale = tl.where((row >= 0) & (row < PART), scale, 0.0)
        row = tl.where((row >= 0) & (row < PART), row, 0)
    for start in tl.static_range(0, WIDTH, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(table_ptr + row * WIDTH + c, mask=c < WIDTH, other=0.0).to(tl.float32) * scale
        tl.store(out_ptr + t * WIDTH + c, x.to(out_ptr.dtype.element_ty), mask=c < WIDTH)


@triton.jit
def normed(x, c, ok, weight_ptr, bias_ptr, eps, WIDTH: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr,
           BIAS: tl.constexpr):  # fmt: skip
    """Return the norm of a row x, whose columns c are those below WIDTH where `ok` is true, and 0 elsewhere."""
    if CENTER:
        x = tl.where(ok, x - tl.sum(x, 0) / WIDTH, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    if WEIGHT:
        y *= tl.load(weight_ptr + c, mask=ok, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + c, mask=ok, other=0.0).to(tl.float32)
    return y


@triton.jit
def norm_rows(x_ptr, y_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr, x_stride, y_stride, eps,
              WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, CENTER: tl.constexpr,
              WEIGHT: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Set out = norm(x), or with ADD total = x + y, out = norm(total). RMS, or LayerNorm if CENTER. Grid (rows,)."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    ok = c < WIDTH
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + r * x_stride + c, mask=ok, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(y_ptr + r * y_stride + c, mask=ok, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + r * WIDTH + c, total, mask=ok)
        x = total.to(tl.float32)
    y = normed(x, c, ok, weight_ptr, bias_ptr, eps, WIDTH, CENTER, WEIGHT, BIAS)
    tl.store(out_ptr + r * WIDTH + c, y.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def norm_heads(x_ptr, weight_ptr, bias_ptr, out_ptr, x_stride, weight_step, bias_step, eps, HEADS: tl.constexpr,
               D: tl.constexpr, BLOCK: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr,
               BIAS: tl.constexpr):  # fmt: skip
    """Set out to the norm of each head of x, if attention does not include it: RMS, or LayerNorm if CENTER.

    Numbers of weight and bias from one head to the next: `weight_step`, `bias_step`; 0: all heads share them. Grid
    (rows, HEADS).
    """
    r, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK)
    ok = c < D
    x = tl.load(x_ptr + r * x_stride + h * D + c, mask=ok, other=0.0).to(tl.float32)
    if CENTER:
        x = tl.where(ok, x - tl.sum(x, 0) / D, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    if WEIGHT:
        y *= tl.load(weight_ptr + h * weight_step + c, mask=ok, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + h * bias_step + c, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + (r * HEADS + h) * D + c, y.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def rotate_heads(x_ptr, out_ptr, pairs_ptr, cos_ptr, sin_ptr, x_stride, HEADS: tl.constexpr, D: tl.constexpr,
                 HALF: tl.constexpr, ROPE: tl.constexpr):  # fmt: skip
    """Set out to the rotated heads of x, if attention does not include that. ROPE: as of `heads.rotated`. HALF: at
    least D / 2. Grid (T, HEADS).
    """
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(pairs_ptr + 2 * t + 1).to(tl.int64)
    j = tl.arange(0, HALF)
    ok = j < D // 2
    first, second = j, D // 2 + j
    if ROPE < 0:
        first = tl.where(j < -ROPE // 2, 2 * j, -ROPE // 2 + j)
        second = tl.where(j < -ROPE // 2, 2 * j + 1, second)
    else:
        first = tl.where(j < ROPE // 2, j, ROPE // 2 + j)
        second = tl.where(j < ROPE // 2, ROPE // 2 + j, second)
    cos = tl.load(cos_ptr + position * (D // 2) + j, mask=ok, other=0.0)
    sin = tl.load(sin_ptr + position * (D // 2) + j, mask=ok, other=0.0)
    a = tl.load(x_ptr + t * x_stride + h * D + first, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + t * x_stride + h * D + second, mask=ok, other=0.0).to(tl.float32)
    to = out_ptr + (t * HEADS + h) * D
    kind: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(to + first, (a * cos - b * sin).to(kind), mask=ok)
    tl.store(to + second, (b * cos + a * sin).to(kind), mask=ok)


@triton.jit
def scale_rows(x_ptr, out_ptr, pairs_ptr, x_stride, beta, LENGTH: tl.constexpr, OFFSET: tl.constexpr,
               WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Set out[t] = x[t] · (1 + beta · ln(1 + (position of token t + OFFSET) // LENGTH)). Grid (T, WIDTH / BLOCK)."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    times = (tl.load(pairs_ptr + 2 * t + 1) + OFFSET) // LENGTH
    factor = 1.0 + beta * tl.log(1.0 + times.to(tl.float32))
    x = tl.load(x_ptr + t * x_stride + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * WIDTH + c, (x * factor).to(out_ptr.dtype.element_ty), mask=c < WIDTH)


@triton.jit
def activated(x, ACT: tl.constexpr):
    """Apply an activation, by its name in transformers."""
    if ACT == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACT == "quick_gelu":
        return x / (1.0 + tl.exp(-1.702 * x))
    elif ACT == "linear":
        return x
    elif ACT == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-x))
    elif ACT == "relu":
        return tl.maximum(x, 0.0)
    elif ACT == "relu2":
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * inner))  # 0.5 · (1 + tanh(inner))


@triton.jit
def gated(gate, up, limit, offset, ACT: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr):
    """Return act(gate) · (up + offset), with LIMIT of bounded values; act(gate) unless GATED."""
    if not GATED:
        return activated(gate, ACT)
    if LIMIT:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    return activated(gate, ACT) * (up + offset)


@triton.jit
def gate_rows(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
              ACT: tl.constexpr):  # fmt: skip
    """Set out = act(gate) · up. Grid (rows, WIDTH / BLOCK)."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = c < WIDTH
    gate = tl.load(gate_ptr + r * gate_stride + c, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + r * up_stride + c, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + r * WIDTH + c, (activated(gate, ACT) * up).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def softplus(x):
    """Return ln(1 + exp(x))."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def xielu_rows(x_ptr, positive_ptr, negative_ptr, out_ptr, x_stride, WIDTH: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Set out = xIELU(x), whose slopes are the softplus of two numbers. Grid (rows, WIDTH / BLOCK)."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    above = softplus(tl.load(positive_ptr).to(tl.float32))
    below = 0.5 + softplus(tl.load(negative_ptr).to(tl.float32))
    x = tl.load(x_ptr + r * x_stride + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    under = tl.minimum(x, -1e-6)
    # exp(x) − 1, by its series where the subtraction would cancel
    shrunk = tl.where(under > -0.03, under * (1.0 + under * (0.5 + under * (1 / 6 + under / 24))), tl.exp(under) - 1.0)
    y = tl.where(x > 0, above * x * x, (shrunk - x) * below) + 0.5 * x
    tl.store(out_ptr + r * WIDTH + c, y.to(out_ptr.dtype.element_ty), mask=c < WIDTH)


@triton.jit
def take_rows(x_ptr, rows_ptr, out_ptr, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
              SOME: tl.constexpr):  # fmt: skip
    """Set out[r] = x[rows[r]] with SOME, else x[r]. Grid (R, WIDTH / BLOCK)."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = r
    if SOME:
        row = tl.load(rows_ptr + r).to(tl.int64)
    x = tl.load(x_ptr + row * x_stride + c, mask=c < WIDTH, other=0.0)
    tl.store(out_ptr + r * WIDTH + c, x, mask=c < WIDTH)


@triton.jit(do_not_specialize=["n"])
def write_blocks(changes_ptr, tables_ptr, table_stride, n, BLOCK: tl.constexpr):
    """Set tables[slot, index] = block for n distinct entries (slot, index, block). Grid (n / BLOCK,)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < n
    slot = tl.load(changes_ptr + 3 * i, mask=ok, other=0).to(tl.int64)
    index = tl.load(changes_ptr + 3 * i + 1, mask=ok, other=0)
    tl.store(tables_ptr + slot * table_stride + index, tl.load(changes_ptr + 3 * i + 2, mask=ok, other=0), mask=ok)
