"""Products with a matrix, most of them bound by reading it: of one row on CUDA cores, of more rows on tensor cores with
the operands swapped, so that few rows are not padded to 64.

Operations around a product are fused into it: the norm of its input, bias, residual, and act(gate) · up of a matrix
with the gate in one half and `up` in the other. PDL: the kernel is launched while the one before still runs, so it
reads nothing but weights before `gdc_wait`.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.backends.cuda.kernels.rows import activated


@triton.jit
def finished(y, up, rows, n_ok, bias_ptr, residual_ptr, N, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
             ACT: tl.constexpr):  # fmt: skip
    """Finish sums (N,): add the bias, apply act(gate) · up if ACT is one, add the residual."""
    if BIAS:
        y += tl.load(bias_ptr + rows, mask=n_ok, other=0.0).to(tl.float32)
        if ACT != "":
            up += tl.load(bias_ptr + N + rows, mask=n_ok, other=0.0).to(tl.float32)
    if ACT != "":
        y = activated(y, ACT) * up
    if RESIDUAL:
        y += tl.load(residual_ptr + rows, mask=n_ok, other=0.0).to(tl.float32)
    return y


@triton.jit
def one_row(x_ptr, weight_ptr, norm_ptr, bias_ptr, residual_ptr, out_ptr, eps, N: tl.constexpr, K: tl.constexpr,
            BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
            ACT: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Compute out (N,) of x (K,); BK divides K. With ACT the matrix has 2 · N rows. Grid (N / BN,)."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    n_ok = rows < N
    k = tl.arange(0, BK)
    at = weight_ptr + tl.where(n_ok, rows, 0).to(tl.int64)[:, None] * K + k[None, :]
    first = tl.load(at)  # Under way before the wait.
    second = first
    if ACT != "":
        second = tl.load(at + N * K)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + k).to(tl.float32)
    squares = x * x
    if NORM:
        x = x * tl.load(norm_ptr + k).to(tl.float32)
    sums = first.to(tl.float32) * x[None, :]
    ups = second.to(tl.float32) * x[None, :]
    for start in tl.range(BK, K, BK, num_stages=STAGES):
        x = tl.load(x_ptr + start + k).to(tl.float32)
        w = tl.load(at + start)
        if NORM:
            squares += x * x
            x = x * tl.load(norm_ptr + start + k).to(tl.float32)
        sums += w.to(tl.float32) * x[None, :]
        if ACT != "":
            ups += tl.load(at + N * K + start).to(tl.float32) * x[None, :]
    if PDL:
        gdc_launch_dependents()
    y, up = tl.sum(sums, 1), tl.sum(ups, 1)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        y, up = y * scale, up * scale
    y = finished(y, up, rows, n_ok, bias_ptr, residual_ptr, N, BIAS, RESIDUAL, ACT)
    tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), mask=n_ok)


@triton.jit
def summed(x_ptr, weight_ptr, x_stride, M, tile, split, block, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
           BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, GATED: tl.constexpr, TMA: tl.constexpr,
           STAGES: tl.constexpr):  # fmt: skip
    """Return a split's sums (BN, BM) of a tile, and with GATED those of the other half of the matrix."""
    rows = tile * BN + tl.arange(0, BN)
    m = block * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    each: tl.constexpr = K // SPLITS
    if not TMA:
        at = weight_ptr + tl.where(rows < N, rows, 0).to(tl.int64)[:, None] * K + k[None, :]
        x_at = x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :]
    sums = tl.zeros([BN, BM], tl.float32)
    ups = tl.zeros([BN, BM], tl.float32)
    for start in tl.range(split * each, split * each + each, BK, num_stages=STAGES):
        if TMA:
            w = weight_ptr.load([tile * BN, start])
            x = x_ptr.load([block * BM, start])
        else:
            w = tl.load(at + start)
            x = tl.load(x_at + start, mask=m[:, None] < M, other=0.0)
        sums = tl.dot(w, x.T, sums, input_precision="ieee")
        if GATED:
            if TMA:
                up = weight_ptr.load([N + tile * BN, start])
            else:
                up = tl.load(at + N * K + start)
            ups = tl.dot(up, x.T, ups, input_precision="ieee")
    return sums, ups


@triton.jit
def gathered(sums, ups, part_ptr, count_ptr, tile, split, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
             GATED: tl.constexpr):  # fmt: skip
    """Store a split's sums. Return True for the last split of a tile to finish, with the sums of all, in order."""
    place = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    tiles = tl.num_programs(0)
    tl.store(part_ptr + (split * tiles + tile) * (BN * BM) + place, sums)
    if GATED:
        tl.store(part_ptr + ((SPLITS + split) * tiles + tile) * (BN * BM) + place, ups)
    tl.debug_barrier()
    last = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.store(count_ptr + tile, 0)
        sums = tl.zeros([BN, BM], tl.float32)
        ups = tl.zeros([BN, BM], tl.float32)
        for s in tl.static_range(SPLITS):
            sums += tl.load(part_ptr + (s * tiles + tile) * (BN * BM) + place, cache_modifier=".cg")
            if GATED:
                ups += tl.load(part_ptr + ((SPLITS + s) * tiles + tile) * (BN * BM) + place, cache_modifier=".cg")
    return last, sums, ups


@triton.jit(do_not_specialize=["M"])
def few_rows(x_ptr, weight_ptr, bias_ptr, out_ptr, part_ptr, count_ptr, x_stride, M, N: tl.constexpr, K: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr,
             ACT: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Compute out (M, N) of x (M, K); BK · SPLITS divides K. Grid (N / BN, SPLITS, M / BM).

    With splits, which require M <= BM, the last program of a tile to finish adds them in order. Without, an output is
    the same for any M and BM. TMA: `x_ptr` and `weight_ptr` are tensor descriptors of tiles (BM, BK) and (BN, BK).
    """
    tile, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if SPLITS == 1:  # Neighbours share tiles of both operands.
        block, tile = tl.swizzle2d(block, tile, tl.num_programs(2), tl.num_programs(0), 16)
    if PDL:
        gdc_wait()
    sums, ups = summed(
        x_ptr, weight_ptr, x_stride, M, tile, split, block, N, K, BM, BN, BK, SPLITS, ACT != "", TMA, STAGES
    )
    if PDL:
        gdc_launch_dependents()
    last = True
    if SPLITS > 1:
        last, sums, ups = gathered(sums, ups, part_ptr, count_ptr, tile, split, BM, BN, SPLITS, ACT != "")
    if last:
        column = (tile * BN + tl.arange(0, BN))[:, None]
        m = block * BM + tl.arange(0, BM)
        y = finished(sums, ups, column, column < N, bias_ptr, bias_ptr, N, BIAS, False, ACT)
        to = out_ptr + m.to(tl.int64)[None, :] * N + column
        tl.store(to, y.to(out_ptr.dtype.element_ty), mask=(column < N) & (m[None, :] < M))
