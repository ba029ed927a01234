"""Parts of a step that do not depend on the device: its tokens, prompt details, warm-up, sizes of state and cache.

All arrays here are numpy's, on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.base import StepInputs, StepLimits
from tokenmill.program.keeps import CacheSpec, StateSpec
from tokenmill.wire.messages import Payload, PromptDetails, TokenDetails

Ints = NDArray[np.int64]

PROMPT_ROWS = 128
"""Prompt positions whose logits are held at a time."""

STATE_RING = 2
"""States of a slot: those before and after its last step, because that step's last position may be computed again."""

WARM_TOKENS = 32
"""Length of the prompt that a warm-up runs."""

_MOST_TABLES = 16


# ---- sizes ----


class StateShape(NamedTuple):
    """Sizes of the per-slot state."""

    slots: int
    tokens: int  # of a slot
    blocks: int  # of a block table


def state_shape(limits: StepLimits) -> StateShape:
    """Return the sizes of the per-slot state: a token more than a sequence may have, and the blocks of the longest."""
    blocks = -(-limits.max_total_tokens // limits.block_size)
    return StateShape(limits.max_batch_size, limits.max_total_tokens + 1, blocks)


class CachePlan(NamedTuple):
    """Placement of the layers' caches: which block table a layer reads, and which part of a block it uses there.

    A block is as large as the caches of `parts`, and holds tokens of one table. Layers of several tables share a part.
    """

    windows: tuple[int, ...]  # by table: tokens that its layers attend to; 0: all
    places: dict[int, tuple[int, int]]  # layer -> its table, and its part of a block
    parts: tuple[CacheSpec, ...]  # by part of a block: its size, as the spec of one of its layers

    def table(self, layer: int) -> int:
        """Return the block table of a layer."""
        return self.places[layer][0]


def cache_plan(
    layout: Mapping[int, CacheSpec], max_total_tokens: int, model: Mapping[int, CacheSpec] | None = None
) -> CachePlan:
    """Divide the layers among block tables, each for layers of one window, so that a short window holds few blocks.

    There is one table for all layers if none has a window that is shorter than the longest sequence, or if their caches
    differ in more than the window. Otherwise a block holds as many layers as the smallest kind has, so that few parts
    of blocks stay unused. More than _MOST_TABLES tables are avoided by larger blocks: each costs time in every step.

    `model`: the caches of the whole model, of which `layout` is a stage's; None: it is the whole model's. All stages
    have the same tables, each for layers of all stages.
    """
    whole = layout if model is None else model
    windows = {layer: 0 if spec.window >= max_total_tokens else spec.window for layer, spec in whole.items()}
    kinds: dict[int, list[int]] = {}
    for layer, window in windows.items():
        kinds.setdefault(window, []).append(layer)
    if not any(kinds) or len({spec.parts for spec in whole.values()}) > 1:
        return one_table(layout)
    size = max(min(map(len, kinds.values())), -(-len(whole) // _MOST_TABLES))
    tables: list[tuple[int, list[int]]] = []
    for window, layers in sorted(kinds.items()):
        # A table of a stage's model takes layers at even distances, so that no table holds one stage's layers only.
        count = -(-len(layers) // size)
        parts = [layers[n * size :][:size] if len(layout) == len(whole) else layers[n::count] for n in range(count)]
        tables += [(window, [layer for layer in held if layer in layout]) for held in parts]
    places = {layer: (table, part) for table, (_, held) in enumerate(tables) for part, layer in enumerate(held)}
    widest = max((held for _, held in tables), key=len)
    return CachePlan(tuple(window for window, _ in tables), places, tuple(layout[layer] for layer in widest))


def most_rows(limits: StepLimits) -> dict[str, int]:
    """Return the rows of the largest step by `BufferSpec.rows`: tokens, rows whose logits are made, an encoder's."""
    samples = max(limits.max_batch_size, PROMPT_ROWS)
    return {"tokens": limits.max_batch_tokens, "samples": samples, "inputs": limits.max_total_tokens}


def one_table(layout: Mapping[int, CacheSpec]) -> CachePlan:
    """Return the plan in which all layers share a table that holds the blocks of all tokens."""
    return CachePlan((0,), {layer: (0, part) for part, layer in enumerate(layout)}, tuple(layout.values()))


def block_bytes(plan: CachePlan, item_bytes: int, block_size: int) -> int:
    """Return the bytes of a cache block over all its parts, for a cache of plain numbers of `item_bytes`."""
    return sum(spec.width for spec in plan.parts) * item_bytes * block_size


def state_bytes(layout: Mapping[tuple[int, str], StateSpec], item_bytes: int) -> int:
    """Return the bytes of a slot's states over all layers, for numbers of `item_bytes` where none are specified."""
    item = {"float": item_bytes, "float32": 4}
    return STATE_RING * sum(math.prod(spec.shape) * item[spec.dtype] for spec in layout.values())


# ---- tokens ----


class StepTokens(NamedTuple):
    """The T tokens of a step, row after row, its S rows, and the R rows that sample."""

    positions: Ints  # (T,)
    slots: Ints  # (T,)
    firsts: Ints  # (S,) index of each row's first token
    samples: Ints  # (R,) index of each sampling row's last token
    sampled_slots: Ints  # (R,)
    sampled_positions: Ints  # (R,) positions of the tokens that this step samples
    single_token: bool  # every row has exactly one token


def step_tokens(inputs: StepInputs) -> StepTokens:
    """Expand a step's rows to tokens. Reads the inputs only, so any thread may call it at any time."""
    slots, starts, samples = (a.astype(np.int64) for a in (inputs.slots, inputs.starts, inputs.samples))
    counts = inputs.counts.astype(np.int64)
    ends = starts + counts
    single_token = len(counts) == int(counts.sum())
    if single_token:
        firsts, token_slots, positions, last = np.arange(len(slots)), slots, starts, samples
    else:
        stops = np.cumsum(counts)
        firsts = stops - counts
        rows = rows_of_tokens(inputs.counts)
        token_slots, positions = slots[rows], np.arange(len(rows)) + (starts - firsts)[rows]
        last = (stops - 1)[samples]
    return StepTokens(positions, token_slots, firsts, last, slots[samples], ends[samples], single_token)


def rows_of_tokens(counts: NDArray[np.int32]) -> Ints:
    """Return the row (T,) of each token of a step whose rows have so many tokens."""
    return np.repeat(np.arange(len(counts)), counts)


def table_entries(blocks: NDArray[np.int32], width: int) -> NDArray[np.int32]:
    """Return `StepInputs.blocks` as (slot, column, block), where the tables of a slot are side by side.

    `width`: columns of a table. Entries that a later one overwrites are dropped.
    """
    columns = blocks[:, 0] * width + blocks[:, 2]
    return last_of_each(np.stack((blocks[:, 1], columns, blocks[:, 3]), 1))


def last_of_each(entries: NDArray[np.int32]) -> NDArray[np.int32]:
    """Drop the entries (slot, index, value) that a later one overwrites.

    A slot may be given up and taken again within one plan, and the order in which a device writes to the same place is
    not defined.
    """
    backwards = entries[::-1]
    places = backwards[:, 0].astype(np.int64) << 32 | backwards[:, 1]
    return backwards[np.unique(places, return_index=True)[1]]


# ---- prompt details ----


class PromptPositions(NamedTuple):
    """The P positions of a step at which prompt log-probabilities are requested.

    They are ordered by row of the step, then by position. The logits of a position give the log-probability of the
    prompt token one position later: its target.
    """

    rows: Ints  # (P,) row of the step
    tokens: Ints  # (P,) index among the step's T tokens
    slots: NDArray[np.int32]  # (P,)
    targets: Ints  # (P,) position of the target in its sequence
    top: NDArray[np.int32]  # (P,) number of likeliest ids to list

    def part(self, some: slice) -> PromptPositions:
        """Return some of the positions."""
        return PromptPositions(self.rows[some], self.tokens[some], self.slots[some], self.targets[some], self.top[some])


def prompt_positions(inputs: StepInputs, parameters: NDArray[np.void]) -> PromptPositions:
    """Return the positions of this step at which requests ask for prompt log-probabilities.

    `parameters`: `sampling.Parameters.rows`.
    """
    rows = parameters[inputs.slots]
    ends = np.minimum(inputs.starts + inputs.counts, rows["num_prompt"] - 1)  # the last one predicts the output
    counts = np.where(rows["prompt_logprobs"] >= 0, np.maximum(ends - inputs.starts, 0), 0)
    row = rows_of_tokens(counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = (np.cumsum(inputs.counts) - inputs.counts)[row]  # of each row, among the step's tokens
    targets = inputs.starts[row] + within + 1
    return PromptPositions(row, first + within, inputs.slots[row], targets, rows["prompt_logprobs"][row])


def prompt_payloads(
    inputs: StepInputs,
    parameters: NDArray[np.void],
    score: Callable[[PromptPositions], list[TokenDetails | None]],
) -> dict[int, Payload] | None:
    """Return the details of prompt tokens by row, as `StepResult.payloads`; None without any.

    `score` is called with PROMPT_ROWS positions at most, which bounds the memory of their logits. It returns the
    details of their targets, or None for each on ranks that have no details.
    """
    if inputs.prompt_logprobs < 0:
        return None
    found: dict[int, list[TokenDetails]] = {}
    positions = prompt_positions(inputs, parameters)
    for start in range(0, len(positions.rows), PROMPT_ROWS):
        part = positions.part(slice(start, start + PROMPT_ROWS))
        for row, detail in zip(part.rows.tolist(), score(part), strict=True):
            if detail is not None:
                found.setdefault(row, []).append(detail)
    return {row: PromptDetails(int(inputs.starts[row]) + 1, tuple(own)) for row, own in found.items()} or None


# ---- warm-up ----


def warm_up_steps(limits: StepLimits, num_blocks: int, num_tables: int = 1) -> tuple[StepInputs, ...]:
    """Return a small prompt and a decode step behind it, of slot 0 on the first of `num_blocks` cache blocks.

    With room for a single token, both compute that. All tables have the same blocks: what is computed is not read.
    """
    size = warm_up_tokens(limits, num_blocks)
    if not size:
        return ()
    slots = np.zeros(1, np.int32)
    blocks = first_blocks(-(-size // limits.block_size), num_tables)
    steps = ((0, max(size - 1, 1), blocks), (size - 1, 1, blocks[:0]))
    return tuple(
        StepInputs(slots, np.array([start], np.int32), np.array([count], np.int32), slots, blocks=new)
        for start, count, new in steps
    )


def first_blocks(count: int, num_tables: int) -> NDArray[np.int32]:
    """Return `StepInputs.blocks` that give slot 0 the first blocks of the cache in every table."""
    return np.array([(t, 0, i, i) for t in range(num_tables) for i in range(count)], np.int32).reshape(-1, 4)


def warm_up_tokens(limits: StepLimits, num_blocks: int) -> int:
    """Return the number of positions that `warm_up_steps` uses."""
    return min(limits.max_batch_tokens, limits.max_total_tokens, num_blocks * limits.block_size, WARM_TOKENS)
