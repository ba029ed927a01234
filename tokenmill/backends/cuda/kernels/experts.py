"""Products of rows with the experts that were chosen for them, whose matrices are stacked: (experts, outputs, columns).

A single row reads its experts' matrices on CUDA cores, each once. More rows are sorted by expert (`routing.py`), and
tiles of items of one expert are multiplied on tensor cores, with the operands swapped as in `products.py`. Every pair
has a result of its own, and `combine` adds those of a row in the order of choice: no sum depends on the order in which
programs run.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.backends.cuda.kernels.coded_experts import coded_sums, halves, side_by_side
from tokenmill.backends.cuda.kernels.rows import gated


@triton.jit
def one_row_up(x_ptr, weight_ptr, bias_ptr, ids_ptr, factors_ptr, out_ptr, limit, offset, N: tl.constexpr,
               K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr,
               LIMIT: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
               STAGES: tl.constexpr):  # fmt: skip
    """Set out[j] (N,) to the inner values of the j-th expert of one row x (K,). Grid (N / BN, top_k).

    GATED: matrices have 2 · N rows, gate, then up; else N. SCALED: the factors multiply x.
    """
    height: tl.constexpr = 2 * N if GATED else N
    j = tl.program_id(1)
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    if PDL:
        gdc_wait()
    e = tl.load(ids_ptr + j).to(tl.int64)
    at = weight_ptr + (e * height + tl.where(n < N, n, 0))[:, None] * K + k[None, :]
    gates = tl.zeros([BN, BK], tl.float32)
    ups = tl.zeros([BN, BK], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        ok = start + k < K
        x = tl.load(x_ptr + start + k, mask=ok, other=0.0).to(tl.float32)
        gates += tl.load(at + start, mask=ok[None, :], other=0.0).to(tl.float32) * x[None, :]
        if GATED:
            ups += tl.load(at + N * K + start, mask=ok[None, :], other=0.0).to(tl.float32) * x[None, :]
    if PDL:
        gdc_launch_dependents()
    gate, up = tl.sum(gates, 1), tl.sum(ups, 1)
    if SCALED:
        factor = tl.load(factors_ptr + j).to(tl.float32)
        gate, up = gate * factor, up * factor
    if BIAS:
        gate += tl.load(bias_ptr + e * height + n, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias_ptr + e * height + N + n, mask=n < N, other=0.0).to(tl.float32)
    y = gated(gate, up, limit, offset, ACT, GATED, LIMIT)
    tl.store(out_ptr + j * N + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def one_row_down(x_ptr, weight_ptr, bias_ptr, ids_ptr, factors_ptr, residual_ptr, out_ptr, N: tl.constexpr,
                 K: tl.constexpr, TOP_K: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 BIAS: tl.constexpr, SCALED: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
                 STAGES: tl.constexpr):  # fmt: skip
    """Set out (N,) to the sum of the products of x[j] (K,) with the j-th expert's matrix, times its factor unless
    SCALED, and with RESIDUAL of another term. KP: TOP_K, padded. Grid (N / BN,).

    The ids are read before the wait: the kernel before has itself waited for the one that writes them.
    """
    j, n, k = tl.arange(0, KP), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    j_ok, n_ok = j < TOP_K, n < N
    e = tl.load(ids_ptr + j, mask=j_ok, other=0).to(tl.int64)
    at = weight_ptr + (e * (N * K))[:, None, None] + (tl.where(n_ok, n, 0) * K)[None, :, None] + k[None, None, :]
    first = tl.load(at, mask=j_ok[:, None, None] & (k < K)[None, None, :], other=0.0)  # Under way before the wait.
    if PDL:
        gdc_wait()
    factor = tl.load(factors_ptr + j, mask=j_ok, other=0.0).to(tl.float32)
    if SCALED:
        factor = tl.where(j_ok, 1.0, 0.0)
    x_at = x_ptr + (j * K)[:, None] + k[None, :]
    x = tl.load(x_at, mask=j_ok[:, None] & (k < K)[None, :], other=0.0).to(tl.float32) * factor[:, None]
    sums = tl.sum(first.to(tl.float32) * x[:, None, :], 0)
    for start in tl.range(BK, K, BK, num_stages=STAGES):
        ok = start + k < K
        x = tl.load(x_at + start, mask=j_ok[:, None] & ok[None, :], other=0.0).to(tl.float32) * factor[:, None]
        w = tl.load(at + start, mask=j_ok[:, None, None] & ok[None, None, :], other=0.0).to(tl.float32)
        sums += tl.sum(w * x[:, None, :], 0)
    if PDL:
        gdc_launch_dependents()
    y = tl.sum(sums, 1)
    if BIAS:
        bias = tl.load(bias_ptr + e[:, None] * N + n[None, :], mask=j_ok[:, None] & n_ok[None, :], other=0.0)
        y += tl.sum(bias.to(tl.float32) * factor[:, None], 0)
    if RESIDUAL:
        y += tl.load(residual_ptr + n, mask=n_ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n_ok)


@triton.jit
def tile_sums(x_ptr, weight_ptr, x_stride, rows, m_ok, first, base, n, tile, N: tl.constexpr, K: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GATED: tl.constexpr, TMA: tl.constexpr,
              TMA_X: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Return sums (BN, BM) of outputs `n` of one expert, whose matrix begins at row `base`, for rows `rows` of x.

    With GATED also those of the other half of the matrix. TMA_X: the rows are those from `first` on.
    """
    k = tl.arange(0, BK)
    if not TMA:
        at = weight_ptr + (base.to(tl.int64) + tl.where(n < N, n, 0))[:, None] * K + k[None, :]
    if not TMA_X:
        x_at = x_ptr + rows.to(tl.int64)[:, None] * x_stride + k[None, :]
    sums = tl.zeros([BN, BM], tl.float32)
    ups = tl.zeros([BN, BM], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        if TMA:
            w = weight_ptr.load([base + tile * BN, start])
        elif K % BK == 0:
            w = tl.load(at + start)
        else:
            w = tl.load(at + start, mask=(start + k < K)[None, :], other=0.0)
        if TMA_X:
            x = x_ptr.load([first, start])
        elif K % BK == 0:
            x = tl.load(x_at + start, mask=m_ok[:, None], other=0.0)
        else:
            x = tl.load(x_at + start, mask=m_ok[:, None] & (start + k < K)[None, :], other=0.0)
        sums = tl.dot(w, x.T, sums, input_precision="ieee")
        if GATED:
            if TMA:
                up = weight_ptr.load([base + N + tile * BN, start])
            elif K % BK == 0:
                up = tl.load(at + N * K + start)
            else:
                up = tl.load(at + N * K + start, mask=(start + k < K)[None, :], other=0.0)
            ups = tl.dot(up, x.T, ups, input_precision="ieee")
    return sums, ups


@triton.jit
def multiply_tile(x_ptr, weight_ptr, words_ptr, table_ptr, whole_ptr, order_ptr, bias_ptr, factors_ptr, out_ptr,
                  items_ptr, x_stride, limit, offset, e, first, count, tile, N: tl.constexpr, K: tl.constexpr,
                  TOP_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr,
                  GATED: tl.constexpr, LIMIT: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr,
                  TMA: tl.constexpr, TMA_X: tl.constexpr, KIND: tl.constexpr, META: tl.constexpr, G: tl.constexpr,
                  SL: tl.constexpr, HEIGHT: tl.constexpr, TEXT: tl.constexpr, ORDER: tl.constexpr, ASM: tl.constexpr,
                  ON_WEIGHTS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Multiply at most BM items from `first` on, all of expert e, with outputs [tile · BN, tile · BN + BN)."""
    m = tl.arange(0, BM)
    n = tile * BN + tl.arange(0, BN)
    m_ok, n_ok = m < count, n < N
    pair = tl.load(items_ptr + first + m, mask=m_ok, other=0)
    base, rows = e * N, first + m
    if GATED:
        base = e * (2 * N)
    if ACT != "":
        rows = pair // TOP_K
    if KIND == "":
        y, up = tile_sums(
            x_ptr, weight_ptr, x_stride, rows, m_ok, first, base, n, tile, N, K, BM, BN, BK, GATED, TMA, TMA_X, STAGES
        )
    else:
        size: tl.constexpr = 2 * BN if GATED else BN
        y = coded_sums(
            x_ptr, rows.to(tl.int64) * x_stride, weight_ptr, words_ptr, table_ptr, order_ptr, m_ok, m * 0 + e, e,
            side_by_side(tile, N, BN, GATED), 0, m * 0, HEIGHT, K, BM, size, BK, KIND, META, G, SL, TEXT, ORDER, ASM,
            ON_WEIGHTS, 1, STAGES,
        )  # fmt: skip
        y *= tl.load(whole_ptr + e)
        up = y
        if GATED:
            y, up = halves(y, size)
    if SCALED:
        factor = tl.load(factors_ptr + pair, mask=m_ok, other=0.0).to(tl.float32)[None, :]
        y, up = y * factor, up * factor
    if BIAS:
        y += tl.load(bias_ptr + base + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up += tl.load(bias_ptr + base + N + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    to = pair
    if ACT != "":
        y = gated(y, up, limit, offset, ACT, GATED, LIMIT)
        to = first + m
    at = out_ptr + to.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=n_ok[:, None] & m_ok[None, :])


@triton.jit
def grouped(x_ptr, weight_ptr, words_ptr, table_ptr, whole_ptr, order_ptr, bias_ptr, factors_ptr, out_ptr, items_ptr,
            tiles_ptr, x_stride, limit, offset, N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr,
            LIMIT: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr, TMA: tl.constexpr, TMA_X: tl.constexpr,
            HALVES: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, META: tl.constexpr, G: tl.constexpr,
            SL: tl.constexpr, HEIGHT: tl.constexpr, TEXT: tl.constexpr, ORDER: tl.constexpr, ASM: tl.constexpr,
            ON_WEIGHTS: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Multiply each tile of items with its expert's matrix. Grid (N / BN, tiles).

    With ACT, x has a row for each row of the step, the matrices have 2 · N rows, gate and up, or N unless GATED, and
    out[item] (N,) are inner values. Without, x has a row for each item, and out[pair] (N,) are results. SCALED: the
    factor of a pair multiplies its x. TMA: `weight_ptr`, TMA_X: `x_ptr` is a tensor descriptor of tiles (BN, BK),
    (BM, BK). HALVES: a tile with at most half of its items is multiplied at half the cost. KIND: of coded weights, as
    `coded_sums` has them with D = BK; "": numbers.
    """
    slot, tile = tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), GROUP)
    if PDL:
        gdc_wait()
    count = tl.load(tiles_ptr + slot * 4 + 2)
    if count > 0:
        e, first = tl.load(tiles_ptr + slot * 4), tl.load(tiles_ptr + slot * 4 + 1)
        if HALVES and count <= BM // 2:
            multiply_tile(
                x_ptr, weight_ptr, words_ptr, table_ptr, whole_ptr, order_ptr, bias_ptr, factors_ptr, out_ptr,
                items_ptr, x_stride, limit, offset, e, first, count, tile, N, K, TOP_K, BM // 2, BN, BK, ACT, GATED,
                LIMIT, BIAS, SCALED, TMA, TMA_X, KIND, META, G, SL, HEIGHT, TEXT, ORDER, ASM, ON_WEIGHTS, STAGES,
            )  # fmt: skip
        else:
            multiply_tile(
                x_ptr, weight_ptr, words_ptr, table_ptr, whole_ptr, order_ptr, bias_ptr, factors_ptr, out_ptr,
                items_ptr, x_stride, limit, offset, e, first, count, tile, N, K, TOP_K, BM, BN, BK, ACT, GATED, LIMIT,
                BIAS, SCALED, TMA, TMA_X, KIND, META, G, SL, HEIGHT, TEXT, ORDER, ASM, ON_WEIGHTS, STAGES,
            )  # fmt: skip
    if PDL:
        gdc_launch_dependents()


@triton.jit
def combine(y_ptr, factors_ptr, out_ptr, TOP_K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
            SCALED: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Set out[r] to the sum of y[pair] (WIDTH,) over the pairs of row r, times their factors unless SCALED.

    PART: a pair whose factor is 0 may have no y. Grid (rows, WIDTH / BLOCK).
    """
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = c < WIDTH
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        here = ok
        if PART:
            here = tl.where(tl.load(factors_ptr + r * TOP_K + j) != 0.0, c, WIDTH) < WIDTH
        y = tl.load(y_ptr + (r * TOP_K + j) * WIDTH + c, mask=here, other=0.0).to(tl.float32)
        if SCALED:
            total += y
        else:
            total += y * tl.load(factors_ptr + r * TOP_K + j).to(tl.float32)
    tl.store(out_ptr + r * WIDTH + c, total.to(out_ptr.dtype.element_ty), mask=ok)
