"""Divisions of axes among ranks: which units each rank holds, and where it has zeros."""

from __future__ import annotations

from collections import Counter

import pytest

from tokenmill.program.shard import of_places
from tokenmill.program.share import Axis, Heads, Span, grouping


@pytest.mark.parametrize("heads, ranks, places", [
    ((32, 8), 4, (2, 4)), ((32, 8), 8, (1, 4)), ((32, 8), 16, (1, 2)), ((64, 8), 3, (3, 8)), ((16, 1), 3, (1, 6)),
    ((9, 3), 2, (2, 3)), ((9, 3), 3, (1, 3)), ((9, 3), 4, (1, 3)), ((9, 3), 8, (1, 2)), ((6, 2), 4, (1, 2)),
    ((12, 12), 5, (3, 1)), ((71, 1), 4, (1, 18)), ((14, 2), 4, (1, 4)),
])  # fmt: skip
def test_heads_are_divided_so_that_products_are_smallest(heads: Heads, ranks: int, places: tuple[int, int]) -> None:
    """Places for key-value heads on a rank, and for query heads at each of them."""
    assert grouping(heads, ranks) == places


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("heads", [(9, 3), (6, 2), (8, 8), (5, 1), (32, 4), (10, 2)])
def test_each_query_head_has_one_place_beside_its_key_value_head(heads: Heads, ranks: int) -> None:
    def units(axis: Axis, rank: int) -> list[int]:
        spans = axis.spans(ranks, rank)
        assert sum(span.size for span in spans) == axis.share(ranks)
        return [-1 if s.empty else s.first // 16 + i for s in spans for i in range(s.size // 16)]

    queries, keys = Axis(heads[0] * 16, 16, heads), Axis(heads[1] * 16, 16, heads)
    seen, repeats = Counter[int](), Counter[int]()
    for rank in range(ranks):
        q, k = units(queries, rank), units(keys, rank)
        each = len(q) // len(k)
        for place, head in enumerate(q):
            if head >= 0:
                assert k[place // each] == head // (heads[0] // heads[1])
        seen.update(q), repeats.update(k)
    del seen[-1], repeats[-1]
    assert seen == dict.fromkeys(range(heads[0]), 1)
    assert repeats == dict.fromkeys(range(heads[1]), keys.repeated(ranks))


@pytest.mark.parametrize("size, ranks, share, unit", [
    (1536, 2, 768, 128), (1536, 4, 384, 128), (11008, 4, 2816, 128), (11008, 8, 1408, 128), (768, 4, 192, 64),
    (11008, 16, 704, 64), (96, 2, 64, 32), (100, 3, 36, 4), (50257, 2, 25129, 1), (7, 4, 2, 1), (48, 2, 24, 8),
])  # fmt: skip
def test_rows_and_columns_are_divided_in_blocks_that_cost_little(size: int, ranks: int, share: int, unit: int) -> None:
    axis = Axis(size)
    assert (axis.share(ranks), axis.in_blocks(ranks).unit) == (share, unit)
    spans = [axis.spans(ranks, rank) for rank in range(ranks)]
    real = [n for some in spans for span in some if not span.empty for n in range(span.first, span.first + span.size)]
    assert real == list(range(size))
    assert all(some[0].empty or some[0].first == rank * share for rank, some in enumerate(spans)), "zeros come last"


def test_a_place_without_a_head_lies_beside_the_others_of_its_key_value_head() -> None:
    axis = Axis(6 * 16, 16, (6, 2))
    assert axis.spans(4, 1) == (Span(32, 16), Span(-1, 16))
    assert of_places((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), Axis(6, 1, (6, 2)), 4) == (1, 2, 3, 0, 4, 5, 6, 0)
    assert (axis.step(4), axis.padded(4)) == (16, True)
    assert not axis.padded(2)
