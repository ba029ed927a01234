"""The next token of rows with top-k, top-p, min-p or typical-p, without sorting. The rules: `backends/sampling.py`; the
search of thresholds: `search.py`.

Top-k, top-p and min-p keep the logits from a threshold on, typical-p those between two: a pair of keys describes both.
"""

import triton
import triton.language as tl

from tokenmill.backends.cuda.kernels.choose import noise_key, noise_of
from tokenmill.backends.cuda.kernels.parameters import (
    LEAST_TEMPERATURE,
    MIN_P,
    SEED_HIGH,
    SEED_LOW,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    TYPICAL_P,
)
from tokenmill.backends.cuda.kernels.penalties import place_of
from tokenmill.backends.cuda.kernels.search import (
    COUNT,
    MASS,
    NEARNESS,
    bound,
    key_from,
    key_of,
    list_groups,
    moments,
    threshold,
    tile_of,
    value_of,
)

_HIDDEN: tl.constexpr = tl.constexpr(-25.5)
"""With noise in [-2.82, 22.2], no logit so far below the best is chosen."""
_LEAST: tl.constexpr = tl.constexpr(1e-30)
"""Least share, so that at least one logit is kept."""


@triton.jit
def scale_of(at):
    """Return the factor of a row's scores, one over the temperature or 1 if that is 0; and whether the row samples."""
    temperature = tl.load(at + TEMPERATURE).to(tl.float32, bitcast=True)
    return tl.where(temperature > 0.0, 1.0 / tl.maximum(temperature, LEAST_TEMPERATURE), 1.0), temperature > 0.0


@triton.jit
def summarize(logits_ptr, pairs_ptr, rows_ptr, parameters_ptr, maxima_ptr, sums_ptr, parameters_stride,
              VOCAB: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Set maxima[r, g] to the largest logit of a group, infinity if one is NaN, and, for rows with top-p or typical-p,
    sums[r, g] to the sum of e^((logit − maximum) · scale). Grid (R, GROUPS / TILE)."""
    r = tl.program_id(0)
    g = tl.program_id(1) * TILE + tl.arange(0, TILE)
    o = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits_ptr + r.to(tl.int64) * VOCAB + o, mask=o < VOCAB, other=float("-inf")).to(tl.float32)
    slot, _ = place_of(pairs_ptr, rows_ptr, r)
    at = parameters_ptr + slot * parameters_stride
    scale, random = scale_of(at)
    top_p = tl.load(at + TOP_P).to(tl.float32, bitcast=True)
    typical_p = tl.load(at + TYPICAL_P).to(tl.float32, bitcast=True)
    broken = tl.max((x != x).to(tl.int32), 1)
    most = tl.where(broken > 0, float("inf"), tl.max(x, 1))
    tl.store(maxima_ptr + r * GROUPS + g, most, mask=g < GROUPS)
    if random & ((top_p < 1.0) | (typical_p < 1.0)):
        worth = tl.exp((x - most[:, None]) * scale)
        worth = tl.where(most[:, None] > float("-inf"), worth, 0.0)
        tl.store(sums_ptr + r * GROUPS + g, tl.sum(worth, 1), mask=g < GROUPS)


@triton.jit
def cautious(p):
    """Return a share slightly larger than p, so that rounding of masses does not matter; above 1 if p is nearly 1."""
    return p + (1.0 - p) * 0.01 + 1e-5


@triton.jit
def top_p_key(row, groups_ptr, keys, tops, wholes, p, most, scale, low, VOCAB: tl.constexpr, SHIFT: tl.constexpr,
              GROUP: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Return the least key that top-p keeps of those from `low` on."""
    total = tl.sum(wholes, 0)
    if low > key_of(tl.full([], float("-inf"), tl.float32), SHIFT):
        n = list_groups(groups_ptr, keys, low)
        total, _ = moments(row, groups_ptr, n, most, scale, low, VOCAB, SHIFT, GROUP, TILE)
    low = bound(keys, tops, wholes, cautious(p) * total, most, scale, low, MASS, SHIFT, GROUP)
    n = list_groups(groups_ptr, keys, low)
    return threshold(
        row, groups_ptr, n, p * total, most, scale, 0.0, low, low, key_of(most, SHIFT), MASS, VOCAB, SHIFT, GROUP, TILE
    )


@triton.jit
def typical_keys(row, groups_ptr, keys, tops, wholes, p, most, scale, low, VOCAB: tl.constexpr, SHIFT: tl.constexpr,
                 GROUP: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Return the least and the largest key that typical-p keeps of those from `low` on.

    A log-probability plus the entropy is a scaled logit minus the mean of scaled logits by mass. The threshold is
    searched among these distances. The likeliest logits that together make up p bound it: their distances are at most
    those of their two ends, so no kept logit is farther.
    """
    n = list_groups(groups_ptr, keys, low)
    total, mean = moments(row, groups_ptr, n, most, scale, low, VOCAB, SHIFT, GROUP, TILE)
    center = mean / total
    end = bound(keys, tops, wholes, cautious(p) * total, most, scale, low, MASS, SHIFT, GROUP)
    far = 1.0001 * tl.maximum(-center, center - (value_of(end, SHIFT) - most) * scale)
    beside = most + (center - far) / scale - tl.abs(most) * 1e-5  # Rounding moves it by less.
    n = list_groups(groups_ptr, keys, tl.maximum(low, key_from(beside, SHIFT)))
    nearest = threshold(
        row, groups_ptr, n, p * total, most, scale, center, low, key_of(-far, 0), tl.full([], 0, tl.int32), NEARNESS,
        VOCAB, SHIFT, GROUP, TILE,
    )  # fmt: skip
    first = tl.full([TILE, GROUP], 2147483647, tl.int32)
    last = tl.full([TILE, GROUP], -2147483648, tl.int32)
    for i in range(0, n, TILE):
        x, _ = tile_of(row, groups_ptr, i, n, VOCAB, GROUP, TILE)
        own = key_of(x, SHIFT)
        kept = (own >= low) & (key_of(-tl.abs((x - most) * scale - center), 0) >= nearest)
        first = tl.minimum(first, tl.where(kept, own, 2147483647))
        last = tl.maximum(last, tl.where(kept, own, -2147483648))
    return tl.min(first), tl.max(last)


@triton.jit
def filters(row, groups_ptr, keys, tops, wholes, at, most, scale, VOCAB: tl.constexpr, SHIFT: tl.constexpr,
            GROUPS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Return the least and the largest key that the filters with the parameters at `at` keep of a row."""
    k = tl.load(at + TOP_K)
    top_p = tl.maximum(tl.load(at + TOP_P).to(tl.float32, bitcast=True), _LEAST)
    min_p = tl.load(at + MIN_P).to(tl.float32, bitcast=True)
    typical_p = tl.maximum(tl.load(at + TYPICAL_P).to(tl.float32, bitcast=True), _LEAST)
    low = key_of(tl.full([], float("-inf"), tl.float32), SHIFT)
    high = tl.full([], 2147483647 >> SHIFT, tl.int32)
    if min_p > 0.0:
        low = key_from(most + tl.log(min_p) / scale, SHIFT)
    if (k > 0) & (k < VOCAB):
        need = k.to(tl.float32)
        if k <= GROUPS:
            low = bound(keys, tops, wholes, need, most, scale, low, COUNT, SHIFT, GROUP)
        n = list_groups(groups_ptr, keys, low)
        low = threshold(
            row, groups_ptr, n, need, most, scale, 0.0, low, low, key_of(most, SHIFT), COUNT, VOCAB, SHIFT, GROUP, TILE
        )
    if top_p < 1.0:
        low = top_p_key(row, groups_ptr, keys, tops, wholes, top_p, most, scale, low, VOCAB, SHIFT, GROUP, TILE)
    if typical_p < 1.0:
        low, high = typical_keys(
            row, groups_ptr, keys, tops, wholes, typical_p, most, scale, low, VOCAB, SHIFT, GROUP, TILE
        )
    return low, high


@triton.jit
def draw(row, groups_ptr, keys, noise, random, most, scale, low, high, VOCAB: tl.constexpr, SHIFT: tl.constexpr,
         GROUP: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Return the id of the largest scaled logit, plus noise if `random`, of those with keys between `low` and `high`.

    The sums are bitwise those of `choose`, so a row's token does not depend on the filters of other rows.
    """
    highest = tl.minimum(high, key_of(most, SHIFT))
    low = tl.maximum(low, tl.where(random, key_from(value_of(highest, SHIFT) + _HIDDEN / scale, SHIFT), highest))
    n = list_groups(groups_ptr, keys, low)
    best = tl.full([TILE, GROUP], float("-inf"), tl.float32)
    ids = tl.full([TILE, GROUP], 2147483647, tl.int32)
    for i in range(0, n, TILE):
        x, o = tile_of(row, groups_ptr, i, n, VOCAB, GROUP, TILE)
        own = key_of(x, SHIFT)
        y = x * scale
        if random:
            y += noise_of(noise, o)
        y = tl.where((own >= low) & (own <= high) & (o < VOCAB), y, float("-inf"))
        better = y > best
        best = tl.where(better, y, best)
        ids = tl.where(better, o, ids)
    return tl.min(tl.where(best == tl.max(best), ids, 2147483647))


@triton.jit
def choose_filtered(logits_ptr, pairs_ptr, rows_ptr, parameters_ptr, tokens_ptr, out_ptr, kept_ptr, maxima_ptr,
                    sums_ptr, groups_ptr, tokens_stride, parameters_stride, VOCAB: tl.constexpr, SHIFT: tl.constexpr,
                    GROUPS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Choose as `choose` does, after the filters of the row; launch behind `summarize`. Set kept[r] to the bounds, as
    keys of all 32 bits, of the logits that the filters keep.

    Grid (R,). groups (R, WIDTH): scratch; WIDTH: the power of two from GROUPS on. SHIFT: of `search.key_of`. Launch
    without contraction of products and sums: a distance must be the same wherever it is computed.
    """
    r = tl.program_id(0)
    slot, position = place_of(pairs_ptr, rows_ptr, r)
    at = parameters_ptr + slot * parameters_stride
    scale, random = scale_of(at)
    g = tl.arange(0, WIDTH)
    maxima = tl.load(maxima_ptr + r * GROUPS + g, mask=g < GROUPS, other=float("-inf"))
    most = tl.max(maxima, 0)
    found = tl.full([], -1, tl.int32)
    low = tl.full([], -2147483648 >> SHIFT, tl.int32)
    high = tl.full([], 2147483647 >> SHIFT, tl.int32)
    if (most < float("inf")) & (most > float("-inf")):
        row, groups = logits_ptr + r.to(tl.int64) * VOCAB, groups_ptr + r * WIDTH
        keys = tl.where(g < GROUPS, key_of(maxima, SHIFT), -2147483648)
        if random:
            tops = tl.exp((maxima - most) * scale)
            wholes = tops * tl.load(sums_ptr + r * GROUPS + g, mask=g < GROUPS, other=0.0)
            low, high = filters(row, groups, keys, tops, wholes, at, most, scale, VOCAB, SHIFT, GROUPS, GROUP, TILE)
        noise = noise_key(tl.load(at + SEED_LOW), tl.load(at + SEED_HIGH), position)
        found = draw(row, groups, keys, noise, random, most, scale, low, high, VOCAB, SHIFT, GROUP, TILE)
        found = tl.where(found < VOCAB, found, -1)
    tl.store(kept_ptr + 2 * r, low << SHIFT)
    tl.store(kept_ptr + 2 * r + 1, (high << SHIFT) | ((1 << SHIFT) - 1))
    tl.store(out_ptr + r, found)
    tl.store(tokens_ptr + slot * tokens_stride + position, tl.maximum(found, 0))
