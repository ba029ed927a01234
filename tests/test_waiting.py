"""The queue: in order of arrival within a size class, the shortest class first."""

from __future__ import annotations

import random

import pytest
from oracle import request

from tokenmill.engine.sequence import Sequence
from tokenmill.engine.waiting import Waiting


def sequence(arrival: int, request_id: int | None = None) -> Sequence:
    return Sequence(request(arrival if request_id is None else request_id, [1]), arrival=arrival)


def test_the_shortest_class_comes_first_and_within_it_the_oldest() -> None:
    waiting = Waiting()
    for arrival, size in [(1, 5), (2, 3), (3, 5), (4, 3), (5, 9)]:
        waiting.add(sequence(arrival), size)
    assert [(p.size_class, p.arrival) for p in waiting.shortest_first(9)] == [(3, 2), (3, 4), (5, 1), (5, 3), (9, 5)]
    assert [p.arrival for p in waiting.shortest_first(1)] == [2, 1, 5]
    assert list(waiting) == [1, 2, 3, 4, 5]
    oldest = waiting.oldest()
    assert oldest
    assert oldest.arrival == 1


@pytest.mark.parametrize("seed", range(5))
def test_who_comes_back_has_its_old_place(seed: int) -> None:
    rng, waiting = random.Random(seed), Waiting()
    inside: dict[int, tuple[Sequence, int]] = {}
    for _ in range(300):
        arrival = rng.randrange(40)
        if arrival in inside:
            waiting.remove(inside.pop(arrival)[0])
        else:
            inside[arrival] = sequence(arrival), rng.randrange(4)
            waiting.add(*inside[arrival])
        expected = sorted((size, arrival) for arrival, (_, size) in inside.items())
        assert [(p.size_class, p.arrival) for p in waiting.shortest_first(99)] == expected
        assert list(waiting) == sorted(inside)
        assert len(waiting) == len(inside)
        assert getattr(waiting.oldest(), "arrival", None) == min(inside, default=None)
    assert waiting.get(99) is None
    assert 99 not in waiting
