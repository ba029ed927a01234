"""Steps that run out of device memory are retracted, against the oracle: no token changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from oracle import (
    ListLink,
    OracleStep,
    PagedOracle,
    build,
    check_request,
    random_case,
    reference,
    request,
    run,
    with_stride,
)

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.budget import StepBudget
from tokenmill.engine.engine import Engine
from tokenmill.engine.limits import SchedulerLimits
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.sequence import Batch
from tokenmill.errors import OutOfMemory

LIMITS = SchedulerLimits(max_batch_tokens=100, max_batch_size=8, max_total_tokens=200, block_size=4)


def test_steps_that_find_no_memory_change_no_token(histories: Callable[[int], range]) -> None:
    met: Counter[str] = Counter()
    for seed in histories(60):
        case = with_stride(random_case(seed), 1 + seed // 3 % 4)
        rate = (0.02, 0.1, 0.3)[seed % 3]
        engine, oracle, link = build(case.script, case.num_blocks, case.limits, full_rate=rate)
        run(engine, link)
        failed = {i for i, outputs in link.outputs.items() if outputs[-1].finish_reason == "error"} - case.hopeless
        single = [batch for batch in oracle.batches if batch.num_tokens == 1]
        assert len(failed) <= len(single)
        for r in case.requests:
            if r.id in failed:
                got = link.tokens(r.id)
                assert got == reference(r)[: len(got)]
                assert "no memory" in link.outputs[r.id][-1].message
            else:
                check_request(r, case, link)
        assert link.stats.retracted == sum(oracle.num_full)
        assert not any(engine.scheduler.pool.refs), "blocks leaked"

        replica, other, _ = build(case.script, case.num_blocks, case.limits, full_rate=rate)
        run(replica, replica.link)
        assert other.plans == oracle.plans, "two ranks would disagree"
        met["launches"] += oracle.num_full[0]
        met["steps"] += oracle.num_full[1]
        met["hits"] += link.stats.cached_tokens
        met["alone"] += len(failed)
    least = {"launches": 100, "steps": 100, "hits": 150, "alone": 10}
    assert all(met[what] > count for what, count in least.items()), f"the histories miss what they are for: {met}"


@pytest.mark.parametrize("most", [1, 3, 9, 30])
def test_where_only_small_steps_find_memory_all_is_done_in_small_steps(most: int) -> None:
    requests = [request(i, range(10 * i + 1, 10 * i + 30 + i), 20) for i in range(6)]
    engine, oracle, link = build([requests], 64, LIMITS)
    oracle.most = most
    run(engine, link)
    for r in requests:
        assert link.tokens(r.id) == reference(r)
        assert link.outputs[r.id][-1].finish_reason == "length"
    ran = [batch.num_tokens for batch in oracle.batches if batch.num_tokens <= most]
    assert len(ran) <= sum(len(r.prompt_ids) + 20 for r in requests) / max(1, most // 2) + 60
    assert 0 < link.stats.retracted < 12


def test_a_request_that_finds_no_memory_for_a_single_token_ends_and_the_others_go_on() -> None:
    class Greedy(PagedOracle):
        def launch(self, batch: Batch) -> OracleStep:
            if any(seq.id == 2 for seq in batch.sequences):
                raise OutOfMemory("it is that one")
            return super().launch(batch)

    requests = [request(i, range(10 * i + 1, 10 * i + 20), 30) for i in range(5)]
    link, oracle = ListLink([requests]), Greedy(64, LIMITS)
    engine = Engine(Scheduler(BlockPool(64, 4), LIMITS), oracle, link)
    run(engine, link)
    assert link.outputs[2][-1].finish_reason == "error"
    assert not link.tokens(2)
    for r in requests:
        assert r.id == 2 or link.tokens(r.id) == reference(r)
    link.script = [[request(9, range(1, 90), 1)]]
    run(engine, link)
    assert oracle.batches[-1].num_tokens + link.outputs[9][0].num_cached == 89, "steps are as large as before"


def test_tokens_of_the_step_before_are_kept_when_a_launch_fails() -> None:
    requests = [request(i, range(10 * i + 1, 10 * i + 9), 20) for i in range(2)]
    engine, oracle, link = build([requests], 16, LIMITS)
    for _ in range(3):
        engine.step()
    assert [len(link.tokens(i)) for i in range(2)] == [2, 2]
    oracle.most = 1
    engine.step()
    assert [len(link.tokens(i)) for i in range(2)] == [3, 3]
    assert (link.stats.running, link.stats.waiting, link.stats.retracted) == (0, 2, 1)
    oracle.most = 100
    run(engine, link)
    assert [link.tokens(i) for i in range(2)] == [reference(r) for r in requests]


def test_who_was_taken_back_runs_again_in_the_same_order() -> None:
    engine, oracle, link = build([[request(i, range(10 * i + 1, 10 * i + 9), 20) for i in (4, 2, 7, 5)]], 64, LIMITS)
    engine.step()
    oracle.most = 3
    engine.step()
    assert list(engine.scheduler.waiting) == [4, 2, 7, 5]
    run(engine, link)
    assert list(dict.fromkeys(seq.id for batch in oracle.batches[2:] for seq in batch.sequences)) == [4, 2, 7, 5]


def test_steps_grow_again_after_many_good_ones() -> None:
    budget = StepBudget(100)
    budget.shrink(100)
    budget.shrink(budget.max_tokens)
    assert budget.max_tokens == 25
    steps = 0
    while budget.max_tokens < 100:
        budget.record_success()
        steps += 1
        assert budget.max_tokens in (25, 50, 100)
    assert steps == 2000
