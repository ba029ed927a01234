"""Budgets of a step in tokens: by the limits, beside sequences that decode, and by what memory has shown to allow.

Pure integers: every rank counts the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isqrt

from tokenmill.engine.limits import SchedulerLimits

_PATIENCE = 1000
"""Good steps after which a budget that memory has halved is doubled again: to try costs a preemption of everybody."""


@dataclass(slots=True)
class PrefillBudget:
    """The part of the step being planned that prompts may still take. Made by `of`.

    `cost` and `chunk` count 1 / (2 · weight) tokens, or tokens if there is no weight.
    """

    tokens: int
    cost: int
    chunk: int  # cost of a piece of a prompt that the step does not finish, at most; 0: no bound
    least: int  # tokens that the next prompt gets whatever they cost, so that it comes to an end
    weight: int
    held: tuple[int, int, int] = (0, 0, 0)  # tokens, cost and least, put aside by `hold`

    @classmethod
    def of(cls, limits: SchedulerLimits, max_tokens: int, decoding: int, waiting: int) -> PrefillBudget:
        """A step's of so many tokens at most, in which so many sequences decode while so many wait for their first
        token. In a burst prompts get more, by its square over those that decode: it is over sooner for all.
        """
        beside, weight = limits.prefill_beside, limits.context_weight
        unit = 2 * weight or 1
        least, cost = limits.min_chunk, 2 * max_tokens
        if beside and decoding:
            least = max(least, min(limits.block_size, beside))
            cost = beside * max(1, waiting * waiting // decoding) + decoding
        chunk = limits.max_chunk and max(limits.max_chunk, limits.min_chunk)
        return cls(max_tokens, cost * unit, chunk * unit, least, weight)

    def fit(self, start: int, wanted: int, begun: bool = False) -> int:
        """Return how many of a prompt's `wanted` tokens from position `start` on may be computed. Takes nothing.

        `begun`: it was cut in an earlier step, so it is a long one to the end.
        """
        count = min(wanted, self.tokens, self._affordable(start, self.cost))
        if self.chunk and (begun or count < wanted):
            count = min(count, self._affordable(start, self.chunk))
        return min(wanted, self.tokens, max(self.least, count))

    def take(self, start: int, count: int) -> None:
        """Use the budget for `count` tokens from position `start` on."""
        self.tokens -= count
        self.cost = max(0, self.cost - self._cost(start, count))
        self.least = 0

    def hold(self, start: int, wanted: int, begun: bool) -> None:
        """Put aside for a prompt what it needs, or half of the budget if that is less, until `release`.

        If a half does not finish it, those that go before it get no more than its piece costs.
        """
        most = min(self.cost, 2 * self.chunk) if self.chunk else self.cost
        half = replace(self, tokens=self.tokens // 2, cost=most // 2)
        kept = min(wanted, self.tokens, max(self.least, half.fit(start, wanted, begun)))
        tokens = self.tokens - kept
        cost = max(0, self.cost - self._cost(start, kept)) if kept == wanted else half.cost
        self.held = self.tokens - tokens, self.cost - cost, self.least
        self.tokens, self.cost, self.least = tokens, cost, 0

    def release(self) -> None:
        """Put back what was put aside."""
        tokens, cost, self.least = self.held
        self.tokens, self.cost = self.tokens + tokens, self.cost + cost

    def _cost(self, start: int, count: int) -> int:
        """The sum over tokens at `start`, `start` + 1, …: one and position / weight each."""
        return count * (2 * (self.weight + start) + count - 1) if self.weight else count

    def _affordable(self, start: int, cost: int) -> int:
        """The largest count whose `_cost` is at most `cost`: the root of a quadratic equation."""
        if not self.weight:
            return cost
        linear = 2 * (self.weight + start) - 1
        return (isqrt(linear * linear + 4 * cost) - linear) // 2


class StepBudget:
    """The number of tokens that memory allows a step: at first as many as the limits say.

    A step that found no memory halves it; many good ones give it back.
    """

    def __init__(self, limit: int) -> None:
        self._limit = self.max_tokens = limit
        self._num_good = 0

    def shrink(self, tokens: int) -> None:
        """Halve it: a step of so many tokens, two at least, found no memory."""
        self.max_tokens = tokens // 2
        self._num_good = 0

    def restore(self) -> None:
        """Go back to the limit."""
        self.max_tokens = self._limit

    def passed(self) -> None:
        """Count a step that ran."""
        if self.max_tokens == self._limit:
            return
        self._num_good += 1
        if self._num_good == _PATIENCE:
            self.max_tokens = min(2 * self.max_tokens, self._limit)
            self._num_good = 0
