"""Kernels of single rows: embedding, norm, activation, selection of rows; and writes to block tables."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ACTS = ("silu", "relu", "relu2", "gelu", "gelu_new", "gelu_pytorch_tanh")


@triton.jit
def embed_rows(pairs_ptr, tokens_ptr, table_ptr, out_ptr, tokens_stride, scale,
               WIDTH: tl.constexpr, BLOCK: tl.constexpr, BY_POSITION: tl.constexpr):  # fmt: skip
    """Set out[t] = table[id of token t] · scale, or with BY_POSITION table[position of token t] · scale. Grid (T,)."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(pairs_ptr + 2 * t).to(tl.int64)
    row = tl.load(pairs_ptr + 2 * t + 1).to(tl.int64)
    if not BY_POSITION:
        row = tl.load(tokens_ptr + slot * tokens_stride + row).to(tl.int64)
    for start in tl.static_range(0, WIDTH, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(table_ptr + row * WIDTH + c, mask=c < WIDTH, other=0.0).to(tl.float32) * scale
        tl.store(out_ptr + t * WIDTH + c, x.to(out_ptr.dtype.element_ty), mask=c < WIDTH)


@triton.jit
def norm_rows(x_ptr, y_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr, x_stride, y_stride, eps,
              WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, CENTER: tl.constexpr,
              BIAS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
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
    if CENTER:
        x = tl.where(ok, x - tl.sum(x, 0) / WIDTH, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps) * tl.load(weight_ptr + c, mask=ok, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + c, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + r * WIDTH + c, y.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def norm_heads(x_ptr, weight_ptr, out_ptr, x_stride, eps, HEADS: tl.constexpr, D: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Set out to the RMS norm of each head of x, if attention does not include it. Grid (rows, HEADS)."""
    r, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK)
    ok = c < D
    x = tl.load(x_ptr + r * x_stride + h * D + c, mask=ok, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * tl.load(weight_ptr + c, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + (r * HEADS + h) * D + c, y.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def activated(x, ACT: tl.constexpr):
    """Apply an activation, by its name in transformers."""
    if ACT == "silu":
        return x / (1.0 + tl.exp(-x))
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
