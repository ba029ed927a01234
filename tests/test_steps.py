"""Parts of a step that do not depend on the device, against loops over rows and positions."""

import numpy as np
import pytest
from support_sampling import a_request

from tokenmill.backends import steps
from tokenmill.backends.base import StepInputs, StepLimits
from tokenmill.backends.sampling import Parameters
from tokenmill.program.keeps import CachePart, CacheSpec
from tokenmill.wire.messages import PromptDetails, TokenDetails


def a_step(rows, samples=(), **more) -> StepInputs:
    """Rows of (slot, start, count)."""
    slots, starts, counts = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    return StepInputs(slots, starts, counts, np.array(samples, np.int32), **more)


@pytest.mark.parametrize("seed", range(20))
def test_a_steps_tokens_are_those_of_its_rows_one_after_another(seed):
    rng = np.random.default_rng(seed)
    most = 1 if seed % 4 == 0 else 6
    rows = [(slot, int(rng.integers(0, 50)), int(rng.integers(1, most + 1))) for slot in rng.permutation(8).tolist()]
    samples = sorted(rng.permutation(8)[: seed % 8].tolist())
    found = steps.step_tokens(a_step(rows, samples))
    expected = [(slot, start + i) for slot, start, count in rows for i in range(count)]
    ends = np.cumsum([count for *_, count in rows])
    assert list(zip(found.slots.tolist(), found.positions.tolist(), strict=True)) == expected
    assert found.firsts.tolist() == [0, *ends[:-1]]
    assert found.samples.tolist() == [ends[row] - 1 for row in samples]
    assert found.sampled_slots.tolist() == [rows[row][0] for row in samples]
    assert found.sampled_positions.tolist() == [rows[row][1] + rows[row][2] for row in samples]
    assert found.single_token == (len(expected) == 8)
    assert {array.dtype for array in found[:-1]} == {np.dtype(np.int64)}, "kernels take their addresses"


@pytest.mark.parametrize("seed", range(20))
def test_prompt_details_come_row_by_row_and_a_bounded_number_of_positions_at_a_time(seed, monkeypatch):
    monkeypatch.setattr(steps, "PROMPT_ROWS", 7)
    rng, parameters = np.random.default_rng(seed), Parameters(5)
    lengths = rng.integers(1, 30, 5)
    wanted = rng.choice([-1, 0, 3], 5)
    for slot, (length, top) in enumerate(zip(lengths.tolist(), wanted.tolist(), strict=True)):
        parameters.admit(slot, a_request([1] * length, prompt_logprobs=top))
    rows = [(slot, int(rng.integers(0, 12)), int(rng.integers(1, 25))) for slot in rng.permutation(5)[:4].tolist()]
    inputs = a_step(rows, prompt_logprobs=3)
    parts = []

    def score(part: steps.PromptPositions) -> list[TokenDetails | None]:
        parts.append(len(part.rows))
        return [TokenDetails(float(p), (token, slot, top)) for _, token, slot, p, top in zip(*part, strict=True)]

    found = steps.prompt_payloads(inputs, parameters.rows, score)
    expected, first = {}, 0
    for row, (slot, start, count) in enumerate(rows):
        for position in range(start, start + count):
            if wanted[slot] >= 0 and position + 1 < lengths[slot]:
                ids = (first + position - start, slot, wanted[slot])
                expected.setdefault(row, []).append(TokenDetails(float(position + 1), ids))
        first += count
    first_of = {row: start + 1 for row, (_, start, _) in enumerate(rows)}
    assert found == ({row: PromptDetails(first_of[row], tuple(own)) for row, own in expected.items()} or None)
    assert max(parts, default=0) <= 7
    assert steps.prompt_payloads(a_step(rows), parameters.rows, score) is None


def test_ranks_without_details_give_none():
    parameters = Parameters(1)
    parameters.admit(0, a_request([1] * 9, prompt_logprobs=1))
    inputs = a_step([(0, 0, 9)], prompt_logprobs=1)
    assert steps.prompt_payloads(inputs, parameters.rows, lambda part: [None] * len(part.rows)) is None


@pytest.mark.parametrize(
    ("limits", "num_blocks", "rows"),
    [
        (StepLimits(512, 4, 4096, 16), 100, [(0, 31, 2), (31, 1, 0)]),
        (StepLimits(512, 4, 4096, 48), 100, [(0, 31, 1), (31, 1, 0)]),
        (StepLimits(8, 4, 4096, 4), 100, [(0, 7, 2), (7, 1, 0)]),
        (StepLimits(512, 4, 20, 16), 100, [(0, 19, 2), (19, 1, 0)]),
        (StepLimits(512, 4, 4096, 1), 1, [(0, 1, 1), (0, 1, 0)]),
        (StepLimits(512, 4, 4096, 16), 0, []),
    ],
)
def test_a_warm_up_is_a_prompt_and_a_decode_step_that_fit_the_limits_and_the_cache(limits, num_blocks, rows):
    made = steps.warm_up_steps(limits, num_blocks)
    assert [(int(s.starts[0]), int(s.counts[0]), len(s.blocks)) for s in made] == rows
    assert all(s.slots.tolist() == s.samples.tolist() == [0] for s in made)
    assert not made or made[0].blocks.tolist() == [[0, 0, i, i] for i in range(rows[0][2])]


def test_a_block_has_the_keys_and_values_of_its_tokens_in_every_layer():
    parts = {i: (CachePart("key", heads, 64), CachePart("value", heads, 64)) for i, heads in ((0, 2), (3, 1))}
    layout = {i: CacheSpec(i, both) for i, both in parts.items()}
    assert steps.block_bytes(steps.cache_plan(layout, 100), 2, 16) == 16 * 2 * 2 * (2 + 1) * 64


def layers(*windows, heads=1):
    parts = CachePart("key", heads, 64), CachePart("value", heads, 64)
    return {i: CacheSpec(i, parts, window) for i, window in enumerate(windows)}


@pytest.mark.parametrize(
    ("windows", "tables", "parts"),
    [
        ((0, 0, 0), (0,), 3),
        ((8, 8, 8), (8,), 3),
        ((8, 0, 8, 0), (0, 8), 2),
        ((8, 8, 8, 8, 8, 0), (0, 8, 8, 8, 8, 8), 1),
        ((8, 8, 0) * 4 + (8,), (0, 8, 8, 8), 4),  # the last has a part to spare
        ((8, 16, 8, 16), (8, 16), 2),
        ((100, 0, 100), (0,), 3),  # as long as the longest sequence: no window
        ((100, 0, 8), (0, 0, 8), 1),
        ((0, *[8] * 40), (0, *[8] * 14), 3),  # not 41 tables
    ],
)
def test_layers_of_one_window_share_tables_of_blocks_as_large_as_the_smallest_kind(windows, tables, parts):
    plan = steps.cache_plan(layers(*windows), 100)
    assert plan.windows == tables
    assert len(plan.parts) == parts
    assert len(set(plan.places.values())) == len(windows), "no two layers have the same part of a block"
    assert set(plan.places) == set(range(len(windows)))
    for layer, (table, part) in plan.places.items():
        assert tables[table] == (windows[layer] if windows[layer] < 100 else 0)
        assert part < parts


def test_layers_whose_caches_differ_in_size_share_one_table():
    layout = layers(8, 8) | {2: CacheSpec(2, layers(0, heads=2)[0].parts)}
    plan = steps.cache_plan(layout, 100)
    assert plan == ((0,), {0: (0, 0), 1: (0, 1), 2: (0, 2)}, tuple(layout.values()))


def test_the_tables_of_a_slot_are_side_by_side_and_the_last_entry_of_a_place_counts():
    blocks = np.array([[0, 3, 1, 5], [1, 3, 1, 6], [0, 3, 1, 7], [2, 0, 0, 8]], np.int32)
    made = steps.table_entries(blocks, 10)
    assert sorted(made.tolist()) == [[0, 20, 8], [3, 1, 7], [3, 11, 6]]
