"""Sizes of tiles by shape and number of rows: the fastest ones on an H100 and an H200 (`bench/gpu_kernels.py`,
`bench/gpu/decode_attention.py`).

Each class of rows has one set of sizes, so a fixed set of kernels is compiled at the start and none later.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_SHARED = 64  # query heads of a key-value head
CLASSES = (4, 16, 48, 96, 1 << 30)  # upper bounds of the classes of rows


class DecodeShape(NamedTuple):
    """Sizes for decode attention: keys of a round, splits, least keys of a split, rounds in flight, warps."""

    keys: int
    splits: int
    least: int
    stages: int
    warps: int


class TileShape(NamedTuple):
    """Sizes for attention of runs: rows of a tile, keys of a round, rounds in flight, warps."""

    rows: int
    keys: int
    stages: int
    warps: int


def power(n: int) -> int:
    """Return the least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def class_of(rows: int) -> int:
    """Return the class of `rows`."""
    return next(i for i, most in enumerate(CLASSES) if rows <= most)


class Contexts(IntEnum):
    """Kinds of contexts that single tokens of a step have, which decide the sizes of their attention: of about one
    length, uneven, or so long that splits pay.
    """

    ALIKE = 0
    UNEVEN = 1
    LONG = 2


_SHAPES = (  # by class of rows, each with the splits of short contexts
    DecodeShape(64, 32, 128, 3, 4), DecodeShape(32, 16, 128, 3, 2), DecodeShape(32, 1, 32, 3, 2),
    DecodeShape(32, 1, 32, 3, 2), DecodeShape(16, 1, 16, 4, 1),
)  # fmt: skip
_SHAPES_OF_CODES = (
    DecodeShape(64, 32, 128, 3, 4), DecodeShape(32, 16, 128, 3, 2), DecodeShape(64, 1, 64, 3, 4),
    DecodeShape(64, 1, 64, 3, 4), DecodeShape(32, 1, 32, 3, 2),
)  # fmt: skip
_OTHERS = {  # of 16 bits or coded, class of rows, and contexts
    (False, 1, Contexts.LONG): DecodeShape(16, 16, 128, 3, 1),
    (False, 2, Contexts.UNEVEN): DecodeShape(64, 1, 64, 4, 4),
    (False, 3, Contexts.UNEVEN): DecodeShape(64, 1, 64, 4, 4),
    (False, 4, Contexts.UNEVEN): DecodeShape(32, 1, 32, 4, 2),
    (True, 4, Contexts.ALIKE): DecodeShape(16, 1, 16, 3, 1),
}
_SPLITS_OF_LONG = 8
_ALIKE = 1.3  # most of the longest context over the mean
LONG = 2048  # tokens from which a sequence may be split even among many
_MANY_PROGRAMS = 384  # without splits: about three on each multiprocessor of an H100
_PER_WARP = 1024  # numbers of a result that a warp holds in registers


def decode_shape(
    rows: int,
    head_dim: int,
    shared: int,
    contexts: Contexts,
    item_bytes: int = 2,
    *,
    window: int = 0,
    kv_heads: int = 1,
    coded: bool = False,
) -> DecodeShape:
    """Return the sizes for `rows` sequences.

    `shared`: query heads of a key-value head. `item_bytes`: of a number of the computation. `window`: the most keys
    of a token; 0: all. `coded`: the cache holds 8-bit codes.

    Many rows start in the order of their lengths, so that small tiles, of which many fit a multiprocessor, are fastest.
    With fewer rows all start at once, and a long one ends sooner with larger tiles and more warps. A few sequences with
    a window are not split if they have many key-value heads.
    """
    own = class_of(rows)
    if 0 < window <= LONG and contexts is Contexts.LONG:
        contexts = Contexts.UNEVEN
    shape = _OTHERS.get((coded, own, contexts), (_SHAPES_OF_CODES if coded else _SHAPES)[own])
    if 0 < window <= LONG and own == 1 and kv_heads >= 16:
        shape = DecodeShape(64, 1, 64, 3, 4)
    if contexts is Contexts.LONG and shape.splits == 1:
        shape = shape._replace(splits=_SPLITS_OF_LONG, least=LONG // 4)
    if item_bytes > 2:
        return shape._replace(keys=32 if head_dim <= 64 else 16, stages=2, warps=4)
    if head_dim > 128:
        shape = shape._replace(keys=max(16, shape.keys // 2), stages=2)
    results = power(head_dim) * max(8, power(shared))
    return shape._replace(warps=max(shape.warps, min(8, results // _PER_WARP)))


def contexts_of(starts: NDArray[np.int32], kv_heads: int) -> Contexts:
    """Return the kind of contexts of single tokens with so many tokens before them. `kv_heads`: programs of a token.

    They are long if one has LONG tokens or more, and there are few programs without splits or it would run long after
    the others.
    """
    if not len(starts):
        return Contexts.ALIKE
    longest, mean = int(starts.max()), float(starts.mean())
    few = len(starts) * kv_heads <= _MANY_PROGRAMS
    if longest >= LONG and (few or longest > 2 * mean or longest >= 4 * LONG):
        return Contexts.LONG
    return Contexts.ALIKE if longest <= _ALIKE * mean else Contexts.UNEVEN


@cache  # asked at every step
def variant_of(rows: int, contexts: Contexts, coded: bool) -> Contexts:
    """Return the first kind of contexts for which so many rows have the sizes that they have for `contexts`."""
    wanted = decode_shape(rows, 128, 1, contexts, coded=coded)
    return next(kind for kind in Contexts if decode_shape(rows, 128, 1, kind, coded=coded) == wanted)


def variants(rows: int, coded: bool) -> tuple[Contexts, ...]:
    """Return the kinds of contexts for which the sizes of so many rows differ."""
    return tuple(kind for kind in Contexts if variant_of(rows, kind, coded) is kind)


def tile_shape(head_dim: int, shared: int, item_bytes: int = 2, batch_invariant: bool = False) -> TileShape:
    """Return the sizes for runs of any length. `batch_invariant`: single tokens are such runs, too."""
    if batch_invariant and head_dim <= 128 and item_bytes == 2:
        return TileShape(64, 64, 3, 4)
    if head_dim > 128 or item_bytes > 2:
        return TileShape(64, 32, 2, 4)
    return TileShape(64, 64, 3, 4) if head_dim > 64 else TileShape(128, 64, 3, 8)


BUSY = 528  # programs of tiles that keep a GPU busy: four on each multiprocessor of an H100
LEAST_KEYS = 512  # of a part of a tile's keys


def tile_splits(tiles: int, kv_heads: int, keys: int) -> int:
    """Return the number of parts that keys of tiles are split into. `keys`: of the longest tile.

    Few tiles without splits would leave most of a GPU idle.
    """
    return max(1, min(BUSY // max(1, tiles * kv_heads), keys // LEAST_KEYS, 16))


_SPAN_SPLITS = (16, 8, 4, 2, 1)  # by class of rows


def span_shape(rows: int, head_dim: int = 64, own: bool = False) -> DecodeShape:
    """Return the sizes for single tokens of `rows` sequences of an encoder and decoder, whose heads share no keys.

    `own`: they attend to the decoder's tokens, of which there are few as a rule.
    """
    return DecodeShape(64 if head_dim <= 64 else 32, _SPAN_SPLITS[class_of(rows)], 128 if own else 64, 2, 4)


class LatentShape(NamedTuple):
    """Sizes for single tokens that attend to compressed rows: heads and rows of a program, splits, least rows of a
    split, rounds in flight, warps.
    """

    heads: int
    keys: int
    splits: int
    least: int
    stages: int
    warps: int


_LATENT_SPLITS = (128, 16, 4, 2, 1)  # by class of rows
_LATENT_SPLITS_OF_LONG = (128, 16, 8, 4, 1)


def latent_shape(rows: int, heads: int, long: bool, item_bytes: int = 2) -> LatentShape:
    """Return the sizes for `rows` sequences. `heads`: of a query."""
    of_class = class_of(rows)
    splits = (_LATENT_SPLITS_OF_LONG if long else _LATENT_SPLITS)[of_class]
    least = 32 if of_class == 0 else 128
    if item_bytes > 2:
        return LatentShape(16, 16, splits, least, 1, 4)
    if heads <= 16:
        return LatentShape(16, 32, splits, least, 3, 4) if splits > 1 else LatentShape(16, 64, 1, least, 2, 4)
    return LatentShape(min(power(heads), 64), 64, splits, least, 2, 8)


def expanded_shape(columns: int, item_bytes: int = 2) -> TileShape:
    """Return the sizes for runs that attend to expanded keys of so many columns."""
    if item_bytes > 2 or columns > 256:
        return TileShape(64, 32, 2, 4)
    return TileShape(128, 64, 3, 8)


class ChooseShape(NamedTuple):
    """Sizes for choosing tokens: programs a row, logits of a round, rounds, warps."""

    chunks: int
    block: int
    rounds: int
    warps: int


def choose_shape(rows: int, vocab_size: int) -> ChooseShape:
    """Return the sizes for `rows` rows of logits."""
    chunks = (32, 16, 8, 8, 4)[class_of(rows)]
    block = min(4096, power(-(-vocab_size // chunks)))
    return ChooseShape(chunks, block, -(-vocab_size // (chunks * block)), 8)


def graph_sizes(most: int) -> list[int]:
    """Return the batch sizes to capture, the largest first. A step is padded to the next one."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 1025, 32)]
    return sorted({*(size for size in steps if size < most), min(most, 1024)}, reverse=True)


def library_sizes(most: int) -> list[int]:
    """Return numbers of rows that together use every kernel of cuBLAS for a matrix. It chooses by rows, odd or even."""
    steps = [*range(8, 512, 16), *range(512, 2048, 64), *range(2048, most, 512)]
    return sorted({size for step in (*steps, most - 1) for size in (step, step + 1) if 0 < size <= most})
