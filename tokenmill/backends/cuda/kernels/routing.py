"""Kernels that choose experts for each row, and sort the pairs of a row and an expert by expert.

Pair p is choice p % top_k of row p // top_k. Sorted pairs are items: those of the first expert come first, and those of
one expert are in the order of the pairs. Nothing here depends on the order in which programs run.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_LOWEST = tl.constexpr(-3.0e38)  # in place of what is no number


@triton.jit
def one_rows_logits(x_ptr, weight_ptr, norm_ptr, eps, e, E: tl.constexpr, K: tl.constexpr, BN: tl.constexpr,
                    BK: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Return the products (BN,) of one row x (K,), or with NORM of its RMS norm, with rows `e` of the matrix."""
    k = tl.arange(0, BK)
    at = weight_ptr + tl.where(e < E, e, 0)[:, None] * K + k[None, :]
    first = tl.load(at, mask=k[None, :] < K, other=0.0)  # Under way before the wait.
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    squares = x * x
    if NORM:
        x = x * tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    sums = first.to(tl.float32) * x[None, :]
    for start in tl.range(BK, K, BK, num_stages=STAGES):
        ok = start + k < K
        x = tl.load(x_ptr + start + k, mask=ok, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x = x * tl.load(norm_ptr + start + k, mask=ok, other=0.0).to(tl.float32)
        sums += tl.load(at + start, mask=ok[None, :], other=0.0).to(tl.float32) * x[None, :]
    y = tl.sum(sums, 1)
    if NORM:
        y = y * tl.rsqrt(tl.sum(squares, 0) / K + eps)
    return y


@triton.jit
def write_normed(x_ptr, norm_ptr, out_ptr, eps, K: tl.constexpr, BK: tl.constexpr):
    """Set out (K,) to the RMS norm of x (K,)."""
    k = tl.arange(0, BK)
    squares = tl.zeros([BK], tl.float32)
    for start in tl.static_range(0, K, BK):
        x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    for start in tl.static_range(0, K, BK):
        ok = start + k < K
        x = tl.load(x_ptr + start + k, mask=ok, other=0.0).to(tl.float32)
        y = x * scale * tl.load(norm_ptr + start + k, mask=ok, other=0.0).to(tl.float32)
        tl.store(out_ptr + start + k, y.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def rows_logits(x_ptr, weight_ptr, x_stride, m, M, e, E: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Return the products (BM, BN) of rows `m` of x (M, K) with rows `e` of the matrix (E, K)."""
    k = tl.arange(0, BK)
    x_at = x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :]
    at = weight_ptr + tl.where(e < E, e, 0)[:, None] * K + k[None, :]
    sums = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        ok = (start + k < K)[None, :]
        x = tl.load(x_at + start, mask=(m[:, None] < M) & ok, other=0.0)
        w = tl.load(at + start, mask=ok, other=0.0)
        sums = tl.dot(x, w.T, sums, input_precision="ieee")
    return sums


@triton.jit
def in_best_groups(choice, e, BM: tl.constexpr, EP: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
                   GP: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_BEST: tl.constexpr):  # fmt: skip
    """Return whether each expert (BM, EP) is in one of the best groups. A group counts as the sum of its best."""
    group, g = e // SIZE, tl.arange(0, GP)
    sums = tl.full([BM, GP], float("-inf"), tl.float32)
    for i in tl.static_range(GROUPS):
        own = tl.where((group == i)[None, :], choice, float("-inf"))
        total = tl.zeros([BM], tl.float32)
        for _ in tl.static_range(GROUP_BEST):
            total += tl.max(own, 1)
            own = tl.where(e[None, :] == tl.argmax(own, 1)[:, None], float("-inf"), own)
        sums = tl.where((g == i)[None, :], total[:, None], sums)
    kept = tl.zeros([BM, EP], tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        best = tl.argmax(sums, 1)
        kept = tl.where(group[None, :] == best[:, None], 1, kept)
        sums = tl.where(g[None, :] == best[:, None], float("-inf"), sums)
    return kept == 1


@triton.jit
def scored(logits, ok, SCORE: tl.constexpr):
    """Return the scores (BM, EP) of logits, which are minus infinity where not `ok`."""
    if SCORE == "sparsemixer":
        return logits
    elif SCORE == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-logits))
    else:
        power = tl.where(ok, tl.exp(logits - tl.max(logits, 1)[:, None]), 0.0)
        return power / tl.sum(power, 1)[:, None]


@triton.jit
def choose(logits, scores, choice, e, least_sum, scale, margin, E: tl.constexpr, BM: tl.constexpr, TOP_K: tl.constexpr,
           KP: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr):  # fmt: skip
    """Return ids and factors (BM, KP) of the TOP_K experts with the largest `choice`; of equal ones the first."""
    j = tl.arange(0, KP)
    ids = tl.zeros([BM, KP], tl.int32)
    factors = tl.zeros([BM, KP], tl.float32)
    for i in tl.range(0, TOP_K):
        best = tl.max(choice, 1)[:, None]
        chosen = tl.minimum(tl.argmax(choice, 1), E - 1)[:, None]
        if SCORE == "sparsemixer":
            far = (best - logits) / tl.maximum(tl.abs(logits), best) > 2.0 * margin
            factor = 1.0 / tl.sum(tl.where(far, 0.0, tl.exp(choice - best)), 1)
        else:
            factor = tl.sum(tl.where(e[None, :] == chosen, scores, 0.0), 1)
        ids = tl.where(j[None, :] == i, chosen, ids)
        factors = tl.where(j[None, :] == i, factor[:, None], factors)
        choice = tl.where(e[None, :] == chosen, float("-inf"), choice)
    if RENORMALIZE:
        factors = factors / tl.maximum(tl.sum(factors, 1), least_sum)[:, None]
    return ids, factors * scale


@triton.jit
def finishes_last(count_ptr, tile, TILES: tl.constexpr):
    """Return whether a program is the last one of TILES to come here. `tile`: its number; larger ones do not count."""
    last = tile < TILES
    if TILES > 1:
        if last:
            last = tl.atomic_add(count_ptr, 1, sem="acq_rel") == TILES - 1
        if last:
            tl.store(count_ptr, 0)
    return last


@triton.jit(do_not_specialize=["M"])
def route(x_ptr, weight_ptr, bias_ptr, correction_ptr, norm_ptr, normed_ptr, logits_ptr, count_ptr, ids_ptr,
          factors_ptr, x_stride, M, least_sum, scale, margin, eps, E: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
          BN: tl.constexpr, BK: tl.constexpr, EP: tl.constexpr, TOP_K: tl.constexpr, KP: tl.constexpr,
          SCORE: tl.constexpr, GROUPS: tl.constexpr, GP: tl.constexpr, TOP_GROUPS: tl.constexpr,
          GROUP_BEST: tl.constexpr, RENORMALIZE: tl.constexpr, BIAS: tl.constexpr, CORRECTION: tl.constexpr,
          NORM: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Set ids and factors (M, TOP_K) of rows x (M, K), as `ops.Route` defines them. Grid (E / BN, M / BM).

    The last program of a block of rows to finish chooses. logits (M, EP) float32: scratch. BM 1: a single row, normed
    first with NORM; one more program then writes its norm, for the experts.
    """
    TILES: tl.constexpr = (E + BN - 1) // BN
    tile, block = tl.program_id(0), tl.program_id(1)
    own, m, e = tile * BN + tl.arange(0, BN), block * BM + tl.arange(0, BM), tl.arange(0, EP)
    if BM == 1:
        sums = one_rows_logits(x_ptr, weight_ptr, norm_ptr, eps, own, E, K, BN, BK, NORM, PDL, STAGES)[None, :]
    else:
        if PDL:
            gdc_wait()
        sums = rows_logits(x_ptr, weight_ptr, x_stride, m, M, own, E, K, BM, BN, BK, STAGES)
    if PDL:
        gdc_launch_dependents()
    if NORM and tile == TILES:
        write_normed(x_ptr, norm_ptr, normed_ptr, eps, K, BK)
    tl.store(logits_ptr + m.to(tl.int64)[:, None] * EP + own[None, :], sums, mask=(m < M)[:, None] & (own < E)[None, :])
    tl.debug_barrier()
    if finishes_last(count_ptr + block, tile, TILES):
        ok = (m < M)[:, None] & (e < E)[None, :]
        at = logits_ptr + m.to(tl.int64)[:, None] * EP + e[None, :]
        logits = tl.load(at, mask=ok, other=float("-inf"), cache_modifier=".cg")
        if BIAS:
            logits += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
        scores = scored(logits, ok, SCORE)
        choice = scores
        if CORRECTION:
            choice += tl.load(correction_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
        choice = tl.where((e < E)[None, :], tl.where(choice == choice, choice, _LOWEST), float("-inf"))
        if GROUPS > 1:
            kept = in_best_groups(choice, e, BM, EP, E // GROUPS, GROUPS, GP, TOP_GROUPS, GROUP_BEST)
            choice = tl.where(kept, choice, float("-inf"))
        ids, factors = choose(logits, scores, choice, e, least_sum, scale, margin, E, BM, TOP_K, KP, SCORE, RENORMALIZE)
        j = tl.arange(0, KP)
        to = m.to(tl.int64)[:, None] * TOP_K + j[None, :]
        chosen = (m < M)[:, None] & (j < TOP_K)[None, :]
        tl.store(ids_ptr + to, ids, mask=chosen)
        tl.store(factors_ptr + to, factors.to(factors_ptr.dtype.element_ty), mask=chosen)


@triton.jit(do_not_specialize=["pairs", "first", "absent"])
def own_pairs(ids_ptr, factors_ptr, own_ids_ptr, own_factors_ptr, pairs, first, absent, E: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """Set ids and factors of pairs to those of the E experts from `first` on, counted from there.

    A pair with another expert gets the id `absent` and the factor 0. Grid (pairs / BLOCK,).
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = tl.load(ids_ptr + i, mask=i < pairs, other=0) - first
    own = (e >= 0) & (e < E)
    factor = tl.load(factors_ptr + i, mask=(i < pairs) & own, other=0.0)
    tl.store(own_ids_ptr + i, tl.where(own, e, absent), mask=i < pairs)
    tl.store(own_factors_ptr + i, factor, mask=i < pairs)


@triton.jit(do_not_specialize=["pairs"])
def count_pairs(ids_ptr, counts_ptr, firsts_ptr, count_ptr, pairs, E: tl.constexpr, EP: tl.constexpr,
                BLOCK: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr):  # fmt: skip
    """Set firsts[s, e] to the first item of expert e in segment s of BLOCK pairs, and its end in a last row.

    Grid (segments,). counts (segments, EP): scratch. The last program to finish adds them up, ROWS at a time. PART:
    ids may be E, of no expert here.
    """
    s, segments, e = tl.program_id(0), tl.num_programs(0), tl.arange(0, EP)
    i = s * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + i, mask=i < pairs, other=0)
    counted = i < pairs
    if PART:
        counted = counted & (ids < E)
    tl.store(counts_ptr + s * EP + e, tl.histogram(ids, EP, mask=counted))
    tl.debug_barrier()
    if tl.atomic_add(count_ptr, 1, sem="acq_rel") == segments - 1:
        tl.store(count_ptr, 0)
        row = tl.arange(0, ROWS)
        at = counts_ptr + row[:, None] * EP + e[None, :]
        total = tl.zeros([EP], tl.int32)
        for start in tl.range(0, segments, ROWS):
            ok = (start + row < segments)[:, None]
            total += tl.sum(tl.load(at + start * EP, mask=ok, other=0, cache_modifier=".cg"), 0)
        done = tl.cumsum(total, 0) - total
        to = firsts_ptr + row[:, None] * EP + e[None, :]
        for start in tl.range(0, segments, ROWS):
            ok = (start + row < segments)[:, None]
            own = tl.load(at + start * EP, mask=ok, other=0, cache_modifier=".cg")
            tl.store(to + start * EP, done[None, :] + tl.cumsum(own, 0) - own, mask=ok)
            done += tl.sum(own, 0)
        tl.store(firsts_ptr + segments * EP + e, done)


@triton.jit(do_not_specialize=["pairs", "segments", "most"])
def sort_pairs(ids_ptr, firsts_ptr, items_ptr, tiles_ptr, pairs, segments, most, E: tl.constexpr, EP: tl.constexpr,
               BLOCK: tl.constexpr, ONE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Set items to the pairs sorted by expert, and tiles (pairs / most + E, 4) to: expert, first item, number of items.

    A tile has at most `most` items, of one expert; unused tiles have none. Grid (E, segments of BLOCK pairs). ONE:
    there is one segment, and `firsts` is not read; else `count_pairs` has written it. `most` is no constant: else a
    step could need a combination of constants that no step of the warm-up has.
    """
    e, s = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    i = s * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + i, mask=i < pairs, other=E)
    own = (ids == e).to(tl.int32)
    if ONE:
        first = tl.sum((ids < e).to(tl.int32), 0)
        place, end = first, first + tl.sum(own, 0)
    else:
        first = tl.load(firsts_ptr + e)
        place, end = tl.load(firsts_ptr + s * EP + e), tl.load(firsts_ptr + segments * EP + e)
    tl.store(items_ptr + place + tl.cumsum(own, 0) - own, i, mask=own == 1)
    if s == 0:  # A tile's place is known without the tiles of other experts, so some places stay unused.
        slot, slots = first // most + e, end // most - first // most + 1
        for start in tl.range(0, slots, 16):
            t = start + tl.arange(0, 16)
            to = tiles_ptr + (slot + t) * 4
            tl.store(to, t * 0 + e, mask=t < slots)
            tl.store(to + 1, first + t * most, mask=t < slots)
            tl.store(to + 2, tl.minimum(tl.maximum(end - first - t * most, 0), most), mask=t < slots)
