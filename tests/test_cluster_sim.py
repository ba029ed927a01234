"""The simulated cluster: its clock adds up, no stream is lost, and placement does what it is for."""

from __future__ import annotations

import pytest

from bench.cluster_model import Machine, Replica, StepTime, Stream
from bench.cluster_sim import Cluster, Load, h200, limits_of
from tokenmill.backends.kind import CPU_DEFAULTS

TIME = StepTime(0.003, 0.0003, 0.0004, 1e-6)
MACHINE = Machine(TIME, limits_of(CPU_DEFAULTS), 5000)


def run(replica: Replica, streams: list[Stream]) -> tuple[list[float], list[float]]:
    """Submit streams at their times to one replica. Return when they got their first and last tokens, in that order."""
    first, last, todo = [], [], sorted(streams, key=lambda stream: stream.arrived, reverse=True)
    while todo or replica.until is not None:
        if todo and (replica.until is None or todo[-1].arrived < replica.until):
            stream = todo.pop()
            replica.submit(stream, stream.arrived)
            continue
        now = replica.until
        assert now is not None
        ended = replica.advance()
        first += [now] * len(ended.started)
        last += [now] * len(ended.finished)
    return first, last


def stream(at: float, prompt: int, new: int, number: int = 0) -> Stream:
    return Stream(at, number, number, 0, prompt, new)


def test_a_run_of_steps_takes_as_long_as_its_steps() -> None:
    assert TIME.run(50, 3, 600) == pytest.approx(sum(TIME.step(0, 3, 600 + 3 * step) for step in range(50)))


def test_one_stream_takes_its_prompt_and_then_a_step_a_token() -> None:
    first, last = run(Replica(0, MACHINE), [stream(1.0, 100, 11)])
    assert first == pytest.approx([1.0 + TIME.step(100, 0, 0)])
    assert last == pytest.approx([first[0] + TIME.run(10, 1, 101)])


def test_a_prompt_that_comes_meanwhile_waits_for_the_planned_step() -> None:
    begin = TIME.step(16, 0, 0)
    first, _ = run(Replica(0, MACHINE), [stream(0.0, 16, 100), stream(begin + 1e-4, 20, 2, 1)])
    planned = begin + TIME.run(2, 1, 17)  # the step under way and the one behind it
    assert first[1] == pytest.approx(planned + TIME.step(20, 1, 19))


def test_a_prompt_that_comes_in_the_last_step_waits_for_no_other() -> None:
    step = TIME.step(16, 0, 0)
    first, last = run(Replica(0, MACHINE), [stream(0.0, 16, 1), stream(step / 2, 20, 2, 1)])
    assert first == pytest.approx([step, step + TIME.step(20, 0, 0)])
    assert len(last) == 2


def test_a_short_prompt_passes_long_ones_but_the_oldest_gets_half() -> None:
    replica = Replica(0, MACHINE)
    first, last = run(replica, [stream(0.0, 2000, 1), stream(0.001, 1500, 1, 1), stream(0.002, 30, 1, 2)])
    assert len(last) == 3
    assert first[0] < 0.5 < first[1]  # the short one; the longest is the oldest, and is done before its time is doubled
    assert first[-1] <= 1.1 * (TIME.token * 3530 + 0.003 * replica.num_steps)


def test_a_long_prompt_is_computed_in_the_engines_pieces_beside_others() -> None:
    replica = Replica(0, MACHINE)
    run(replica, [stream(0.0, 16, 200), stream(0.01, 400, 2, 1)])
    alone = Replica(0, MACHINE)
    run(alone, [stream(0.0, 400, 2, 1)])
    assert alone.num_steps == 2  # its budget is 512 tokens
    assert replica.num_steps == 200  # its pieces ran in steps of the first one's tokens
    assert replica.reserved == alone.reserved == replica.context == 0


def test_no_more_run_than_the_cache_holds_and_a_second_turn_finds_the_first() -> None:
    replica = Replica(0, MACHINE)
    first, last = run(replica, [stream(0.001 * i, 2000, 100, i) for i in range(5)])
    assert sum(at < last[1] for at in first) == 2  # 5,000 tokens
    assert len(last) == 5
    before = replica.num_hits
    run(replica, [stream(10.0, 2200, 5, 4)])
    assert replica.num_hits - before == 2096  # 2,100 in blocks of 16


@pytest.mark.parametrize("policy", ["placed", "random"])
def test_no_stream_is_lost_with_a_zone(policy: str) -> None:
    cluster = Cluster(h200(), Load(700, 30.0, pause_s=1.0), 8, policy=policy, lose_zone_at=2.0, back_after_s=1.0)
    result = cluster.run()
    assert result.streams == 700
    assert not any(replica.streams for replica in cluster.replicas)
    assert not cluster._conversations
    assert result.moved > 20
    assert 0 < result.moved_gap_p99_s < 5
    assert len(cluster.ttft) == 700
    if policy == "placed":
        assert all(cluster.placements[0].outstanding(index) == 0 for index in range(8))
        assert len(cluster.placements[0]) == 8


def test_placement_finds_more_prefixes_and_sooner_first_tokens_than_chance() -> None:
    load = Load(1200, 25.0, system_tokens=1, pause_s=4.0)
    placed, random = (Cluster(h200(), load, 6, policy=policy).run() for policy in ("placed", "random"))
    assert placed.hit_share > 2 * random.hit_share
    assert placed.ttft_p99_s < random.ttft_p99_s


def test_routers_that_tell_each_other_find_what_one_finds() -> None:
    load = Load(1200, 25.0, system_tokens=1, pause_s=4.0)
    one, told, apart = (
        Cluster(h200(), load, 6, routers=routers, told=told).run().hit_share
        for routers, told in ((1, True), (4, True), (4, False))
    )
    assert told > 0.9 * one
    assert apart < 0.8 * one
