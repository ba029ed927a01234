"""Block tables with windows: their arithmetic, and the scheduler with several of them against its oracle."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace

import pytest
from oracle import (
    build,
    check_books,
    check_history,
    check_request,
    first_step_of,
    reference,
    request,
    run,
    windowed_case,
)

from tokenmill.engine.limits import SchedulerLimits
from tokenmill.engine.tables import Tables
from tokenmill.wire.messages import Extend, Request

LIMITS = SchedulerLimits(max_batch_tokens=16, max_batch_size=8, max_total_tokens=400, block_size=4, windows=(0, 9))

Histories = Callable[[int], range]


def test_every_schedule_of_tables_with_windows_gives_the_reference_tokens(histories: Histories) -> None:
    met: Counter[str] = Counter()
    for seed in histories(80):
        case = windowed_case(seed)
        oracle = check_history(case, met)
        met["behind the window"] += sum(
            int(index) > 0 and batch.blocks[:i, :2].tolist().count([table, slot]) == 0
            for batch in oracle.batches if batch.admitted
            for i, (table, slot, index, _) in enumerate(batch.blocks.tolist())
        )  # fmt: skip
    least = {"preempted": 50, "hits": 100, "chunked": 175, "behind the window": 25}
    assert all(met[what] > count for what, count in least.items()), f"the histories miss what they are for: {met}"


def test_a_broken_row_ends_alone_and_blocks_that_it_released_are_not_found(histories: Histories) -> None:
    for seed in histories(40):
        case = windowed_case(seed, aborts=False)
        windows = case.limits.windows
        if 1 in windows:  # such a table forgets at once
            continue
        engine, oracle, link = build(case.script, case.num_blocks, case.limits, poison_rate=0.01)
        run(engine, link)
        failed = {i for i, outputs in link.outputs.items() if outputs[-1].finish_reason == "error"} - case.hopeless
        assert bool(failed) <= bool(oracle.num_poisoned)
        for r in case.requests:
            if r.id in failed:
                got = link.tokens(r.id)
                assert got == reference(r, windows)[: len(got)]
            else:
                check_request(r, case, link)

        oracle.poison_rate = 0.0
        short = [r for r in case.requests if r.id not in case.hopeless]
        again = [request(100 + r.id, (*r.prompt_ids, *reference(r, windows)[:-1]), 1, salt=r.salt) for r in short]
        link.script = [again]
        run(engine, link)
        for r in again:
            assert link.tokens(r.id) == reference(r, windows)


def test_blocks_that_a_broken_prompt_released_before_it_failed_are_not_found() -> None:
    limits = replace(LIMITS, windows=(9,))
    engine, oracle, link = build([[request(0, range(1, 81))]], 50, limits, poison_rate=1.0)
    run(engine, link)
    assert link.outputs[0][-1].finish_reason == "error"
    oracle.poison_rate = 0.0
    again = request(1, range(1, 42), 3)
    link.script = [[again]]
    run(engine, link)
    assert link.tokens(1) == reference(again, (9,))


def test_steps_that_find_no_memory_change_no_token_of_windows(histories: Histories) -> None:
    for seed in histories(40):
        case = windowed_case(seed)
        engine, _, link = build(case.script, case.num_blocks, case.limits, full_rate=(0.02, 0.1)[seed % 2])
        run(engine, link)
        for r in case.requests:
            if not any("no memory" in output.message for output in link.outputs.get(r.id, ())):
                check_request(r, case, link)
        assert not any(engine.scheduler.pool.refs), "blocks leaked"


@pytest.mark.parametrize("depth", [1, 3])
def test_the_tokens_do_not_depend_on_how_many_steps_are_on_the_device(depth: int, histories: Histories) -> None:
    for seed in histories(20):
        case = windowed_case(seed)
        num_blocks = case.num_blocks + depth * len(case.limits.windows)  # held for steps that are not read back
        engine, oracle, link = build(case.script, num_blocks, case.limits)
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


def test_an_extension_without_tokens_computes_the_last_token_again_in_its_window() -> None:
    limits = replace(LIMITS, windows=(5, 0), block_size=1)
    r = request(0, range(1, 20), 40)
    engine, _, link = build([[r]], 200, limits)
    extended = 19
    while not engine.idle or link.script:
        seq = engine.scheduler.running.get(0)
        if seq and len(seq.token_ids) > extended:
            extended = len(seq.token_ids) + 2
            link.script = [[Extend(0, len(seq.token_ids), ())]]
        engine.step()
    assert link.tokens(0) == reference(r, limits.windows)


def test_a_decoding_sequence_holds_the_blocks_of_its_window_only() -> None:
    r = request(0, range(1, 41), 300)
    engine, _, link = build([[r]], 100 + 9, LIMITS)
    most: dict[int, int] = {0: 0, 1: 0}
    while not engine.idle or link.script:
        engine.step()
        for seq in engine.scheduler.running.values():
            if len(seq.token_ids) > 45:
                most = {table: max(most[table], len(blocks)) for table, blocks in enumerate(seq.blocks)}
    assert link.tokens(0) == reference(r, LIMITS.windows)
    assert most == {0: 85, 1: 2 + 2}, "9 tokens of 4: the own block, two behind it, one that a step may still need"


def test_a_prompt_holds_the_blocks_of_its_window_and_of_a_step() -> None:
    r = request(0, range(1, 201))
    engine, _, link = build([[r]], LIMITS.tables.blocks_of(200), LIMITS)
    most = 0
    while not engine.idle or link.script:
        engine.step()
        most = max([most, *(len(seq.blocks[1]) for seq in engine.scheduler.running.values())])
    assert link.tokens(0) == reference(r, LIMITS.windows)
    assert 4 <= most <= 2 + 4 + 1


def test_a_hit_needs_only_the_last_window_of_a_table_with_one() -> None:
    prompt = tuple(range(1, 81))
    engine, oracle, link = build([[request(0, prompt)]], 60, LIMITS)
    run(engine, link)
    pool = engine.scheduler.pool
    early = [key for key in pool._block_of if len(key) == 17][:15]  # of the second table, in order of their positions
    pool.unpublish(pool.find(early))
    link.script = [[request(1, prompt)]]
    run(engine, link)
    assert first_step_of(oracle, 1) == (76, 4)
    assert link.tokens(1) == reference(request(1, prompt), LIMITS.windows)

    pool.unpublish(pool.find([key for key in pool._block_of if len(key) == 17][-2:]))
    link.script = [[request(2, (*prompt, 3))]]
    run(engine, link)
    start, _ = first_step_of(oracle, 2)
    assert start < 76, "no window ends there"
    assert link.tokens(2) == reference(request(2, (*prompt, 3)), LIMITS.windows)


def test_a_table_without_an_early_block_has_hits_if_all_tables_have_windows() -> None:
    limits = replace(LIMITS, windows=(9,))
    prompt = tuple(range(1, 201))
    engine, oracle, link = build([[request(0, prompt, 2)]], 20, limits)
    run(engine, link)
    assert limits.tables.blocks_of(200) < 20 < 50, "the cache does not hold the whole prompt"
    link.script = [[request(1, prompt, 2)]]
    run(engine, link)
    assert first_step_of(oracle, 1) == (196, 4)
    assert link.tokens(1) == reference(request(1, prompt, 2), (9,))


def test_a_request_fits_by_the_blocks_of_all_its_tables() -> None:
    need = LIMITS.tables.blocks_of(300)
    assert need == 75 + 2 + 4 + 1
    assert not LIMITS.refusal(request(0, range(1, 300), 2), need)
    assert "which holds 296" in LIMITS.refusal(request(0, range(1, 300), 2), need - 1)


@pytest.mark.parametrize(
    ("windows", "num_blocks", "longest"),
    [((0,), 10, 40), ((0,), 1000, 400), ((0, 0), 11, 20), ((9,), 6, 24), ((9,), 7, 400), ((0, 9), 20, 52)],
)
def test_the_longest_sequence_is_the_longest_whose_blocks_fit(
    windows: tuple[int, ...], num_blocks: int, longest: int
) -> None:
    tables = Tables.of(windows, block_size=4, max_batch_tokens=16)
    assert tables.longest(num_blocks, 400) == longest
    assert tables.blocks_of(longest) <= num_blocks
    assert longest == 400 or tables.blocks_of(longest + 1) > num_blocks
