"""Constrained sequences among others, under the oracle, on random histories."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
from oracle import EOS, VOCAB, Case, ListLink, check_details, check_request, random_case, request, with_stride
from support_constraints import ENDS, Automaton, Follower, House, guided_reference

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.engine import Engine
from tokenmill.engine.gated import Gated
from tokenmill.engine.limits import SchedulerLimits
from tokenmill.engine.scheduler import Scheduler
from tokenmill.runtime.constraint import Constraint
from tokenmill.runtime.constraints import Constraints
from tokenmill.wire.messages import (
    Abort,
    Extend,
    GrammarSpec,
    Request,
    SamplingParams,
    Stats,
    StoppingParams,
    ToEngine,
)

LIMITS = SchedulerLimits(max_batch_tokens=100, max_batch_size=8, max_total_tokens=200, block_size=4)
THINK_ENDS = ((7, 8), (9,))


def guided(seed: int, r: Request, rng: random.Random) -> Request:
    """Return the request with other rules."""
    stopping, spec = r.stopping, None
    kind = rng.choice(["grammar", "grammar", "after", "budget", "both", "within"])
    if kind != "budget":
        after = THINK_ENDS if kind in ("after", "both") else ()
        spec = GrammarSpec("fake", str(rng.randrange(1000)), after)
    if kind in ("budget", "both", "within"):
        stopping = msgspec.structs.replace(
            stopping, force_after=rng.randint(1, 12), forced_ids=rng.choice([(7, 8), (9,), (3, 4, 5, 6, 7, 8)]),
            unless=THINK_ENDS,
        )  # fmt: skip
    if kind == "grammar" and rng.random() < 0.3:
        stopping = msgspec.structs.replace(stopping, min_new_tokens=rng.randint(1, 6))
    stop_ids = rng.choice([(), ENDS, (EOS,), (EOS, 20)])
    stopping = msgspec.structs.replace(stopping, stop_ids=stop_ids)
    return msgspec.structs.replace(r, stopping=stopping, grammar=spec, wants_timings=rng.random() < 0.5)


def guided_case(seed: int, aborts: bool = True, share: float = 0.6) -> tuple[Case, set[int]]:
    """Return a random history in which that share of the requests has rules, and these rules."""
    case, rng = random_case(seed, aborts), random.Random(seed)
    rules = {r.id: guided(seed, r, rng) for r in case.requests if rng.random() < share}
    case.requests = [rules.get(r.id, r) for r in case.requests]
    case.script = [[rules.get(m.id, m) if isinstance(m, Request) else m for m in turn] for turn in case.script]
    return case, set(rules)


def check_guided(r: Request, case: Case, house: House) -> None:
    link = house.link
    outputs, got, (want, reason) = link.outputs.get(r.id, []), link.tokens(r.id), guided_reference(r)
    if r.id in case.hopeless and outputs:
        assert [o.finish_reason for o in outputs] == ["error"]
        return
    finished = [o.finish_reason for o in outputs if o.finish_reason]
    if r.id in case.aborted and not finished:
        assert got == want[: len(got)]
    else:
        assert got == want
        assert finished == [reason] == [outputs[-1].finish_reason]
        assert bool(outputs[-1].message) == (reason == "error")
    if outputs:
        assert not outputs[0].token_ids, "the first output tells of the admission"
        assert all(o.token_ids for o in outputs if o.finish_reason in ("stop", "length")) or not got
        if not (reason == "error" or got != want):
            check_details(r, case, link)


def test_rules_are_followed_and_the_others_get_what_they_get_without_them(histories: Callable[[int], range]) -> None:
    met = dict.fromkeys(("masks", "forced", "preempted", "chunks", "hits", "void", "error", "stop", "length"), 0)
    for seed in histories(50):
        case, rules = guided_case(seed)
        case = with_stride(case, (1, 2, 1, 3)[seed % 4])
        house = House(case.script, case.num_blocks, case.limits, seed=seed)
        house.run()
        for r in case.requests:
            if r.id in rules:
                check_guided(r, case, house)
            else:
                check_request(r, case, house.link)
        assert not any(house.scheduler.pool.refs), "blocks leaked"
        assert not house.constraints.active, "constraints leaked"
        assert not house.constraints.due
        assert not house.extended._ended
        check_follower(case, house)
        stats = house.link.stats
        met["masks"] += house.oracle.num_masks
        met["forced"] += stats.forced_tokens
        met["preempted"] += sum(house.link.outputs[i][-1].num_preemptions for i in rules if i in house.link.outputs)
        met["hits"] += stats.cached_tokens
        met["chunks"] += sum(len(batch.slots) - len(batch.samples) for batch in house.oracle.batches)
        told = [m for turn in house.told.messages for m in turn if isinstance(m, Extend)]
        met["void"] += sum(not m.token_ids and not m.finish_reason for m in told)
        for i in rules - case.hopeless - case.aborted:
            met[house.reason(i)] += 1
    assert min(met.values()) >= 4, f"the histories miss what they are for: {met}"


def check_follower(case: Case, house: House) -> None:
    """Assert that another rank plans the same steps from rank 0's messages and sampled tokens."""
    oracle = Follower(case.num_blocks, case.limits, house.oracle.chosen)
    scheduler, link = Scheduler(BlockPool(case.num_blocks, case.limits.block_size), case.limits), ListLink([])
    link.script = [list(turn) for turn in house.told.messages]  # type: ignore[misc]
    engine = Engine(scheduler, oracle, link)  # type: ignore[arg-type]
    while link.script:
        engine.step()
    assert oracle.plans == house.oracle.plans


def test_steps_without_memory_change_no_token(histories: Callable[[int], range]) -> None:
    retracted = 0
    for seed in histories(30):
        case, rules = guided_case(seed)
        house = House(case.script, case.num_blocks, case.limits, seed=seed, full_rate=0.05)
        house.run()
        retracted += house.link.stats.retracted
        for r in case.requests:
            outputs = house.link.outputs.get(r.id, [])
            if outputs and "memory" in outputs[-1].message:
                assert house.link.tokens(r.id) == guided_reference(r)[0][: len(house.link.tokens(r.id))]
            elif r.id in rules:
                check_guided(r, case, house)
            else:
                check_request(r, case, house.link)
    assert retracted > 40


def test_what_must_come_next_is_appended_and_costs_no_step_of_its_own() -> None:
    forced = (30, 31, 32, 33, 34, 35)
    stopping = StoppingParams(20, force_after=3, forced_ids=forced)
    r = Request(0, (5, 6, 7), SamplingParams(), stopping, wants_timings=True)
    house = House([[r]], 32, LIMITS)
    house.run()
    want, _ = guided_reference(r)
    assert house.link.tokens(0) == want
    assert tuple(want[3:9]) == forced
    outputs = [o for o in house.link.outputs[0] if o.token_ids]
    assert [len(o.token_ids) for o in outputs] == [1, 1, 1, 6, *[1] * 11]
    assert len(house.oracle.batches) == 20 - 6 + 1, "a step a token that was sampled, and one that was overtaken"
    assert outputs[-1].timings is not None
    assert outputs[-1].timings.num_forced == house.link.stats.forced_tokens == 6


@pytest.mark.parametrize("what", ["launch", "collect"])
@pytest.mark.parametrize("count", range(1, 13))
def test_a_step_without_memory_beside_one_that_was_overtaken_changes_no_token(what: str, count: int) -> None:
    thinking = StoppingParams(20, force_after=3, forced_ids=(30, 31, 32, 33))
    spec = GrammarSpec("fake", "5", after=((guided_reference(request(1, [5, 6]))[0][0],),))  # begins at its first token
    requests = [
        Request(0, (5, 6, 7), SamplingParams(), thinking),
        msgspec.structs.replace(request(1, [5, 6], 25), grammar=spec),
        request(2, [7, 8], 20),
    ]
    house = House([requests], 64, LIMITS, most_turns=0)
    house.oracle.fails = what, count
    house.run()
    assert house.link.stats.retracted == 1
    for r in requests:
        assert (house.link.tokens(r.id), house.reason(r.id)) == guided_reference(r)


def test_a_thought_that_ends_in_time_is_left_alone() -> None:
    r = request(0, [5, 6, 7], 20)
    free = guided_reference(r)[0]
    ending = ((free[3], free[4]),)
    stopping = StoppingParams(20, force_after=5, forced_ids=(30, 31), unless=ending)
    house = House([[msgspec.structs.replace(r, stopping=stopping)]], 32, LIMITS)
    house.run()
    assert house.link.tokens(0) == free
    late = msgspec.structs.replace(stopping, force_after=4)
    house = House([[msgspec.structs.replace(r, stopping=late)]], 32, LIMITS)
    house.run()
    assert house.link.tokens(0)[:6] == [*free[:4], 30, 31]


def test_a_request_that_waits_for_its_grammar_delays_no_other() -> None:
    spec = GrammarSpec("fake", "5")
    slow = msgspec.structs.replace(request(0, [3, 4], 5), grammar=spec)
    house = House([[slow, request(1, [5, 6], 8)]], 32, LIMITS, most_turns=0)
    house.compiler.rng = random.Random()
    house.compiler.rng.randint = lambda a, b: 5  # type: ignore[method-assign]
    house.run()
    assert list(house.link.outputs) == [1, 0]
    first = next(turn for turn, told in enumerate(house.told.messages) if any(m.id == 0 for m in told))
    assert first == 5
    assert house.link.tokens(0) == guided_reference(slow)[0]


def test_a_grammar_that_is_none_ends_its_request_alone() -> None:
    bad = msgspec.structs.replace(request(0, [3, 4], 5), grammar=GrammarSpec("fake", "x"))
    good = request(1, [5, 6], 8)
    house = House([[bad, good]], 32, LIMITS)
    house.run()
    (output,) = house.link.outputs[0]
    assert (output.finish_reason, "no grammar" in output.message) == ("error", True)
    assert house.link.tokens(1) == guided_reference(good)[0]


def test_without_a_compiler_a_grammar_is_refused_and_not_ignored() -> None:
    link = ListLink([[msgspec.structs.replace(request(0, [3], 5), grammar=GrammarSpec("fake", "1"))]])
    gated = Gated(link, [Constraints(VOCAB)])
    assert gated.receive(False) == []
    gated.send([], Stats())
    ((output,),) = link.outputs.values()
    assert (output.finish_reason, output.message) == ("error", "this engine has no grammars")


@pytest.mark.parametrize("turns", range(1, 12))
def test_an_abort_at_any_time_leaves_nothing_behind(turns: int) -> None:
    spec = GrammarSpec("fake", "5")
    r = msgspec.structs.replace(request(0, [3, 4], 30), grammar=spec)
    script: list[list[ToEngine]] = [[r, request(1, [5, 6], 25)], *([] for _ in range(turns)), [Abort(0)]]
    house = House(script, 32, LIMITS, most_turns=3, seed=turns)
    house.run()
    assert not house.constraints.active
    got = house.link.tokens(0)
    assert got == guided_reference(r)[0][: len(got)]
    assert house.link.tokens(1) == guided_reference(request(1, [5, 6], 25))[0]


class Refusing:
    """A matcher of which one method fails."""

    done, failure = False, ""

    def __init__(self, what: str, after: int) -> None:
        self.what, self.after = what, after

    def fail(self, name: str) -> None:
        if name == self.what and self.after <= 0:
            raise RuntimeError("a matcher broke")

    def fill_mask(self, mask: Any, row: int) -> None:
        self.fail("fill_mask")
        mask[row] = 0xFFFFFFFF

    def accept(self, token_id: int) -> bool:
        self.after -= 1
        self.fail("accept")
        return self.what != "refuse" or self.after > 0

    def forced(self, most: int) -> list[int]:
        self.fail("forced")
        return []

    def rollback(self, n: int) -> None:
        raise AssertionError


@pytest.mark.parametrize("what", ["fill_mask", "accept", "forced", "refuse"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_matcher_that_fails_ends_its_request_alone(what: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Grammar:
        def matcher(self) -> Refusing:
            return Refusing(what, after)

    spec = GrammarSpec("fake", "5")
    requests = [msgspec.structs.replace(request(i, [3 + i, 4], 12), grammar=spec) for i in range(3)]
    house = House([requests], 64, LIMITS, most_turns=0)
    real = Automaton.matcher
    made: list[int] = []

    def matcher(grammar: Automaton) -> Any:
        made.append(1)
        return Grammar().matcher() if len(made) == 2 else real(grammar)

    monkeypatch.setattr(Automaton, "matcher", matcher)
    house.run()
    monkeypatch.undo()
    assert house.reason(1) == "error"
    assert len(house.link.tokens(1)) <= max(1, after), "the token at which it failed is the last"
    for i in (0, 2):
        assert house.link.tokens(i) == guided_reference(requests[i])[0]


def test_only_steps_with_a_row_that_needs_it_wait() -> None:
    spec = GrammarSpec("fake", "5", after=((49,),))
    thinking = msgspec.structs.replace(request(0, [3, 4], 30), grammar=spec)
    house = House([[thinking, request(1, [5, 6], 25)]], 64, LIMITS, most_turns=0)
    house.run()
    want, _ = guided_reference(thinking)
    begins = want.index(49) if 49 in want else len(want)
    assert sum(house.oracle.deferred.values()) == max(0, len(want) - 1 - begins), "none before its grammar"


def test_end_ids_that_the_request_does_not_stop_at_are_never_allowed() -> None:
    for seed in range(40):
        grammar = Automaton(seed, dead=0.0)
        r = msgspec.structs.replace(request(0, [3], 40), grammar=GrammarSpec("fake", str(seed)))
        constraint = Constraint(r, grammar.matcher(), ENDS)  # type: ignore[arg-type]
        bits = np.zeros((1, 2), np.uint32)
        grammar.matcher().fill_mask(bits, 0)
        constraint.restrict(bits[0])
        assert not bits[0, 0] & 0b11 or bits[0, 0] == 0xFFFFFFFF
