"""The prefill budget beside sequences that decode."""

from __future__ import annotations

import pytest
from oracle import build, first_step_of, prompt_cost, request, run

from tokenmill.engine.limits import SchedulerLimits


def test_a_long_prompt_comes_in_small_pieces_beside_others_that_decode() -> None:
    limits = SchedulerLimits(64, 8, 400, block_size=4, prefill_beside=8)
    script = [[request(0, range(1, 30), 40), request(1, range(50, 62), 40)], [], [request(2, range(100, 150), 2)]]
    engine, oracle, link = build(script, 200, limits)
    run(engine, link)
    assert oracle.batches[0].counts.tolist() == [29, 12], "nobody decodes yet"
    pieces = [batch.counts.tolist() for batch in oracle.batches if len(batch.counts) == 3]
    assert pieces[:5] == [[1, 1, 10]] * 5, "8, and one more for each of the two"


def test_in_a_burst_prompts_get_more_room() -> None:
    limits = SchedulerLimits(200, 9, 400, block_size=4, prefill_beside=2)
    first = [request(i, range(i * 10 + 1, i * 10 + 9), 60) for i in range(3)]
    script = [first, [], [request(i, range(i * 40, i * 40 + 30), 40) for i in range(3, 9)]]
    engine, oracle, link = build(script, 200, limits)
    run(engine, link)
    pieces = [int(batch.counts[batch.counts > 1].sum()) for batch in oracle.batches[1:]]
    # six wait for three: 2 · 6² / 3 and 3; then five for four, and four for five
    assert [count for count in pieces if count][:4] == [27, 27, 16, 11]


@pytest.mark.parametrize("beside, weight", [(64, 100), (64, 1), (40, 0), (9, 5000)])
def test_pieces_of_a_long_prompt_become_smaller_as_it_goes_on_and_each_is_as_large_as_it_may_be(
    beside: int, weight: int
) -> None:
    limits = SchedulerLimits(512, 8, 3000, block_size=4, prefill_beside=beside, context_weight=weight)
    script = [[request(0, [1], 1500), request(1, [2], 1500)], [], [request(2, range(1, 1201), 1)]]
    engine, oracle, link = build(script, 800, limits)
    while 2 not in link.outputs or link.outputs[2][-1].finish_reason != "length":
        engine.step()
    pieces = [(b.starts.tolist()[2], b.counts.tolist()[2]) for b in oracle.batches if len(b.slots) == 3]
    assert sum(count for _, count in pieces) == 1200
    for start, count in pieces[:-1]:
        assert count >= 4, "a block at least, whatever it costs"
        assert count == 4 or prompt_cost(start, count, weight) <= beside + 2 + 1e-6
        assert prompt_cost(start, count + 1, weight) > beside + 2
    counts = [count for _, count in pieces[:-1]]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0] > 2 * counts[-1]) == (0 < weight <= 100)


def test_a_prompt_in_the_cache_is_counted_from_where_it_goes_on() -> None:
    limits = SchedulerLimits(512, 8, 3000, block_size=4, prefill_beside=64, context_weight=100)
    head = range(1, 801)
    script = [[request(0, [1], 1500)], [], [request(1, head, 1)]]
    engine, oracle, link = build(script, 800, limits)
    while 1 not in link.outputs or link.outputs[1][-1].finish_reason != "length":
        engine.step()
    link.script = [[request(2, [*head, *range(5, 90)], 1)]]
    engine.step()
    start, count = first_step_of(oracle, 2)
    assert start == 800
    assert prompt_cost(800, count, 100) <= 65 < prompt_cost(800, count + 1, 100)
