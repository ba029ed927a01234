"""How many tokens a step may have: by the limits, beside others that decode, and by what memory has shown to allow.

Pure integers: every rank counts the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from tokenmill.engine.limits import SchedulerLimits

_PATIENCE = 1000
"""Good steps after which a budget that memory has halved is doubled again: to try costs a preemption of everybody."""


@dataclass(slots=True)
class Room:
    """What is left of the step being planned. Made by `of`."""

    tokens: int
    cost: int | None  # of prompts, in 1 / (2 · weight) tokens, or tokens if there is no weight; None: no bound
    least: int  # tokens that the first prompt gets whatever they cost, so that it comes to an end
    weight: int

    @classmethod
    def of(cls, limits: SchedulerLimits, max_tokens: int, decoding: int, waiting: int) -> Room:
        """A whole step's of so many tokens at most, in which so many sequences decode while so many wait for their
        first token. In a burst prompts get more room, by its square over those that decode: it is over sooner for all.
        """
        beside, weight = limits.prefill_beside, limits.context_weight
        if not beside or not decoding:
            return cls(max_tokens, None, 0, weight)
        least = max(limits.min_chunk, min(limits.block_size, beside))
        cost = beside * max(1, waiting * waiting // decoding) + decoding
        return cls(max_tokens, cost * (2 * weight or 1), least, weight)

    def fit(self, start: int, wanted: int) -> int:
        """How many of a prompt's `wanted` tokens from position `start` on may be computed. Takes nothing."""
        count = min(wanted, self.tokens)
        return count if self.cost is None else min(count, max(self.least, self._affordable(start, self.cost)))

    def take(self, start: int, count: int, wanted: int) -> None:
        """Use room for `count` of the `wanted` tokens. If that is not all of them, nobody else gets any."""
        self.tokens = self.tokens - count if count == wanted else 0
        self.least = 0
        if self.cost is not None:
            self.cost = max(0, self.cost - self._cost(start, count))

    def _cost(self, start: int, count: int) -> int:
        """Of tokens at `start`, `start` + 1, …: one and position / weight each."""
        return count * (2 * (self.weight + start) + count - 1) if self.weight else count

    def _affordable(self, start: int, cost: int) -> int:
        """The largest count whose `_cost` is at most `cost`: the root of a quadratic equation."""
        if not self.weight:
            return cost
        linear = 2 * (self.weight + start) - 1
        return (isqrt(linear * linear + 4 * cost) - linear) // 2


class StepBudget:
    """How many tokens a step may have by what memory allows: at first as many as the limits say.

    A step that found no memory halves it; many good ones give it back.
    """

    def __init__(self, limit: int) -> None:
        self._limit = self.max_tokens = limit
        self._num_good = 0

    def shrink(self, tokens: int) -> None:
        """A step of so many, two at least, found no memory."""
        self.max_tokens = tokens // 2
        self._num_good = 0

    def restore(self) -> None:
        """The limit holds again."""
        self.max_tokens = self._limit

    def passed(self) -> None:
        """A step ran."""
        if self.max_tokens == self._limit:
            return
        self._num_good += 1
        if self._num_good == _PATIENCE:
            self.max_tokens = min(2 * self.max_tokens, self._limit)
            self._num_good = 0
