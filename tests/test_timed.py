"""Per-request timings: durations in steps of the engine, and counts compared with the batches that ran."""

from __future__ import annotations

import random

import msgspec
import pytest
from oracle import ListLink, OracleStep, PagedOracle, check_books, random_case, request

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.engine import Engine
from tokenmill.engine.scheduler import Scheduler, SchedulerLimits
from tokenmill.engine.timed import Timed
from tokenmill.wire.messages import Abort, Output, Request, RequestTimings, ToEngine


class House:
    """An engine whose clock counts its steps."""

    def __init__(self, script: list[list[ToEngine]], num_blocks: int, limits: SchedulerLimits) -> None:
        self.turn = 0
        self.oracle, self.inner = PagedOracle(num_blocks, limits), ListLink(script)
        scheduler = Scheduler(BlockPool(num_blocks, limits.block_size), limits)
        self.link = Timed(self.inner, scheduler, lambda: float(self.turn))
        self.engine: Engine[OracleStep] = Engine(scheduler, self.oracle, self.link)

    def run(self) -> dict[int, list[Output]]:
        while self.inner.script or not self.engine.idle:
            self.engine.step()
            check_books(self.engine.scheduler)
            self.turn += 1
        return self.inner.outputs


def asking(request: Request) -> Request:
    return msgspec.structs.replace(request, wants_timings=True)


LIMITS = SchedulerLimits(max_batch_tokens=8, max_batch_size=2, max_total_tokens=64, block_size=4)


def test_the_timings_of_a_lone_request_are_its_turns():
    outputs = House([[asking(request(0, range(1, 20), 3))]], 32, LIMITS).run()[0]
    assert outputs[0].timings is None, "the admission has no tokens"
    assert [output.timings for output in outputs[1:]] == [
        RequestTimings(0.0, 3.0, 0.0, 0, 0, 1),  # 19 tokens of the prompt, 8 a step
        RequestTimings(0.0, 3.0, 1.0, 0, 0, 1),
        RequestTimings(0.0, 3.0, 2.0, 0, 0, 1),
    ]


def test_timings_of_a_request_that_waited_for_a_slot_have_its_queue_time_and_largest_batch():
    script: list[list[ToEngine]] = [[request(0, [1], 9), request(1, [2], 4)], [asking(request(2, [3], 9))]]
    last = House(script, 32, LIMITS).run()[2][-1]
    assert last.timings is not None
    assert last.timings.queue_s >= 3
    assert last.timings.prefill_s == 1
    assert last.timings.decode_s == 8
    assert last.timings.largest_batch == 2


def test_a_queue_begins_where_the_sender_says() -> None:
    house = House([[], [], [msgspec.structs.replace(asking(request(0, [1], 2)), sent_at=0.5)]], 32, LIMITS)
    assert house.run()[0][-1].timings == RequestTimings(1.5, 1.0, 1.0, 0, 0, 1)


def test_what_the_prefix_cache_had_is_among_the_timings():
    prompt = range(1, 20)
    script: list[list[ToEngine]] = [[request(0, prompt, 1)], [], [], [], [], [asking(request(1, prompt, 2))]]
    outputs = House(script, 32, LIMITS).run()[1]
    assert [output.timings and output.timings.num_cached for output in outputs] == [None, 16, 16]


def test_who_does_not_ask_is_told_nothing_and_the_outputs_are_handed_on_as_they_are():
    house = House([[request(0, [1, 2], 3), asking(request(1, [3], 2))]], 32, LIMITS)
    assert all(output.timings is None for output in house.run()[0])
    assert not house.link._runs, "nothing is kept of requests that have ended"
    plain = [Output(5, (1,))]
    house.link.send(plain, house.inner.stats)
    assert house.inner.outputs[5][0] is plain[0]


def test_a_refused_and_an_aborted_request_leave_nothing_behind():
    script: list[list[ToEngine]] = [
        [asking(request(0, [1] * 99, 3)), asking(request(1, [1], 30)), asking(request(2, [1], 30))],
        [],
        [Abort(1)],
        [],
    ]
    house = House(script, 32, LIMITS)
    outputs = house.run()
    assert outputs[0][-1].finish_reason == "error"
    assert not house.link._runs


@pytest.mark.parametrize("seed", range(60))
def test_over_random_histories_durations_add_up_and_counts_are_those_of_the_batches(seed):
    case, rng = random_case(seed), random.Random(seed)
    script = [[asking(m) if isinstance(m, Request) and rng.random() < 0.7 else m for m in ms] for ms in case.script]
    asked = {m.id for messages in script for m in messages if isinstance(m, Request) and m.wants_timings}
    arrived = {m.id: turn for turn, messages in enumerate(script) for m in messages if isinstance(m, Request)}
    house = House(script, case.num_blocks, case.limits)
    outputs = house.run()
    for request_id, told in outputs.items():
        timings = [output.timings for output in told if output.token_ids]
        if request_id not in asked:
            assert not any(timings)
            continue
        assert all(timings)
        sums = [t.queue_s + t.prefill_s + t.decode_s for t in timings if t]
        assert sums == sorted(set(sums)), "one step later each"
        if not told[-1].finish_reason or not timings[-1:] or timings[-1] is None:
            continue
        last, rows = timings[-1], house.oracle.batches
        own = [i for i, batch in enumerate(rows) if request_id in {seq.id for seq in batch.sequences}]
        sampled = [i for i in own if request_id in {rows[i].sequences[row].id for row in rows[i].samples}]
        own = own[: own.index(sampled[len(timings) - 1]) + 1]  # it may run in one more step, before its end is known
        assert last.largest_batch >= max(len(rows[i].slots) for i in own)
        assert last.largest_batch <= max(len(batch.slots) for batch in rows[own[0] : own[-1] + 1])
        assert last.num_preemptions == told[-1].num_preemptions
        assert last.num_cached == told[0].num_cached
        assert last.queue_s >= 0
        assert sums[-1] <= house.turn - arrived[request_id]
    assert not house.link._runs
