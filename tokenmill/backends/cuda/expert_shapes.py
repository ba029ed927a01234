"""Mixtures of experts before any weight is read: what the kernels support, and the sizes of their tiles.

The sizes are the fastest ones measured on an H200 (`bench/gpu/experts.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from tokenmill.backends.cuda.products.forms import Form
from tokenmill.backends.cuda.shapes import power
from tokenmill.program import ops
from tokenmill.program.ops import Op

MOST_EXPERTS, MOST_CHOSEN = 512, 16
SEGMENT = 2048  # pairs of a row and an expert that one program sorts
LEAST_ITEMS = 16  # of a tile
_BUSY = 1024  # programs that keep an H200's cores busy
FEWEST = 8  # rows of x that tensor cores multiply with coded weights
_SORTED_AT_ONCE = (64, 512, SEGMENT)
_FEW = 256  # rows up to which routing is shared by many programs for each block of rows
_MANY = 4096  # rows up to which blocks of rows are small, so that enough programs route


class RouteShape(NamedTuple):
    """Sizes for routing: rows of a block, experts of a program, columns of a round, rounds in flight, warps."""

    rows: int
    experts: int
    columns: int
    stages: int
    warps: int


class RowShape(NamedTuple):
    """Sizes for a single row: outputs of a program, columns of a round, rounds in flight, warps.

    A round of coded weights is a block. `on_weights`: as in `TileShape`; `splits`: parts of the columns in a tile.
    """

    outputs: int
    columns: int
    stages: int
    warps: int
    on_weights: bool = False
    splits: int = 1


class TileShape(NamedTuple):
    """Sizes for several rows: items and outputs of a tile, columns of a round, rounds in flight, warps.

    `halves`: a tile with at most half of its items costs half; the copy engine does not read the rows then. `group`:
    tiles of items whose programs run side by side, so that they share tiles of the matrix. `on_weights`: scales
    of codes multiply weights, not sums.
    """

    items: int
    outputs: int
    columns: int
    stages: int
    warps: int
    halves: bool = False
    group: int = 16
    on_weights: bool = False


def refusal(op: Op) -> str:
    """Return why the kernels cannot run an operation; "" if they can, or if it is of another kind."""
    if isinstance(op, ops.Route):
        if op.weight.rows > MOST_EXPERTS:
            return f"it has kernels for {MOST_EXPERTS} experts at most, not {op.weight.rows}"
        if op.top_k > MOST_CHOSEN:
            return f"it has kernels for {MOST_CHOSEN} experts of a row at most, not {op.top_k}"
    return ""


def route_shape(rows: int, experts: int, columns: int, batch_invariant: bool = False) -> RouteShape:
    """Return the sizes for so many rows. `columns`: of a row."""
    if rows == 1 and not batch_invariant:
        return RouteShape(1, 1, power(columns), 1, 1) if columns <= 2048 else RouteShape(1, 2, 1024, 2, 2)
    if rows <= _FEW or batch_invariant:
        return RouteShape(16, 16, 128, 4, 4)
    if rows <= _MANY or experts > 128:
        return RouteShape(16, min(padded(experts), 128), 128, 3, 4)
    return RouteShape(64, padded(experts), 128, 3, 8)


def padded(experts: int) -> int:
    """Return the size of a block that holds a number for each expert."""
    return max(16, power(experts))


def sort_size(pairs: int) -> int:
    """Return the number of pairs that a program sorts."""
    return next((size for size in _SORTED_AT_ONCE if pairs <= size), SEGMENT)


def row_shape(columns: int, top_k: int = 1) -> RowShape:
    """Return the sizes for a single row. `top_k`: experts that a program adds up; 1: gate and up of one."""
    if top_k > 1:
        return RowShape(max(1, min(4, 16 // power(top_k))), min(power(columns), 1024), 4, 4)
    return RowShape(2, power(columns), 1, 4) if columns <= 2048 else RowShape(4, 1024, 4, 4)


def tile_items(mean: float, coded: Form | None = None) -> int:
    """Return the items of a tile, for a mean number of items of an expert. `coded`: the form of coded weights."""
    if coded is None:
        sizes = (16, 8), (32, 20), (64, 48)
    else:  # Halves cost e2m1 nothing, so that its tiles have room for experts that more rows choose than others.
        sizes = (16, 4 if coded.kind == "e2m1" else 12), (32, 24), (64, 128)
    return next((size for size, most in sizes if mean <= most), 128)


def tile_shape(items: int, mean: float, gated: bool, item_bytes: int = 2, batch_invariant: bool = False) -> TileShape:
    """Return the sizes for tiles of `items`. Batch-invariant sums have rounds of one size.

    `mean`: number of items of an expert.
    """
    if item_bytes > 2:
        return TileShape(min(items, 32), 32, 32, 2, 4)
    if batch_invariant:
        return TileShape(items, 64, 64, 4, 4) if items < 128 else TileShape(items, 128, 64, 3, 8)
    if items < 64:
        return TileShape(items, 64, 128, 4, 4)
    if items == 64:
        return TileShape(items, 64, 64, 3, 4) if gated else TileShape(items, 128, 64, 4, 8)
    if gated and mean <= 256:
        return TileShape(items, 64, 64, 3, 4, True, 8)
    return TileShape(items, 128, 64, 3, 8, True)


def coded_row_shape(columns: int, outputs: int, top_k: int, form: Form, *, down: bool) -> RowShape:
    """Return the sizes for a single row and coded weights: for gate and up of `top_k` experts, or for their `down`.

    `outputs`: of an expert. Warps wait for what they read; enough of them share the columns to hide that.
    """
    blocks = -(-columns // form.block)
    most = form.depth * FEWEST // 64  # Copies of less than 4 bytes a thread are not asynchronous.
    if not down:
        splits = 2 if blocks >= 8 and outputs * top_k <= 16 * _BUSY else 1
        return RowShape(16, 0, 3, min(2 * splits, most), splits=splits)
    splits = max(1, FEWEST // power(top_k))
    while blocks < 4 * splits and splits > 1:
        splits //= 2
    if splits > 1:
        return RowShape(max(8, 16 * most // (splits * power(top_k))), 0, 3, most, splits=splits)
    return RowShape(max(8, 64 // power(top_k)), 0, 4, min(4, most))


def coded_tile_shape(items: int, gated: bool, columns: int, form: Form, batch_invariant: bool = False) -> TileShape:
    """Return the sizes for tiles of `items` and coded weights (…, columns)."""
    depth, easy = min(form.depth, 32), form.kind == "e2m1"
    if batch_invariant:
        return TileShape(items, 64, depth, 3, 4, on_weights=True)
    if items == 16:
        return TileShape(items, 64, form.depth, 3, 4 if columns >= 2048 else 2, on_weights=easy)
    if items == 128 and (columns > 2048 if gated else easy):
        return TileShape(items, 128, depth, 3 if gated else 2, 8, True, 8, True)
    outputs = 64 if gated else 128
    if items == 32 and columns >= 2048 and not easy:
        return TileShape(items, outputs, form.depth, 3, 4, True)
    return TileShape(items, outputs, depth, 3, 4, True, 16 if items == 32 else 8, True)
