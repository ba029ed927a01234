"""Requests of an engine that stopped go on in another one: token for token as if it had never happened."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
from oracle import build, check_request, random_case, request, run
from support_constraints import House, guided_reference
from test_constrained import guided_case

from tokenmill.engine.limits import SchedulerLimits
from tokenmill.wire.messages import Output, Request


def unfinished(requests: list[Request], outputs: dict[int, list[Output]]) -> list[Request]:
    """Return the requests that have not ended, each with the tokens that it has so far."""
    left = []
    for r in requests:
        got = outputs.get(r.id, [])
        if not any(output.finish_reason for output in got):
            so_far = tuple(token_id for output in got for token_id in output.token_ids)
            left.append(msgspec.structs.replace(r, output_ids=so_far))
    return left


def test_a_request_goes_on_behind_the_tokens_that_it_has(histories: Callable[[int], range]) -> None:
    moved = 0
    for seed in histories(12):
        case, rng = random_case(seed, aborts=False), random.Random(seed)
        engine, _, link = build(case.script, case.num_blocks, case.limits)
        for _ in range(rng.randint(1, 60)):
            engine.step()
        left = unfinished(case.requests, link.outputs)
        moved += sum(bool(r.output_ids) for r in left)
        engine, _, second = build([left], case.num_blocks, case.limits)
        run(engine, second)
        for r in left:
            whole = [*link.outputs.get(r.id, []), *second.outputs[r.id][bool(link.outputs.get(r.id)) :]]
            second.outputs[r.id] = whole
            check_request(r, case, second)
    assert moved >= 2


def test_rules_go_on_where_they_stood(histories: Callable[[int], range]) -> None:
    moved = 0
    for seed in histories(24):
        case, _ = guided_case(seed, aborts=False, share=1.0)
        rng = random.Random(seed)
        first = House(case.script, case.num_blocks, case.limits, seed=seed)
        for _ in range(rng.randint(1, 60)):
            first.engine.step()
        left = [r for r in unfinished(case.requests, first.link.outputs) if r.id not in case.hopeless]
        moved += sum(bool(r.output_ids) for r in left)
        second = House([list(left)], case.num_blocks, case.limits, seed=seed)
        second.run()
        for r in left:
            want, reason = guided_reference(r)
            assert [*r.output_ids, *second.link.tokens(r.id)] == want
            assert second.reason(r.id) == reason
        assert not second.constraints.active
    assert moved >= 4


def test_a_request_that_has_all_its_tokens_is_refused() -> None:
    whole = msgspec.structs.replace(request(1, [1], 2), output_ids=(5, 6))
    engine, _, link = build([[whole]], 8, SchedulerLimits(10, 1, 10))
    run(engine, link)
    assert link.outputs[1][-1].finish_reason == "error"
    assert "all of its 2 new tokens" in link.outputs[1][-1].message
