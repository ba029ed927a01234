"""The scheduler and the loop against an oracle in which any mistake gives a wrong token."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace

import pytest
from oracle import (
    Case,
    build,
    check_books,
    check_history,
    check_request,
    first_step_of,
    random_case,
    reference,
    request,
    run,
    windowed_case,
    with_stride,
)

from tokenmill.backends.base import StepResult
from tokenmill.engine import engine as engine_module
from tokenmill.engine.block_pool import BlockPool, chain_hashes, chain_root
from tokenmill.engine.engine import digest
from tokenmill.engine.limits import SchedulerLimits
from tokenmill.engine.scheduler import Scheduler
from tokenmill.wire.messages import Abort, Extend, Output, PromptDetails, Request, SamplingParams, TokenDetails

LIMITS = SchedulerLimits(max_batch_tokens=100, max_batch_size=8, max_total_tokens=200, block_size=4)


Histories = Callable[[int], range]


def test_every_schedule_gives_the_reference_tokens(histories: Histories) -> None:
    met: Counter[str] = Counter()
    for seed in histories(80):
        case = random_case(seed)
        check_history(case, met)
        met["refused"] += len(case.hopeless - case.aborted)
    least = {"preempted": 100, "hits": 100, "chunked": 175, "refused": 7}
    assert all(met[what] > count for what, count in least.items()), f"the histories miss what they are for: {met}"


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_every_schedule_gives_the_reference_tokens_with_several_steps_on_the_device(
    stride: int, histories: Histories
) -> None:
    met: Counter[str] = Counter()
    for seed in histories(20):
        case = windowed_case(seed) if seed % 4 == 0 else random_case(seed)
        check_history(with_stride(case, stride), met)
    least = {"preempted": 12, "hits": 15, "chunked": 30, "overlapped": 3}
    assert all(met[what] > count for what, count in least.items()), f"the histories miss what they are for: {met}"


def short(case: Case) -> list[Request]:
    return [r for r in case.requests if r.id not in case.hopeless]


def test_a_broken_row_ends_alone_and_what_it_computed_is_never_found(histories: Histories) -> None:
    for seed in histories(40):
        case = with_stride(random_case(seed, aborts=False), 1 + seed // 10 % 4)
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


@pytest.mark.parametrize("depth, stride", [(1, 1), (3, 1), (4, 1), (1, 3), (2, 3), (4, 2)])
def test_the_tokens_do_not_depend_on_how_many_steps_are_on_the_device(
    depth: int, stride: int, histories: Histories
) -> None:
    for seed in histories(20 if stride == 1 else 8):
        case = with_stride(random_case(seed), stride)
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
            check_books(scheduler, depth)
        for r in case.requests:
            check_request(r, case, link)


def test_replicas_agree_on_every_batch_and_a_digest_tells_plans_apart() -> None:
    engine, oracle, link = build([[request(0, range(1, 30), 5), request(1, range(1, 20), 9)]], 32, LIMITS)
    run(engine, link)
    assert len(set(oracle.plans)) == len(oracle.plans)
    assert digest(None) not in oracle.plans


# ---- the prefix cache


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


def test_a_prompt_that_shares_less_than_half_does_not_wait_for_another() -> None:
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


def test_a_request_for_prompt_log_probabilities_skips_no_cached_token() -> None:
    prompt, sampling = range(1, 33), SamplingParams(prompt_logprobs=0)
    engine, oracle, link = build([[request(0, prompt)], [], [request(1, prompt, sampling=sampling)]], 64, LIMITS)
    run(engine, link)
    assert first_step_of(oracle, 1) == (0, 32)


def test_a_payload_reaches_its_request_with_the_token_or_without_one_and_never_an_ended_one() -> None:
    scheduler = Scheduler(BlockPool(64, 4), SchedulerLimits(6, 4, 100, 4))
    for request_id, length in ((0, 3), (1, 30)):
        scheduler.add(request(request_id, range(1, length + 1), 5))
    payloads = {row: PromptDetails(1 + row, (TokenDetails(0.0),)) for row in (0, 1)}
    batch = scheduler.schedule()
    assert batch is not None
    assert batch.samples.tolist() == [0]
    result = StepResult([7], None, payloads)
    assert scheduler.update(batch, result) == [Output(0, (7,), payload=payloads[0]), Output(1, payload=payloads[1])]
    assert result.payloads == {0: payloads[0], 1: payloads[1]}, "the executor's own is left as it was"
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.abort(0)
    scheduler.abort(1)
    assert scheduler.update(batch, StepResult([8], None, payloads)) == []


def test_the_tail_of_a_sequence_is_evicted_before_its_head() -> None:
    pool = BlockPool(num_blocks=4, block_size=1)
    blocks = pool.allocate(4)
    assert blocks is not None
    for i, block in enumerate(blocks):
        pool.publish([block], [bytes([i])])
    pool.release(blocks)
    pool.allocate(1)
    assert pool.match([bytes([i]) for i in range(4)]) == blocks[:3]


def test_a_block_without_content_is_reused_before_a_cached_one() -> None:
    pool = BlockPool(num_blocks=3, block_size=1)
    first, second = pool.allocate(1), pool.allocate(1)
    assert first is not None
    assert second is not None
    pool.publish(first, [b"x"])
    pool.release(first)
    pool.release(second)
    assert pool.allocate(2) == [*second, 2]
    assert pool.match([b"x"]) == first


def test_a_salt_cannot_be_chosen_to_meet_another_chain() -> None:
    block, *_ = chain_hashes(chain_root(b""), [1, 2, 3, 4], 4)
    assert chain_hashes(chain_root(block), [5, 6, 7, 8], 4) != chain_hashes(block, [5, 6, 7, 8], 4)


def test_of_a_prompt_that_shares_nothing_no_more_is_hashed_than_a_step_needs() -> None:
    scheduler = Scheduler(BlockPool(1000, 4), SchedulerLimits(400, 4, 4000, 4))
    scheduler.add(request(0, range(3600), 10))
    (seq,) = scheduler.waiting.values()
    assert scheduler.schedule() is not None
    assert 100 <= len(seq.hashes) < 200


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
def test_a_request_that_can_never_fit_is_refused_and_delays_no_other(max_total_tokens: int, num_blocks: int) -> None:
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


def test_no_sequence_is_admitted_into_blocks_that_running_ones_need_next() -> None:
    engine, _, link = build([[request(i, range(40 * i + 1, 40 * i + 16), 4) for i in range(6)]], 16, LIMITS)
    run(engine, link)
    assert link.stats.preemptions == 0


# ---- idle work


def test_idle_work_is_done_one_unit_a_step_while_there_are_no_requests() -> None:
    script = [[], [], [request(0, range(1, 9), 4)], *([] for _ in range(9)), [request(1, range(20, 28), 3)]]
    engine, oracle, link = build(script, 16, LIMITS)
    oracle.num_rests = 100
    for _ in range(len(script) + 6):
        engine.step()
    assert oracle.rests[:2] == [0, 0], "a turn each before the first request"
    assert oracle.rests.count(4) == 6, "from the turn on that reads its last token"
    assert oracle.rests[8:] == [7] * 4
    assert link.tokens(1) == reference(request(1, range(20, 28), 3))
    assert link.idle_turns == 0, "no waiting while there is work left"
    oracle.num_rests = 0
    engine.step()
    engine.step()
    assert link.idle_turns == 1


def test_a_device_that_is_never_idle_rests_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_IDLE_WORK_AFTER", 20)
    requests = [request(i, range(10 * i + 1, 10 * i + 9), 100) for i in range(3)]
    engine, oracle, link = build([requests], 128, LIMITS)
    oracle.num_rests = 3
    run(engine, link)
    assert oracle.rests == [19, 38, 57], "one turn in twenty plans nothing"
    assert [link.tokens(i) for i in range(3)] == [reference(r) for r in requests]


# ---- several steps on the device


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_decoding_sequences_are_shared_evenly_among_the_steps_on_the_device(stride: int) -> None:
    requests = [request(i, range(10 * i + 1, 10 * i + 9), 60) for i in range(7)]
    engine, oracle, link = build([requests], 128, replace(LIMITS, stride=stride))
    run(engine, link)
    steady = oracle.batches[stride + 1 : 7 * 60 // -(-7 // stride) // 2]
    assert max(len(batch.slots) for batch in steady) == -(-7 // stride)
    for group in zip(*(steady[i:] for i in range(stride)), strict=False):
        assert sorted(seq.id for batch in group for seq in batch.sequences) == list(range(7)), "each once in turn"
    assert oracle.most_in_flight == stride + 1
    assert all(link.tokens(r.id) == reference(r) for r in requests)


@pytest.mark.parametrize("stride", [2, 4])
def test_a_sequence_alone_is_decoded_as_soon_as_its_token_has_arrived(stride: int) -> None:
    r = request(0, range(1, 9), 20)
    engine, oracle, link = build([[r]], 128, replace(LIMITS, stride=stride))
    run(engine, link)
    assert link.tokens(0) == reference(r)
    assert (len(oracle.batches), oracle.most_in_flight) == (20, 1)


def test_chunks_of_a_prompt_follow_each_other_at_once() -> None:
    limits = SchedulerLimits(16, 8, 400, block_size=4, stride=3)
    r = request(0, range(1, 101), 2)
    engine, oracle, link = build([[r]], 128, limits)
    run(engine, link)
    assert link.tokens(0) == reference(r)
    assert [batch.num_tokens for batch in oracle.batches] == [16] * 6 + [4, 1]
    assert oracle.most_in_flight == 4


@pytest.mark.parametrize("token_ids", [(), (7,), (7, 8)])
def test_an_extended_sequence_does_not_wait_for_the_token_that_was_voided(token_ids: tuple[int, ...]) -> None:
    scheduler = Scheduler(BlockPool(64, 4), replace(LIMITS, stride=3))
    scheduler.add(request(0, range(1, 9), 20))
    assert scheduler.schedule() is not None
    assert scheduler.schedule() is None, "its token is being computed"
    scheduler.extend(Extend(0, 8, token_ids))
    batch = scheduler.schedule()
    assert batch is not None
    assert int(batch.starts[0] + batch.counts[0]) == 8 + len(token_ids)


# ---- batches as a backend sees them


def test_rows_are_the_same_objects_while_no_sequence_joins_or_leaves() -> None:
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
