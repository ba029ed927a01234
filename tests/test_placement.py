"""Placement: prefixes are found where they were computed, load beats them in time, and nothing is piled on."""

from __future__ import annotations

from collections import Counter, OrderedDict
from itertools import pairwise
from random import Random

import pytest

from tokenmill.placement.placement import Placement, Ticket
from tokenmill.placement.prefixes import PrefixIndex
from tokenmill.placement.prompt import EDGES, prompt_of_text, prompt_of_tokens

LARGE = 1 << 30  # tokens of a cache that evicts nothing


def tokens(seed: int, count: int) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(50_000) for _ in range(count)]


def of(count: int, capacity: int = LARGE, **options: int) -> Placement[int]:
    """Return a placement on the replicas 0 … count - 1."""
    placement: Placement[int] = Placement(**options)
    for name in range(count):
        placement.add(name, capacity)
    return placement


def placed(placement: Placement[int], token_ids: list[int], new: int = 10) -> Ticket[int]:
    ticket = placement.place(prompt_of_tokens(token_ids), new)
    assert ticket is not None
    return ticket


def served(placement: Placement[int], token_ids: list[int], new: int = 10) -> Ticket[int]:
    """Place a request and end it."""
    ticket = placed(placement, token_ids, new)
    placement.ended(ticket, new)
    return ticket


def fill(placement: Placement[int], replica: int, count: int) -> list[Ticket[int]]:
    """Give a replica `count` outstanding tokens of unique prompts."""
    others = [name for name in range(len(placement)) if name != replica]
    ticket = placement.place(prompt_of_tokens(tokens(-1 - replica, count)), 0, exclude=others)
    assert ticket is not None
    return [ticket]


def test_edges_lie_blocks_apart_and_then_an_eighth_of_their_position() -> None:
    assert EDGES[:9] == (16, 32, 48, 64, 80, 96, 112, 128, 144)
    assert all(edge % 16 == 0 for edge in EDGES)
    assert all(b - a <= max(16, a / 8) for a, b in pairwise(EDGES))
    assert sum(edge <= 2000 for edge in EDGES) == 34
    assert len(EDGES) < 120


@pytest.mark.parametrize("same", [0, 15, 16, 17, 500, 1999])
def test_prompts_have_the_keys_of_their_common_prefix_and_no_others_in_common(same: int) -> None:
    ids = tokens(1, 2000)
    other = [*ids[:same], ids[same] + 1, *ids[same + 1 :]]
    first, second = prompt_of_tokens(ids).keys, prompt_of_tokens(other).keys
    common = sum(edge <= same for edge in EDGES)
    assert first[:common] == second[:common]
    assert not set(first[common:]) & set(second[common:])


def test_salts_and_texts_and_sizes() -> None:
    ids = tokens(1, 100)
    assert not set(prompt_of_tokens(ids).keys) & set(prompt_of_tokens(ids, b"tenant").keys)
    assert prompt_of_tokens(ids).num_tokens == 100
    assert prompt_of_tokens([]) == ([], 0)
    chat = "system: be brief. " * 20
    longer = prompt_of_text(chat + "user: hello")
    assert longer.keys[: len(prompt_of_text(chat).keys)] == prompt_of_text(chat).keys
    assert longer.num_tokens == -(-len(chat + "user: hello") // 4)
    assert prompt_of_text("ü\ud800" * 40).num_tokens == 50  # also a text that is no valid UTF-8


def test_a_conversation_returns_to_the_replica_that_holds_it() -> None:
    placement = of(50)
    talk = tokens(1, 300)
    first = served(placement, talk)
    assert first.num_cached == 0
    for turn in range(5):
        talk += tokens(100 + turn, 60)
        ticket = served(placement, talk)
        assert ticket.replica == first.replica
        assert ticket.num_cached >= 7 / 8 * (len(talk) - 60) - 16


def test_a_cached_prefix_wins_while_the_replica_has_less_than_twice_its_tokens_to_do() -> None:
    for outstanding, stays in ((2000, True), (2100, False)):
        placement = of(2)
        talk = tokens(1, 1024)
        home = served(placement, talk).replica
        fill(placement, home, outstanding)
        assert (served(placement, talk).replica == home) == stays


def test_a_prefix_that_everybody_holds_leaves_the_choice_to_the_load() -> None:
    placement = of(20)
    system = tokens(1, 2000)
    for name in range(20):
        others = [other for other in range(20) if other != name]
        ticket = placement.place(prompt_of_tokens(system), 10, exclude=others)
        assert ticket is not None
        placement.ended(ticket, 10)
    counts = Counter(placed(placement, system + tokens(seed, 50)).replica for seed in range(400))
    assert max(counts.values()) <= 24  # 20 each, and little more


def test_two_choices_keep_loads_together_where_one_does_not() -> None:
    placement = of(200)
    counts = Counter(placed(placement, tokens(seed, 20)).replica for seed in range(4000))
    rng = Random(0)
    random = Counter(rng.randrange(200) for _ in range(4000))
    assert max(counts.values()) <= 24
    assert max(random.values()) >= 32


def test_a_shared_document_spreads_over_the_replicas_as_its_readers_become_many() -> None:
    placement = of(20)
    document = tokens(1, 3000)
    for seed in range(500):
        placed(placement, document + tokens(seed, 30), new=200)
    loads = [placement.outstanding(name) for name in range(20)]
    assert max(loads) - min(loads) <= 2 * 3000 + 200
    assert min(loads) > 0


def test_the_index_forgets_as_a_least_recently_used_cache_does() -> None:
    """Random conversations on one replica, compared with an exact cache of blocks of 16 tokens."""
    rng, capacity = Random(7), 8000
    placement = of(1, capacity)
    exact: OrderedDict[tuple[int, ...], None] = OrderedDict()
    talks: list[list[int]] = []
    agree = hits = 0
    for step in range(800):
        if talks and rng.random() < 0.7:
            talk = talks[-1 - min(int(rng.expovariate(0.15)), len(talks) - 1)]
            talk += tokens(10_000 + step, rng.randrange(16, 120))
        else:
            talk = tokens(step, rng.randrange(50, 400))
            talks.append(talk)
        chain = [tuple(talk[:end]) for end in range(16, len(talk) + 1, 16)]
        held = 0
        while held < len(chain) and chain[held] in exact:
            held += 1
        for block in reversed(chain):
            exact[block] = None
            exact.move_to_end(block)
        while len(exact) > capacity // 16:
            exact.popitem(last=False)
        found = served(placement, talk, new=0).num_cached
        hits += held > 4
        agree += abs(found - 16 * held) <= 2 * held + 16
    assert hits > 250  # the history meets what it is for
    assert agree >= 0.95 * 800


def test_a_replica_that_restarts_or_leaves_is_forgotten() -> None:
    placement = of(2)
    talk = tokens(1, 1000)
    running = placed(placement, talk, new=500)
    home = running.replica
    placement.add(home, LARGE)
    assert placement.outstanding(home) == 0.0
    placement.ended(running, 500)  # of the process before
    assert placement.outstanding(home) == 0.0
    assert all(served(placement, tokens(seed, 40)).num_cached == 0 for seed in range(10, 15))
    assert served(placement, talk).num_cached == 0
    placement.remove(home)
    placement.remove(home)
    assert home not in placement
    assert {served(placement, talk + tokens(seed, 40)).replica for seed in range(20)} == {1 - home}
    placement.remove(1 - home)
    assert placement.place(prompt_of_tokens(talk), 10) is None


def test_a_draining_replica_takes_nothing_and_remembers() -> None:
    placement = of(3)
    talk = tokens(1, 1000)
    home = served(placement, talk).replica
    placement.drain(home)
    placement.drain(home)
    placement.drain(99)
    assert home not in {served(placement, tokens(seed, 500)).replica for seed in range(30)}
    placement.drain(home, False)
    assert served(placement, talk[:900]).replica == home
    placement.drain(home)
    placement.remove(home)
    assert len(placement) == 2


def test_excluded_replicas_are_not_chosen_whatever_they_hold() -> None:
    placement = of(3)
    talk = tokens(1, 1000)
    home = served(placement, talk).replica
    others = {0, 1, 2} - {home}
    for name in others:
        ticket = placement.place(prompt_of_tokens(talk), 10, exclude={home, name})
        assert ticket is not None
        assert ticket.replica == (others - {name}).pop()
    assert placement.place(prompt_of_tokens(talk), 10, exclude={0, 1, 2}) is None


def test_requests_of_other_routers_count_as_load() -> None:
    placement = of(2)
    served(placement, tokens(0, 200))
    placement.report(0, 50)
    placement.report(77, 1)
    assert placement.outstanding(0) > placement.outstanding(1) == 0.0
    assert {placed(placement, tokens(seed, 100)).replica for seed in range(1, 10)} == {1}
    placement.report(0, 0)
    placement.report(1, 9)  # its own, which are nothing more
    assert placed(placement, tokens(50, 100)).replica == 0


def test_outstanding_tokens_are_the_prompts_until_the_first_token_and_the_answers_until_the_last() -> None:
    placement = of(1)
    ticket = placed(placement, tokens(1, 640), new=40)
    assert placement.outstanding(0) == 680
    placement.started(ticket)
    placement.started(ticket)
    assert placement.outstanding(0) == 40
    second = placed(placement, tokens(1, 640), new=10)
    assert placement.outstanding(0) == 50 + 640 - second.num_cached
    placement.started(second)
    assert placement.outstanding(0) == 50
    placement.ended(ticket, 12)
    assert placement.outstanding(0) == 10
    placement.ended(second, 10)
    assert placement.outstanding(0) == 0


def test_the_length_of_an_answer_is_expected_to_be_that_of_earlier_ones() -> None:
    placement = of(1)
    for _ in range(600):
        placement.ended(placed(placement, [1], new=4000), 300)
        placement.ended(placed(placement, [1], new=4000), 1, complete=False)
    placed(placement, [1], new=4000)
    assert placement.outstanding(0) == pytest.approx(301, rel=0.02)


def test_equal_histories_with_equal_seeds_give_equal_decisions() -> None:
    def history(seed: int) -> list[int]:
        placement = of(30, 4000, seed=seed)
        rng = Random(1)
        chosen = []
        for step in range(300):
            ticket = placed(placement, tokens(rng.randrange(40), 200) + tokens(step, 30))
            chosen.append(ticket.replica)
            if rng.random() < 0.8:
                placement.ended(ticket, 20)
        return chosen

    assert history(1) == history(1)
    assert history(1) != history(2)


def test_a_decision_looks_at_six_replicas_at_most_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (2, 60):
        placement = of(count)
        for name in range(count):
            fill(placement, name, 50)
            placement.ended(placement.place(prompt_of_tokens(tokens(1, 500 + name)), 1, set(range(count)) - {name}), 1)  # type: ignore[arg-type]
        looked: list[object] = []
        load = placement._load
        monkeypatch.setattr(
            placement, "_load", lambda replica, load=load, looked=looked: looked.append(0) or load(replica)
        )
        placed(placement, tokens(1, 2000))
        assert 2 <= len(looked) <= 6


def test_the_index_keeps_to_its_bound_and_drops_what_is_dead() -> None:
    placement = of(4, max_keys=1000)
    for seed in range(200):
        served(placement, tokens(seed, 400))
    assert placement.num_keys == 1000
    newest = served(placement, tokens(199, 400))
    assert newest.num_cached >= 350
    assert served(placement, tokens(0, 400)).num_cached == 0
    small = of(1, capacity=2000)
    for seed in range(200):
        served(small, tokens(seed, 400))
    assert small.num_keys < 250  # what 2,000 tokens of such prompts have, and little more


def test_a_replica_whose_entries_are_dead_is_no_candidate() -> None:
    index = PrefixIndex(1000)
    prompt = prompt_of_tokens(tokens(1, 200))
    for number in (1, 2, 3):
        index.join(number, 1000)
        index.record(number, prompt, 0)
    assert set(index.match(prompt).candidates(Random(0))) < {1, 2, 3}
    index.leave(2)
    index.advance(3, 1001)
    assert set(index.match(prompt).candidates(Random(0))) == {1}
    assert index.match(prompt).num_cached(3) == 0
    index.leave(1)
    assert index.match(prompt).candidates(Random(0)) == []


def test_conversations_hit_twice_as_often_as_with_random_placement() -> None:
    def share(route: bool) -> float:
        placement, rng = of(8, 40_000), Random(3)
        hit = total = 0
        talks = [tokens(seed, 200) for seed in range(100)]
        for step in range(1200):
            talk = talks[rng.randrange(len(talks))]
            talk += tokens(1000 + step, 40)
            one = rng.randrange(8)
            exclude = [] if route else [name for name in range(8) if name != one]
            ticket = placement.place(prompt_of_tokens(talk), 20, exclude)
            assert ticket is not None
            placement.ended(ticket, 20)
            hit, total = hit + ticket.num_cached, total + len(talk)
        return hit / total

    assert share(True) > 2 * share(False)
