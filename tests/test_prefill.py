"""Division of steps among prompts, against the oracle: short prompts pass a long one, and none starves."""

from __future__ import annotations

import random

import pytest
from oracle import (
    build,
    check_books,
    check_plans,
    first_step_of,
    prompt_cost,
    prompt_details_of,
    reference,
    request,
    run,
)
from support_slow import mostly_slow

from tokenmill.engine.budget import PrefillBudget
from tokenmill.engine.limits import SchedulerLimits
from tokenmill.wire.messages import Request, SamplingParams

LIMITS = SchedulerLimits(max_batch_tokens=16, max_batch_size=8, max_total_tokens=500, block_size=4)
LONG = range(1, 401)


def fresh(request_id: int, tokens: int, new_tokens: int = 1) -> Request:
    """Return a request whose prompt shares no prefix with another."""
    return request(request_id, [1000 + request_id, *range(1, tokens)], new_tokens)


def steps_until(oracle, request_id: int) -> int:
    """Return the batches up to the one that computes the end of a prompt."""
    for index, (batch, left) in enumerate(zip(oracle.batches, oracle.left, strict=True)):
        if any(seq.id == request_id for seq in batch.sequences) and request_id not in left.filling:
            return index + 1
    raise AssertionError


def test_a_short_prompt_passes_a_long_one_that_is_being_computed() -> None:
    engine, oracle, link = build([[request(0, LONG)], [], [], [fresh(1, 7)]], 200, LIMITS)
    run(engine, link)
    assert oracle.batches[3].counts.tolist() == [9, 7]
    assert [link.tokens(i) for i in (0, 1)] == [reference(request(0, LONG)), reference(fresh(1, 7))]
    assert steps_until(oracle, 0) == 26, "407 tokens in steps of 16"


def test_a_prompt_that_passes_a_long_one_leaves_it_half_of_each_step() -> None:
    engine, oracle, link = build([[request(0, LONG)], [], [], [fresh(1, 20)]], 200, LIMITS)
    run(engine, link)
    assert [batch.counts.tolist() for batch in oracle.batches[3:7]] == [[8, 8], [8, 8], [12, 4], [16]]


@pytest.mark.parametrize("tokens", [1, 3, 8, 40, 100])
def test_a_long_prompt_ends_in_twice_its_time_whatever_endless_stream_passes_it(tokens: int) -> None:
    script = [[request(0, LONG)], *([fresh(2 * i + 1, tokens), fresh(2 * i + 2, tokens)] for i in range(100))]
    engine, oracle, _ = build(script, 2000, LIMITS)
    for _ in range(60):
        engine.step()
        check_books(engine.scheduler)
    assert steps_until(oracle, 0) <= 2 * -(-400 // 16) + 1
    assert first_step_of(oracle, 1)[1] >= min(tokens, 8), "and the stream moves on"
    assert oracle.batches[1].counts.tolist()[-1] >= min(tokens, 8)
    check_plans(oracle, LIMITS)


def test_a_short_prompt_behind_many_long_ones_waits_for_none_of_them() -> None:
    script = [[fresh(i, 300) for i in range(5)], [], [fresh(9, 8)], *([fresh(10 + i, 300)] for i in range(20))]
    engine, oracle, link = build(script, 4000, LIMITS)
    run(engine, link)
    assert steps_until(oracle, 9) == 3
    assert [steps_until(oracle, i) for i in range(5)] == [20, 38, 57, 76, 95], "they come one by one"


@pytest.mark.parametrize("seed", mostly_slow(range(30), range(10)))
def test_no_prompt_ends_later_than_twice_the_work_of_itself_and_all_before_it(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.choice([1, 3, 10, 60, 300]) for _ in range(40)]
    script: list[list[Request]] = []
    for i, size in enumerate(sizes):
        if not script or rng.random() < 0.5:
            script.append([])
        script[-1].append(fresh(i, size))
    engine, oracle, link = build(script, 4000, LIMITS)
    run(engine, link)
    for i in range(40):
        before = sum(sizes[: i + 1])
        born = next(turn for turn, messages in enumerate(script) if any(m.id == i for m in messages))
        assert steps_until(oracle, i) - born <= 2 * before / 16 + 2
    check_plans(oracle, LIMITS)


def test_prompts_of_about_the_same_size_are_computed_in_the_order_they_came() -> None:
    engine, oracle, link = build([[fresh(0, 200), fresh(1, 45), fresh(2, 33), fresh(3, 60)]], 200, LIMITS)
    run(engine, link)
    ends = [steps_until(oracle, i) for i in range(4)]
    assert ends[1] < ends[2] < ends[3] < ends[0]


def test_the_oldest_takes_what_the_others_leave_and_nothing_is_computed_behind_one_that_is_cut() -> None:
    engine, oracle, link = build([[fresh(0, 30), fresh(1, 30), fresh(2, 30)]], 200, LIMITS)
    run(engine, link)
    assert [batch.counts.tolist() for batch in oracle.batches] == [[16], [14, 2], [16], [12, 4], [16], [10]]


def test_a_long_prompt_that_is_in_the_cache_counts_as_the_short_one_that_it_is() -> None:
    head = [7, *range(1, 200)]
    engine, oracle, link = build([[request(0, head)]], 400, LIMITS)
    run(engine, link)
    begin = len(oracle.batches)
    link.script = [[request(1, LONG)], [], [request(2, [*head, 5, 6, 7])]]
    run(engine, link)
    assert first_step_of(oracle, 2) == (200, 3)
    assert steps_until(oracle, 2) == begin + 3


def test_siblings_wait_for_a_long_prompt_that_others_pass_and_are_computed_once() -> None:
    siblings = [request(i, [*LONG, 10 * i]) for i in (1, 2)]
    engine, oracle, link = build([[request(0, LONG)], siblings, [fresh(5, 8)], [fresh(6, 8)]], 400, LIMITS)
    run(engine, link)
    assert [first_step_of(oracle, i) for i in (1, 2)] == [(400, 1), (400, 1)]
    assert steps_until(oracle, 5) == 3
    assert all(link.tokens(i.id) == reference(i) for i in siblings)


def test_who_shares_a_long_prompts_head_waits_for_no_more_than_that() -> None:
    limits = SchedulerLimits(16, 8, 500, block_size=4)
    engine, oracle, link = build([[request(0, LONG)], [request(1, [*range(1, 65), 900, 901])]], 400, limits)
    run(engine, link)
    start, _ = first_step_of(oracle, 1)
    assert start == 64
    assert steps_until(oracle, 1) == 5


def test_a_sibling_goes_before_another_long_prompt_once_its_head_is_there() -> None:
    script = [[request(0, range(1, 200))], [fresh(1, 230), request(2, [*range(1, 200), 5])]]  # one size class
    engine, oracle, link = build(script, 400, LIMITS)
    run(engine, link)
    assert steps_until(oracle, 2) <= steps_until(oracle, 0) + 1 < steps_until(oracle, 1)


def test_a_whole_prompt_that_is_wanted_shares_nothing_and_passes_by_its_whole_size() -> None:
    sampling = SamplingParams(prompt_logprobs=0)
    script = [
        [request(0, range(1, 60))],
        [],
        [],
        [],
        [],
        [request(1, LONG)],
        [request(2, range(1, 50), sampling=sampling)],
    ]
    engine, oracle, link = build(script, 400, LIMITS)
    run(engine, link)
    assert first_step_of(oracle, 2) == (0, 8)
    details = [detail.logprob for detail in prompt_details_of(link.outputs[2])]
    assert details == list(range(1, 49))


# ---- blocks


def test_short_prompts_pass_a_long_one_that_lacks_blocks_but_take_none_that_it_needs() -> None:
    limits = SchedulerLimits(64, 8, 400, block_size=4)
    holder = fresh(0, 200, 100)  # needs 75 of 100 blocks at its end
    stream = [[fresh(2 + i, 8, 30)] for i in range(150)]
    engine, oracle, link = build([[holder], [], [], [fresh(1, 240, 2)], *stream], 100, limits)
    run(engine, link)
    admitted = [seq.id for batch in oracle.batches for seq in batch.admitted]
    assert admitted.index(1) > 2, "some pass"
    ended = next(n for n, batch in enumerate(oracle.batches) if n > 5 and all(seq.id for seq in batch.sequences))
    came = next(n for n, batch in enumerate(oracle.batches) if any(seq.id == 1 for seq in batch.sequences))
    assert came - ended < 35, "soon after the older one has ended: those that passed may have 30 tokens"
    assert link.outputs[1][-1].finish_reason == "length"


@pytest.mark.parametrize("seed", mostly_slow(range(20), range(8)))
def test_prompts_in_the_middle_that_hold_all_blocks_do_not_hold_up_each_other(seed: int) -> None:
    rng = random.Random(seed)
    limits = SchedulerLimits(rng.choice([4, 9, 16]), 8, 200, block_size=4, min_chunk=rng.choice([1, 4]))
    requests = [fresh(i, rng.choice([2, 9, 40, 150]), rng.randint(1, 40)) for i in range(30)]
    script = [requests[i : i + 2] for i in range(0, 30, 2)]
    engine, oracle, link = build(script, rng.choice([50, 60, 80]), limits)
    run(engine, link)
    assert all(link.tokens(r.id) == reference(r) for r in requests)
    assert link.outputs[0][-1].num_preemptions == 0, "the oldest is never preempted"
    check_plans(oracle, limits)


def test_the_youngest_by_arrival_is_preempted_and_comes_back_to_its_place() -> None:
    limits = SchedulerLimits(64, 8, 200, block_size=4)
    engine, _, link = build([[fresh(0, 60, 60), fresh(1, 4, 60), fresh(2, 8, 60)], [fresh(3, 8, 2)]], 48, limits)
    run(engine, link)
    preemptions = [link.outputs[i][-1].num_preemptions for i in range(4)]
    assert preemptions[0] == preemptions[1] == 0
    assert preemptions[2] > 0
    assert all(link.tokens(r.id) == reference(r) for r in (fresh(0, 60, 60), fresh(2, 8, 60)))


def test_a_sequence_that_was_passed_is_not_preempted_for_the_younger_one_that_passed_it() -> None:
    limits = SchedulerLimits(64, 8, 200, block_size=4)
    holder, long, short = fresh(0, 60, 8), fresh(1, 100, 60), fresh(2, 8, 60)
    engine, oracle, link = build([[holder], [], [long], [short]], 40, limits)
    run(engine, link)
    assert [seq.id for batch in oracle.batches for seq in batch.admitted][:3] == [0, 2, 1], "the short one passes"
    assert link.outputs[1][-1].num_preemptions == 0
    assert link.outputs[2][-1].num_preemptions > 0
    assert all(link.tokens(r.id) == reference(r) for r in (holder, long, short))


# ---- pieces


def test_a_prompt_that_a_step_does_not_finish_comes_in_small_pieces_to_its_end() -> None:
    limits = SchedulerLimits(64, 8, 500, block_size=4, max_chunk=10)
    engine, oracle, link = build([[fresh(0, 64), fresh(1, 95)]], 200, limits)
    run(engine, link)
    assert [batch.num_tokens for batch in oracle.batches] == [64, *[10] * 9, 5]


def test_pieces_of_a_long_context_are_smaller() -> None:
    limits = SchedulerLimits(64, 8, 500, block_size=4, max_chunk=16, context_weight=100)
    engine, oracle, link = build([[request(0, LONG)]], 200, limits)
    run(engine, link)
    counts = [batch.num_tokens for batch in oracle.batches]
    assert counts[0] == 14
    assert counts[-2] == 3
    assert counts[:-1] == sorted(counts[:-1], reverse=True)


def test_those_that_pass_a_prompt_in_small_pieces_get_no_more_than_it_does() -> None:
    limits = SchedulerLimits(64, 8, 500, block_size=4, max_chunk=10)
    engine, oracle, link = build([[request(0, LONG)], [], [fresh(i, 6) for i in range(1, 6)]], 200, limits)
    run(engine, link)
    assert oracle.batches[2].counts.tolist() == [10, 6, 4]


@pytest.mark.parametrize("weight", [0, 1, 50])
@pytest.mark.parametrize("chunk", [0, 5, 30])
def test_a_budget_keeps_half_for_one_and_has_it_back(weight: int, chunk: int) -> None:
    limits = SchedulerLimits(100, 8, 500, context_weight=weight, prefill_beside=40, max_chunk=chunk)
    for start, wanted in [(0, 1), (0, 1000), (300, 7), (300, 1000)]:
        room = PrefillBudget.of(limits, 100, 3, 2)
        alone = PrefillBudget.of(limits, 100, 3, 2).fit(start, wanted, True)
        tokens, cost = room.tokens, room.cost
        room.reserve(start, wanted, True)
        others = room.fit(0, 1000)
        room.take(0, others)
        room.release()
        assert room.tokens == tokens - others
        assert room.cost <= cost
        kept = room.fit(start, wanted, True)
        assert kept >= min(alone, wanted) // 2
        assert kept == alone or others > 0


def test_a_prompt_weighs_what_its_pieces_weigh() -> None:
    for weight in (0, 1, 7, 1000):
        limits = SchedulerLimits(100, 8, 500, context_weight=weight)
        for start, count in [(0, 1), (0, 100), (33, 1), (400, 77)]:
            assert limits.weigh(start, count) == int(prompt_cost(start, count, weight) + 1e-9)
    assert [LIMITS.size_class(0, n) for n in (1, 2, 3, 4, 7, 8)] == [1, 2, 2, 3, 3, 4]
