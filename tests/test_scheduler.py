"""The scheduler and the loop against an oracle that turns any mistake into a wrong token."""

from __future__ import annotations

import itertools
from collections import deque

import numpy as np
import pytest
from oracle import (
    Case,
    ListLink,
    OracleStep,
    PagedOracle,
    build,
    check_books,
    random_case,
    reference,
    request,
    run,
)

from tokenmill.backends.base import StepResult
from tokenmill.engine.block_pool import BlockPool, chain_hash, chain_root
from tokenmill.engine.budget import StepBudget
from tokenmill.engine.engine import Engine, digest
from tokenmill.engine.limits import SchedulerLimits
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.sequence import Batch
from tokenmill.errors import OutOfMemory
from tokenmill.wire.messages import Abort, Request, SamplingParams

LIMITS = SchedulerLimits(max_batch_tokens=100, max_batch_size=8, max_total_tokens=200, block_size=4)


def check_request(r: Request, case: Case, link: ListLink) -> None:
    outputs, got, want = link.outputs.get(r.id, []), link.tokens(r.id), reference(r)
    if r.id in case.hopeless and outputs:
        assert [o.finish_reason for o in outputs] == ["error"]
        assert str(len(r.prompt_ids) + r.stopping.max_new_tokens) in outputs[0].message
        return
    finished = [o.finish_reason for o in outputs if o.finish_reason]
    if r.id in case.aborted and not finished:
        assert got == want[: len(got)]
    else:
        assert got == want
        assert finished == ["stop" if want[-1] in r.stopping.stop_ids else "length"] == [outputs[-1].finish_reason]
    if outputs:
        assert not outputs[0].token_ids, "the first output tells of the admission"
        check_details(r, case, link)


def check_details(r: Request, case: Case, link: ListLink) -> None:
    outputs, n = link.outputs[r.id], len(r.prompt_ids)
    details = [detail.logprob for o in outputs for detail in o.details]
    assert details == ([n + i for i in range(len(link.tokens(r.id)))] if r.sampling.logprobs >= 0 else [])
    prompt_details = [detail.logprob for o in outputs for detail in o.prompt_details]
    if r.sampling.prompt_logprobs < 0:
        assert not prompt_details
    elif r.id in case.aborted:
        assert prompt_details == list(range(1, len(prompt_details) + 1))
    else:
        assert prompt_details == list(range(1, n)), "every position of the prompt, once and in order"


def prompt_cost(start: int, count: int, weight: int) -> float:
    return sum(1 + (position / weight if weight else 0) for position in range(start, start + count))


def check_prompts_beside(batch: Batch, limits: SchedulerLimits) -> None:
    """Those that take part beside others that decode cost little, but for the first, which may get its least."""
    first_new = len(batch.slots) - len(batch.admitted)
    rows = list(zip(batch.starts.tolist(), batch.counts.tolist(), strict=True))
    decoding = sum(count == 1 for _, count in rows[:first_new])
    prompts = [(start, count) for row, (start, count) in enumerate(rows) if row >= first_new or count > 1]
    if not decoding or not limits.prefill_beside or not prompts:
        return
    costs = [prompt_cost(start, count, limits.context_weight) for start, count in prompts]
    allowed = limits.prefill_beside + decoding
    least = max(limits.min_chunk, min(limits.block_size, limits.prefill_beside))
    assert sum(costs) <= allowed + 1e-6 or (len(prompts) == 1 and prompts[0][1] <= least)


def check_plans(oracle: PagedOracle, limits: SchedulerLimits) -> None:
    for batch in oracle.batches:
        assert batch.num_tokens == batch.counts.sum() <= limits.max_batch_tokens
        assert batch.counts.min() >= 1
        assert 0 < len(batch.slots) == len(batch.sequences) <= limits.max_batch_size
        assert len(set(batch.slots.tolist())) == len(batch.slots)
        cut = np.setdiff1d(np.arange(len(batch.slots)), batch.samples)
        assert (batch.counts[cut] >= min(limits.min_chunk, limits.max_batch_tokens)).all()
        assert set(cut.tolist()) <= {len(batch.slots) - 1}, "nobody computes behind a prompt that is cut"
        check_prompts_beside(batch, limits)


@pytest.mark.parametrize("part", range(10))
def test_every_schedule_gives_the_reference_tokens(part: int) -> None:
    for seed in range(30 * part, 30 * part + 30):
        case = random_case(seed)
        engine, oracle, link = build(case.script, case.num_blocks, case.limits)
        run(engine, link)
        for r in case.requests:
            check_request(r, case, link)
        check_plans(oracle, case.limits)
        assert not any(engine.scheduler.pool.refs), "blocks leaked"

        replica, other, _ = build(case.script, case.num_blocks, case.limits)
        run(replica, replica.link)
        assert other.plans == oracle.plans, "two ranks would disagree"


def test_the_random_histories_meet_what_they_are_for() -> None:
    preempted = hits = chunked = refused = 0
    for seed in range(100):
        case = random_case(seed)
        engine, oracle, link = build(case.script, case.num_blocks, case.limits)
        run(engine, link)
        preempted += link.stats.preemptions
        hits += link.stats.cached_tokens
        chunked += sum(len(batch.slots) - len(batch.samples) for batch in oracle.batches)
        refused += len(case.hopeless - case.aborted)
    assert preempted > 300
    assert hits > 300
    assert chunked > 500
    assert refused > 20


def short(case: Case) -> list[Request]:
    return [r for r in case.requests if r.id not in case.hopeless]


@pytest.mark.parametrize("part", range(5))
def test_a_broken_row_ends_alone_and_what_it_computed_is_never_found(part: int) -> None:
    for seed in range(20 * part, 20 * part + 20):
        case = random_case(seed, aborts=False)
        engine, oracle, link = build(case.script, case.num_blocks, case.limits, poison_rate=0.01)
        run(engine, link)
        failed = {i for i, outputs in link.outputs.items() if outputs[-1].finish_reason == "error"} - case.hopeless
        assert bool(failed) <= bool(oracle.num_poisoned)
        for r in case.requests:
            if r.id in failed:
                got = link.tokens(r.id)
                assert got == reference(r)[: len(got)]
                assert link.outputs[r.id][-1].message
            else:
                check_request(r, case, link)

        oracle.poison_rate = 0.0
        again = [request(100 + r.id, (*r.prompt_ids, *reference(r)[:-1]), 1, salt=r.salt) for r in short(case)]
        link.script = [again]
        run(engine, link)
        for r in again:
            assert link.tokens(r.id) == reference(r)


# ---- a device without memory for a step


@pytest.mark.parametrize("part", range(10))
def test_steps_that_find_no_memory_change_no_token(part: int) -> None:
    for seed in range(20 * part, 20 * part + 20):
        case = random_case(seed)
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


def test_the_histories_without_memory_fail_launches_and_steps_and_keep_what_was_computed() -> None:
    launches = steps = hits = alone = 0
    for seed in range(60):
        case = random_case(seed, aborts=False)
        engine, oracle, link = build(case.script, case.num_blocks, case.limits, full_rate=0.1)
        run(engine, link)
        launches, steps = launches + oracle.num_full[0], steps + oracle.num_full[1]
        hits += link.stats.cached_tokens
        alone += sum(outputs[-1].finish_reason == "error" for outputs in link.outputs.values()) - len(case.hopeless)
    assert min(launches, steps) > 200
    assert hits > 300
    assert alone > 20


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
    budget = StepBudget(LIMITS)
    budget.shrink(100)
    budget.shrink(budget.max_tokens)
    assert budget.max_tokens == 25
    steps = 0
    while budget.max_tokens < 100:
        budget.passed()
        steps += 1
        assert budget.room(0).tokens == budget.max_tokens
        assert budget.max_tokens in (25, 50, 100)
    assert steps == 2000


def test_blocks_of_a_broken_prompt_are_not_found() -> None:
    prompt = range(1, 13)
    engine, oracle, link = build([[request(0, prompt)]], 16, LIMITS, poison_rate=1.0)
    run(engine, link)
    assert link.outputs[0][-1].finish_reason == "error"
    oracle.poison_rate = 0.0
    again = request(1, [*prompt, 7], 3)
    link.script = [[again]]
    run(engine, link)
    assert link.tokens(1) == reference(again)


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_the_tokens_do_not_depend_on_how_many_steps_are_on_the_device(depth: int) -> None:
    for seed in range(40):
        case = random_case(seed)
        engine, oracle, link = build(case.script, case.num_blocks, case.limits)
        scheduler, flying = engine.scheduler, deque()
        while link.script or scheduler.has_work or flying:
            for message in link.receive(False):
                scheduler.add(message) if isinstance(message, Request) else scheduler.abort(message.id)
            if batch := scheduler.schedule():
                flying.append((batch, oracle.launch(batch)))
            outputs = scheduler.notices()
            if flying and (len(flying) == depth or not batch):
                done, step = flying.popleft()
                outputs += scheduler.update(done, oracle.collect(step))
            link.send(outputs, scheduler.stats())
            check_books(scheduler)
        for r in case.requests:
            check_request(r, case, link)


def test_replicas_agree_on_every_batch_and_a_digest_tells_plans_apart() -> None:
    engine, oracle, link = build([[request(0, range(1, 30), 5), request(1, range(1, 20), 9)]], 32, LIMITS)
    run(engine, link)
    assert len(set(oracle.plans)) == len(oracle.plans)
    assert digest(None) not in oracle.plans


# ---- the prefix cache


def first_step_of(oracle: PagedOracle, request_id: int) -> tuple[int, int]:
    """Start and count of a request's first row."""
    for batch in oracle.batches:
        for row, seq in enumerate(batch.sequences):
            if seq.id == request_id:
                return int(batch.starts[row]), int(batch.counts[row])
    raise AssertionError


def test_a_second_request_reuses_the_first_ones_prefix() -> None:
    prompt = range(1, 33)
    engine, oracle, link = build([[request(0, prompt)], [], [], [request(1, prompt)]], 16, LIMITS)
    run(engine, link)
    assert first_step_of(oracle, 1) == (28, 4), "only the last block is computed"
    assert link.outputs[1][0].num_cached == 28
    assert link.stats.cached_tokens == 28


def test_a_prompt_is_shared_while_it_is_being_computed() -> None:
    prompt = range(1, 33)
    engine, oracle, _ = build([[request(0, prompt)], [request(1, prompt)]], 32, LIMITS)
    engine.step()
    engine.step()
    assert first_step_of(oracle, 1) == (28, 4)


def test_siblings_wait_a_step_for_a_prompt_instead_of_computing_it_each() -> None:
    prompt = range(1, 34)
    engine, oracle, link = build([[request(i, prompt, 3) for i in range(4)]], 64, LIMITS)
    run(engine, link)
    assert [first_step_of(oracle, i) for i in range(4)] == [(0, 33), (32, 1), (32, 1), (32, 1)]
    assert [len(batch.sequences) for batch in oracle.batches[:2]] == [1, 4]


def test_siblings_of_a_prompt_that_takes_several_steps_wait_for_its_last_one() -> None:
    limits = SchedulerLimits(max_batch_tokens=16, max_batch_size=8, max_total_tokens=200, block_size=4)
    engine, oracle, link = build([[request(i, range(1, 42), 3) for i in range(2)]], 64, limits)
    run(engine, link)
    assert first_step_of(oracle, 1) == (40, 1)
    assert [len(batch.sequences) for batch in oracle.batches[:4]] == [1, 1, 1, 2]


def test_who_shares_but_a_little_waits_for_nobody() -> None:
    head = [1, 2, 3, 4]
    requests = [request(i, [*head, *range(10 * i + 10, 10 * i + 20)], 3) for i in range(4)]
    engine, oracle, link = build([requests], 64, LIMITS)
    run(engine, link)
    assert len(oracle.batches[0].sequences) == 4


def test_generated_tokens_are_cached_too() -> None:
    engine, oracle, link = build([[request(0, range(1, 10), 20)]], 32, LIMITS)
    run(engine, link)
    answer = [*range(1, 10), *link.tokens(0), 7]
    link.script = [[request(1, answer)]]
    run(engine, link)
    assert first_step_of(oracle, 1)[0] == 28, "all full blocks of the 29 tokens, the last of which was never computed"


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    engine, _, link = build([[request(0, range(1, 30), 20), request(1, range(50, 80), 20)]], 20, LIMITS)
    run(engine, link)
    stats = link.stats
    assert stats.preemptions
    assert stats.prefill_tokens < 29 + 30 + 20 * stats.preemptions, "most of it was not computed again"
    assert link.outputs[1][-1].num_preemptions == stats.preemptions


def test_requests_of_different_salts_share_nothing() -> None:
    prompt = range(1, 33)
    script = [[request(0, prompt, salt=b"a")], [], [], [request(1, prompt, salt=b"b"), request(2, prompt, salt=b"a")]]
    engine, oracle, link = build(script, 64, LIMITS)
    run(engine, link)
    assert first_step_of(oracle, 1)[0] == 0
    assert first_step_of(oracle, 2)[0] == 28


def test_a_request_that_wants_something_of_every_prompt_token_skips_none() -> None:
    prompt, sampling = range(1, 33), SamplingParams(prompt_logprobs=0)
    engine, oracle, link = build([[request(0, prompt)], [], [request(1, prompt, sampling=sampling)]], 64, LIMITS)
    run(engine, link)
    assert first_step_of(oracle, 1) == (0, 32)


def test_the_tail_of_a_sequence_is_evicted_before_its_head() -> None:
    pool = BlockPool(num_blocks=4, block_size=1)
    blocks = pool.allocate(4)
    assert blocks is not None
    for i, block in enumerate(blocks):
        pool.publish(block, bytes([i]))
    pool.release(blocks)
    pool.allocate(1)
    assert pool.match([bytes([i]) for i in range(4)]) == blocks[:3]


def test_a_block_without_content_is_reused_before_a_cached_one() -> None:
    pool = BlockPool(num_blocks=3, block_size=1)
    first, second = pool.allocate(1), pool.allocate(1)
    assert first is not None
    assert second is not None
    pool.publish(first[0], b"x")
    pool.release(first)
    pool.release(second)
    assert pool.allocate(2) == [*second, 2]
    assert pool.match([b"x"]) == first


def test_a_salt_cannot_be_chosen_to_meet_another_chain() -> None:
    block = chain_hash(chain_root(b""), [1, 2, 3, 4])
    assert chain_hash(chain_root(block), [5, 6, 7, 8]) != chain_hash(block, [5, 6, 7, 8])


# ---- aborts, refusals, order


@pytest.mark.parametrize("turns", range(1, 9))
def test_an_abort_frees_everything_at_once(turns: int) -> None:
    limits = SchedulerLimits(max_batch_tokens=5, max_batch_size=4, max_total_tokens=100, block_size=4)
    engine, _, link = build([[request(0, range(1, 20), 30)]], 32, limits)
    for _ in range(turns):
        engine.step()
    told = len(link.outputs.get(0, []))
    engine.scheduler.abort(0)
    assert not any(engine.scheduler.pool.refs)
    assert not engine.scheduler.has_work
    run(engine, link)
    assert len(link.outputs.get(0, [])) == told, "nothing comes after an abort"


def test_an_unknown_or_repeated_abort_changes_nothing() -> None:
    engine, _, link = build([[request(0, range(1, 9), 4)], [Abort(5)], [Abort(0), Abort(0)], [Abort(0)]], 8, LIMITS)
    run(engine, link)
    check_books(engine.scheduler)


def test_an_aborted_id_may_come_back() -> None:
    r = request(0, range(1, 9), 4)
    engine, _, link = build([[r], [], [Abort(0), r]], 8, LIMITS)
    run(engine, link)
    assert link.tokens(0)[-4:] == reference(r)


@pytest.mark.parametrize("max_total_tokens, num_blocks", [(40, 100), (200, 8)])
def test_a_request_that_can_never_fit_is_refused_and_holds_up_nobody(max_total_tokens: int, num_blocks: int) -> None:
    limits = SchedulerLimits(100, 8, max_total_tokens, block_size=4)
    engine, _, link = build([[request(0, range(1, 31), 30), request(1, range(1, 9), 2)]], num_blocks, limits)
    run(engine, link)
    (refusal,) = link.outputs[0]
    assert refusal.finish_reason == "error"
    wanted, allowed = (60, 40) if max_total_tokens == 40 else (59, 32)
    assert str(wanted) in refusal.message
    assert str(allowed) in refusal.message
    assert link.tokens(1) == reference(request(1, range(1, 9), 2))


def test_a_request_that_just_fits_runs() -> None:
    limits = SchedulerLimits(100, 8, 33, block_size=4)
    r = request(0, range(1, 24), 10)  # 33 tokens, of which the last is never computed
    engine, _, link = build([[r]], 8, limits)
    run(engine, link)
    assert link.tokens(0) == reference(r)


def test_an_id_in_use_is_refused_and_the_first_request_goes_on() -> None:
    r = request(0, range(1, 9), 4)
    engine, _, link = build([[r, request(0, [3], 2)]], 8, LIMITS)
    run(engine, link)
    assert link.tokens(0) == reference(r)
    assert [o.finish_reason for o in link.outputs[0] if o.finish_reason] == ["error", "length"]


def test_requests_are_admitted_in_the_order_they_came() -> None:
    limits = SchedulerLimits(100, 1, 200, block_size=4)
    engine, _, link = build([[request(i, [i + 1], 3) for i in (3, 1, 2)]], 8, limits)
    run(engine, link)
    assert list(link.outputs) == [3, 1, 2]


def test_the_youngest_is_preempted_and_the_oldest_never() -> None:
    engine, _, link = build([[request(i, range(10 * i + 1, 10 * i + 9), 40) for i in range(4)]], 14, LIMITS)
    run(engine, link)
    preemptions = [link.outputs[i][-1].num_preemptions for i in range(4)]
    assert preemptions[0] == 0
    assert preemptions[3] > 0


def test_a_preempted_sequence_goes_before_those_that_have_not_run() -> None:
    requests = [request(i, range(10 * i + 1, 10 * i + 9), 40) for i in range(4)]
    engine, oracle, link = build([requests, [request(9, [5], 1)]], 14, SchedulerLimits(100, 4, 200, block_size=4))
    run(engine, link)
    assert link.outputs[3][-1].num_preemptions
    steps = [{seq.id for seq in batch.sequences} for batch in oracle.batches]
    first = next(turn for turn, ids in enumerate(steps) if 9 in ids)
    assert set.union(*steps[first:]) <= steps[first], "those that were preempted run again by then, or have ended"


def test_nobody_is_admitted_into_blocks_that_the_running_ones_need_next() -> None:
    engine, _, link = build([[request(i, range(40 * i + 1, 40 * i + 16), 4) for i in range(6)]], 16, LIMITS)
    run(engine, link)
    assert link.stats.preemptions == 0


# ---- what a backend sees


def test_rows_are_the_same_objects_while_nobody_joins_or_leaves() -> None:
    engine, oracle, link = build([[request(i, range(5 * i + 1, 5 * i + 6), 20) for i in range(4)]], 64, LIMITS)
    run(engine, link)
    decode = [batch for batch in oracle.batches if not batch.num_prefill_rows]
    pairs = list(itertools.pairwise(decode))
    assert sum(a.sequences is b.sequences and a.slots is b.slots for a, b in pairs) >= len(pairs) - 1
    assert sum(len(batch.blocks) for batch in decode) < len(decode) * 4, "only what is new is sent"


def test_the_decoding_ones_go_on_while_a_long_prompt_is_computed_in_chunks() -> None:
    limits = SchedulerLimits(16, 8, 400, block_size=4)
    engine, oracle, link = build([[request(0, [1], 60)], [], [request(1, range(1, 200), 2)]], 200, limits)
    run(engine, link)
    steps = [batch for batch in oracle.batches if any(seq.id == 1 for seq in batch.sequences)]
    assert all(any(seq.id == 0 for seq in batch.sequences) for batch in steps[:13])
    assert [batch.num_tokens for batch in steps[:13]] == [16] * 13


def test_a_prompt_is_not_cut_into_slivers() -> None:
    limits = SchedulerLimits(16, 8, 400, block_size=4, min_chunk=8)
    engine, oracle, link = build([[request(0, range(1, 13), 3), request(1, range(50, 62), 3)]], 200, limits)
    run(engine, link)
    assert oracle.batches[0].counts.tolist() == [12], "four tokens are left over, but no piece that small is cut"
    assert oracle.batches[1].counts.tolist() == [1, 12]


def test_a_long_prompt_comes_in_small_pieces_beside_others_that_decode() -> None:
    limits = SchedulerLimits(64, 8, 400, block_size=4, prefill_beside=8)
    script = [[request(0, range(1, 30), 40), request(1, range(50, 62), 40)], [], [request(2, range(100, 150), 2)]]
    engine, oracle, link = build(script, 200, limits)
    run(engine, link)
    assert oracle.batches[0].counts.tolist() == [29, 12], "nobody decodes yet"
    pieces = [batch.counts.tolist() for batch in oracle.batches if len(batch.counts) == 3]
    assert pieces[:5] == [[1, 1, 10]] * 5, "8, and one more for each of the two"


def test_stats_tell_the_step_they_come_after() -> None:
    engine, _, link = build([[request(0, range(1, 9), 3), request(1, range(21, 29), 3)]], 16, LIMITS)
    engine.step()
    assert (link.stats.running, link.stats.batch_size, link.stats.blocks_used) == (2, 0, 4)
    engine.step()
    assert (link.stats.batch_size, link.stats.batch_tokens, link.stats.prefill_rows, link.stats.admitted) == (
        2,
        16,
        2,
        2,
    )
    assert link.stats.step_s > 0
    run(engine, link)
    stats = link.stats
    assert (stats.waiting, stats.running, stats.blocks_used) == (0, 0, 0)
    assert (stats.prefill_tokens, stats.decode_tokens, stats.steps) == (16, 4, 3)


def test_a_result_of_the_wrong_length_is_a_bug_and_raises() -> None:
    scheduler = Scheduler(BlockPool(8, 4), LIMITS)
    scheduler.add(request(0, [1, 2], 2))
    batch = scheduler.schedule()
    assert batch is not None
    with pytest.raises(ValueError):
        scheduler.update(batch, StepResult([1, 2]))
