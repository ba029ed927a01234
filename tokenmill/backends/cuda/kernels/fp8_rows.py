"""Quantization of activations to e4m3: of a row on its own, behind a norm, or behind a gated activation.

The codes of each 128 columns are stored with column c beside column c + 64, as `products/fp8.py` stores weights, and
columns padded with zeros to whole 128. SCALES: "row", computed for each row; "group", for each 128 columns of it, and
stored as (groups, `scale_stride`); "given", in `scale_ptr` before the launch. Codes and scales of a row depend on no
other row.

RAW: an input is a product without its scales, which are (rows,) and (columns,).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.backends.cuda.kernels.rows import activated, normed


@triton.jit
def store_codes(y, r, codes_ptr, scale_ptr, scale_stride, KP: tl.constexpr, BLOCK: tl.constexpr,
                SCALES: tl.constexpr):  # fmt: skip
    """Store codes and scales of row r. y (BLOCK,): its numbers, and zeros behind. KP: columns of a stored row."""
    if SCALES == "group":
        groups = tl.reshape(y, [BLOCK // 128, 128])
        most = tl.maximum(tl.max(tl.abs(groups), 1), 1e-12)
        g = tl.arange(0, BLOCK // 128)
        tl.store(scale_ptr + g.to(tl.int64) * scale_stride + r, tl.div_rn(most, 448.0), mask=g < KP // 128)
        y = tl.reshape(groups * tl.div_rn(448.0, most)[:, None], [BLOCK])
    elif SCALES == "row":
        most = tl.maximum(tl.max(tl.abs(y), 0), 1e-12)
        tl.store(scale_ptr + r, tl.div_rn(most, 448.0))
        y = y * tl.div_rn(448.0, most)
    else:
        y = y * tl.div_rn(1.0, tl.load(scale_ptr + r))  # The conversion saturates.
    y = tl.reshape(tl.permute(tl.reshape(y, [BLOCK // 128, 2, 64]), (0, 2, 1)), [BLOCK])
    c = tl.arange(0, BLOCK)
    tl.store(codes_ptr + r * KP + c, y.to(tl.float8e4nv), mask=c < KP)


@triton.jit(do_not_specialize=["scale_stride"])
def quantize_rows(x_ptr, codes_ptr, scale_ptr, x_stride, scale_stride, WIDTH: tl.constexpr, KP: tl.constexpr,
                  BLOCK: tl.constexpr, SCALES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Quantize x (rows, WIDTH). Grid (rows,)."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + r * x_stride + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    store_codes(x, r, codes_ptr, scale_ptr, scale_stride, KP, BLOCK, SCALES)


@triton.jit(do_not_specialize=["scale_stride"])
def norm_codes(x_ptr, y_ptr, raw_rows_ptr, raw_columns_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr, codes_ptr,
               scale_ptr, x_stride, y_stride, eps, scale_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
               KP: tl.constexpr, ADD: tl.constexpr, RAW: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr,
               BIAS: tl.constexpr, KEEP: tl.constexpr, SCALES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Compute what `rows.norm_rows` does, y being RAW or not, and store the norm as `out` (KEEP), as codes (unless
    SCALES is ""), or as both. Grid (rows,).
    """
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    ok = c < WIDTH
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + r * x_stride + c, mask=ok, other=0.0).to(tl.float32)
    if ADD:
        y = tl.load(y_ptr + r * y_stride + c, mask=ok, other=0.0).to(tl.float32)
        if RAW:
            y *= tl.load(raw_rows_ptr + r) * tl.load(raw_columns_ptr + c, mask=ok, other=0.0)
        total = (x + y).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + r * WIDTH + c, total, mask=ok)
        x = total.to(tl.float32)
    y = normed(x, c, ok, weight_ptr, bias_ptr, eps, WIDTH, CENTER, WEIGHT, BIAS).to(out_ptr.dtype.element_ty)
    if KEEP:
        tl.store(out_ptr + r * WIDTH + c, y, mask=ok)
    if SCALES != "":
        store_codes(tl.where(ok, y.to(tl.float32), 0.0), r, codes_ptr, scale_ptr, scale_stride, KP, BLOCK, SCALES)


@triton.jit(do_not_specialize=["scale_stride"])
def gate_codes(gate_ptr, up_ptr, raw_rows_ptr, raw_columns_ptr, codes_ptr, scale_ptr, gate_stride, up_stride,
               scale_stride, WIDTH: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, RAW: tl.constexpr,
               ACT: tl.constexpr, HALF: tl.constexpr, SCALES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Quantize act(gate) · up, both of them RAW or not; the product is first rounded to 16 bits (HALF: float16, else
    bfloat16), as where its codes are computed apart. Grid (rows,).
    """
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    ok = c < WIDTH
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(gate_ptr + r * gate_stride + c, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + r * up_stride + c, mask=ok, other=0.0).to(tl.float32)
    if RAW:
        scale = tl.load(raw_rows_ptr + r)
        gate *= scale * tl.load(raw_columns_ptr + c, mask=ok, other=0.0)
        up *= scale * tl.load(raw_columns_ptr + WIDTH + c, mask=ok, other=0.0)
    y = activated(gate, ACT) * up
    y = y.to(tl.float16 if HALF else tl.bfloat16).to(tl.float32)
    store_codes(tl.where(ok, y, 0.0), r, codes_ptr, scale_ptr, scale_stride, KP, BLOCK, SCALES)
