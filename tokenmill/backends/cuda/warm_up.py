"""The steps of a warm-up, as data: together they launch every kernel that a step may need."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.base import StepInputs, StepLimits
from tokenmill.backends.cuda.shapes import CLASSES, Contexts, variants
from tokenmill.backends.steps import first_blocks

_RUNS = tuple(4 << i for i in range(16))  # tokens of steps that are one prompt or several


class WarmUp(NamedTuple):
    """Steps on slot 0 and the padding slot; slot 0 has the first blocks of the cache in each of its tables."""

    tokens: int  # positions of slot 0, which hold the first places of the cache
    blocks: NDArray[np.int32]  # as `StepInputs.blocks`
    runs: tuple[StepInputs, ...]  # prompts, from short to long
    mixed: tuple[tuple[StepInputs, Contexts], ...]  # single tokens beside the end of a prompt; their contexts
    decodes: tuple[int, ...]  # rows of decode steps, the largest first; each in all its variants


def warm_up_of(
    limits: StepLimits,
    num_blocks: int,
    padding: int,
    graph_sizes: Iterable[int],
    num_tables: int = 1,
    coded: bool = False,
) -> WarmUp:
    """Return the warm-up of a backend. `padding`: its padding slot; `graph_sizes`: decode sizes captured at start;
    `coded`: the cache holds 8-bit codes.
    """
    tokens = min(num_blocks * limits.block_size, limits.max_total_tokens, limits.max_batch_tokens)
    blocks = first_blocks(-(-tokens // limits.block_size), num_tables)
    slots = max(limits.max_batch_size, 1)
    most = limits.max_batch_tokens // tokens * tokens
    runs = tuple(_runs(size, tokens) for size in sorted({min(size, most) for size in _RUNS}))
    sizes = sorted({min(rows, slots - 1, limits.max_batch_tokens - 2) for rows in CLASSES}) if tokens > 2 else []
    mixed = tuple(
        (_beside_a_prompt(rows, padding, limits.max_total_tokens), contexts)
        for rows in sizes if rows > 0
        for contexts in variants(rows, coded)
    )  # fmt: skip
    decodes = {min(rows, slots) for rows in CLASSES}.union(graph_sizes)
    return WarmUp(tokens, blocks, runs, mixed, tuple(sorted(decodes, reverse=True)))


def _runs(tokens: int, longest: int) -> StepInputs:
    """Return prompts of so many tokens in all, one behind the other in slot 0; the first one samples."""
    counts = np.full(-(-tokens // longest), min(tokens, longest), np.int32)
    return StepInputs(counts * 0, counts * 0, counts, np.zeros(1, np.int32))


def _beside_a_prompt(rows: int, padding: int, max_total_tokens: int) -> StepInputs:
    """Return a step of so many single tokens and a run of two, the end of the longest prompt; all sample."""
    slots = np.array([*[padding] * rows, 0], np.int32)
    counts = np.array([*[1] * rows, 2], np.int32)
    starts = np.array([*[0] * rows, max_total_tokens - 2], np.int32)
    return StepInputs(slots, starts, counts, np.arange(rows + 1, dtype=np.int32))
