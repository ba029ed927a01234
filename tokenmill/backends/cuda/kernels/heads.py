"""Heads of queries and keys: norm, rotation, and the write of keys and values to the paged cache.

Kernels hold a head of D numbers as two halves of HALF columns, a power of two of at least D / 2. Columns of a half
beyond D / 2 are padding. Column j of a padded head is number `columns(j)` of the head. Attention of single tokens holds
it as 2 · HALF places in the order of the cache instead, of which those beyond D are padding.
"""

import triton
import triton.language as tl


@triton.jit
def columns(j, D: tl.constexpr, HALF: tl.constexpr):
    """Return the offset in the head of column j of a padded head."""
    if D == 2 * HALF:
        return j
    else:
        return (j // HALF) * (D // 2) + j % HALF


@triton.jit
def in_head(j, D: tl.constexpr, HALF: tl.constexpr):
    """Return True for a column j of a padded head that is not padding."""
    return j % HALF < D // 2


@triton.jit
def rotated(x_ptr, ok, norm_ptr, cos, sin, eps, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
            ROPE: tl.constexpr):  # fmt: skip
    """Return the halves (N, HALF), float32, of the heads at `x_ptr` (N, 1), normalized with NORM, rotated with ROPE.

    ROPE: 0 for no rotation, R for that of the first R columns in halves, −R for that in adjacent columns. Columns that
    are a pair get the same place in both halves. Queries and keys are permuted alike, so their products are the same.
    """
    j = tl.arange(0, HALF)[None, :]
    ok = ok & (j < D // 2)
    first, second = j, D // 2 + j
    if ROPE < 0:
        first = tl.where(j < -ROPE // 2, 2 * j, -ROPE // 2 + j)
        second = tl.where(j < -ROPE // 2, 2 * j + 1, second)
    elif ROPE > 0:
        first = tl.where(j < ROPE // 2, j, ROPE // 2 + j)
        second = tl.where(j < ROPE // 2, ROPE // 2 + j, second)
    a = tl.load(x_ptr + first, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + second, mask=ok, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        a = a * scale * tl.load(norm_ptr + first, mask=j < D // 2, other=0.0).to(tl.float32)
        b = b * scale * tl.load(norm_ptr + second, mask=j < D // 2, other=0.0).to(tl.float32)
    if ROPE != 0:
        a, b = a * cos - b * sin, b * cos + a * sin
    return a, b


@triton.jit
def column_of(place, D: tl.constexpr, ROPE: tl.constexpr):
    """Return the column of a head whose number `rotated` keeps at `place`, a number of the cached head."""
    if ROPE == 0 or ROPE == D:
        return place
    else:
        pairs: tl.constexpr = (-ROPE if ROPE < 0 else ROPE) // 2
        j = place % (D // 2)
        if ROPE < 0:
            first, second = 2 * j, 2 * j + 1
        else:
            first, second = j, pairs + j
        turned = j < pairs
        return tl.where(place < D // 2, tl.where(turned, first, pairs + j), tl.where(turned, second, D // 2 + j))


@triton.jit
def rotated_at(x_ptr, place, ok, norm_ptr, cos, sin, eps, D: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr):
    """Return the numbers at `place` (1, P) of the heads at `x_ptr` (N, 1), float32: those of `rotated`, in one tile.

    All places of a head must be there, for the norm. `cos`, `sin`: of each place.
    """
    column = column_of(place, D, ROPE)
    x = tl.load(x_ptr + column, mask=ok, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x = x * scale * tl.load(norm_ptr + column, mask=place < D, other=0.0).to(tl.float32)
    if ROPE != 0:
        column = column_of((place + D // 2) % D, D, ROPE)
        y = tl.load(x_ptr + column, mask=ok, other=0.0).to(tl.float32)
        if NORM:
            y = y * scale * tl.load(norm_ptr + column, mask=place < D, other=0.0).to(tl.float32)
        x = x * cos + tl.where(place < D // 2, -y, y) * sin
    return x


@triton.jit
def to_stored(x, fit, KIND: tl.constexpr):
    """Convert to the cache's dtype KIND: 8-bit floats are scaled by `fit` and clamped to their range."""
    if KIND == tl.float8e4nv:  # noqa: SIM300  # In the other order Triton does not unwrap KIND.
        return tl.clamp(x.to(tl.float32) * fit, -448.0, 448.0).to(KIND)
    elif KIND == tl.float8e5:  # noqa: SIM300
        return tl.clamp(x.to(tl.float32) * fit, -57344.0, 57344.0).to(KIND)
    else:
        return x.to(KIND)


@triton.jit
def place_of(tables_ptr, table_stride, slot, position, BLOCK_SIZE: tl.constexpr):
    """Return the place in the cache of a slot's position."""
    block = tl.load(tables_ptr + slot * table_stride + position // BLOCK_SIZE).to(tl.int64)
    return block * BLOCK_SIZE + position % BLOCK_SIZE


@triton.jit
def write_heads(q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, out_ptr, pairs_ptr, tables_ptr, cos_ptr, sin_ptr, q_norm_ptr,
                k_norm_ptr, q_stride, k_stride, v_stride, table_stride, eps, k_fit, v_fit, HEADS: tl.constexpr,
                KV_HEADS: tl.constexpr, HEADS2: tl.constexpr, KV_HEADS2: tl.constexpr, D: tl.constexpr,
                HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr):  # fmt: skip
    """Write each token's queries, normed and rotated, to `out`; keys likewise and values to its place in the cache.

    HEADS2, KV_HEADS2: powers of two at least HEADS, KV_HEADS. Grid (T,).
    """
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(pairs_ptr + 2 * t).to(tl.int64)
    position = tl.load(pairs_ptr + 2 * t + 1)
    j = tl.arange(0, HALF)[None, :]
    half_ok = j < D // 2
    cos = tl.zeros([1, HALF], tl.float32)
    sin = cos
    if ROPE != 0:
        cos = tl.load(cos_ptr + position.to(tl.int64) * (D // 2) + j, mask=half_ok, other=0.0)
        sin = tl.load(sin_ptr + position.to(tl.int64) * (D // 2) + j, mask=half_ok, other=0.0)
    h = tl.arange(0, HEADS2)[:, None]
    a, b = rotated(q_ptr + t * q_stride + h * D, h < HEADS, q_norm_ptr, cos, sin, eps, D, HALF, NORM, ROPE)
    to = out_ptr + (t * HEADS + h) * D + j
    kind: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(to, a.to(kind), mask=(h < HEADS) & half_ok)
    tl.store(to + D // 2, b.to(kind), mask=(h < HEADS) & half_ok)
    g = tl.arange(0, KV_HEADS2)[:, None]
    a, b = rotated(k_ptr + t * k_stride + g * D, g < KV_HEADS, k_norm_ptr, cos, sin, eps, D, HALF, NORM, ROPE)
    place = place_of(tables_ptr, table_stride, slot, position, BLOCK_SIZE)
    to = keys_ptr + (place * KV_HEADS + g) * D + j
    ok = (g < KV_HEADS) & half_ok
    stored: tl.constexpr = keys_ptr.dtype.element_ty
    tl.store(to, to_stored(a.to(kind), k_fit, stored), mask=ok)
    tl.store(to + D // 2, to_stored(b.to(kind), k_fit, stored), mask=ok)
    v_at = v_ptr + t * v_stride + g * D + j
    to = values_ptr + (place * KV_HEADS + g) * D + j
    tl.store(to, to_stored(tl.load(v_at, mask=ok, other=0.0), v_fit, stored), mask=ok)
    tl.store(to + D // 2, to_stored(tl.load(v_at + D // 2, mask=ok, other=0.0), v_fit, stored), mask=ok)
