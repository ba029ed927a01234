"""Token budgets: the prompts' part of one step, and the size of a step after the device ran out of memory.

All arithmetic is on integers, so every rank gets the same result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isqrt

from tokenmill.engine.limits import SchedulerLimits

_RECOVERY_STEPS = 1000
"""Successful steps after which a halved step budget is doubled. An attempt that fails preempts all sequences."""


@dataclass(slots=True)
class PrefillBudget:
    """Remaining prefill budget of the step being planned. Create it with `of`.

    Unit of `cost` and `chunk`: 1 / (2 · weight) of a token at position 0; a token if `weight` is 0.
    """

    tokens: int
    cost: int
    chunk: int  # maximum cost of a chunk that does not finish its prompt; 0: no maximum
    guaranteed: int  # tokens that the next prompt gets whatever they cost, so that every prompt progresses
    weight: int
    reserved: tuple[int, int, int] = (0, 0, 0)  # `tokens`, `cost` and `guaranteed` set aside by `reserve`

    @classmethod
    def of(cls, limits: SchedulerLimits, max_tokens: int, decoding: int, waiting: int) -> PrefillBudget:
        """Return the prefill budget of a step of at most `max_tokens` tokens.

        `decoding`: sequences that decode in the step. `waiting`: sequences that wait for their first token. A burst of
        n waiting sequences multiplies the budget by n² / `decoding`, if that is more than 1: it delays the decoding
        sequences more per step, but for fewer steps.
        """
        prefill_beside, weight = limits.prefill_beside, limits.context_weight
        unit = 2 * weight or 1
        guaranteed, cost = limits.min_chunk, 2 * max_tokens
        if prefill_beside and decoding:
            guaranteed = max(guaranteed, min(limits.block_size, prefill_beside))
            cost = prefill_beside * max(1, waiting * waiting // decoding) + decoding
        chunk = limits.max_chunk and max(limits.max_chunk, limits.min_chunk)
        return cls(max_tokens, cost * unit, chunk * unit, guaranteed, weight)

    def fit(self, start: int, wanted: int, begun: bool = False) -> int:
        """Return how many of a prompt's `wanted` tokens from position `start` on fit. The budget does not change.

        `begun`: an earlier step computed a chunk of it; then `chunk` also limits its last chunk.
        """
        count = min(wanted, self.tokens, self._affordable(start, self.cost))
        if self.chunk and (begun or count < wanted):
            count = min(count, self._affordable(start, self.chunk))
        return min(wanted, self.tokens, max(self.guaranteed, count))

    def take(self, start: int, count: int) -> None:
        """Subtract `count` tokens from position `start` on."""
        self.tokens -= count
        self.cost = max(0, self.cost - self._cost(start, count))
        self.guaranteed = 0

    def reserve(self, start: int, wanted: int, begun: bool) -> None:
        """Reserve what a prompt needs, at most half of the budget, until `release`.

        If half of the budget does not finish it, the prompts before it get at most the cost of its chunk.
        """
        most = min(self.cost, 2 * self.chunk) if self.chunk else self.cost
        half = replace(self, tokens=self.tokens // 2, cost=most // 2)
        kept = min(wanted, self.tokens, max(self.guaranteed, half.fit(start, wanted, begun)))
        tokens = self.tokens - kept
        cost = max(0, self.cost - self._cost(start, kept)) if kept == wanted else half.cost
        self.reserved = self.tokens - tokens, self.cost - cost, self.guaranteed
        self.tokens, self.cost, self.guaranteed = tokens, cost, 0

    def release(self) -> None:
        """Put the reserved part back into the budget."""
        tokens, cost, self.guaranteed = self.reserved
        self.tokens, self.cost = self.tokens + tokens, self.cost + cost

    def _cost(self, start: int, count: int) -> int:
        """Return the cost of `count` tokens from `start` on: 1 + position / weight each, summed."""
        return count * (2 * (self.weight + start) + count - 1) if self.weight else count

    def _affordable(self, start: int, cost: int) -> int:
        """Return the largest count whose `_cost` is at most `cost`: the root of a quadratic equation."""
        if not self.weight:
            return cost
        linear = 2 * (self.weight + start) - 1
        return (isqrt(linear * linear + 4 * cost) - linear) // 2


class StepBudget:
    """Maximum number of tokens of a step, initially `limit`.

    A step that ran out of device memory halves it. After enough successful steps it is doubled again.
    """

    def __init__(self, limit: int) -> None:
        self._limit = self.max_tokens = limit
        self._num_successes = 0

    def shrink(self, tokens: int) -> None:
        """Allow half of `tokens`, the size (at least 2) of a step that ran out of memory."""
        self.max_tokens = tokens // 2
        self._num_successes = 0

    def restore(self) -> None:
        """Allow `limit` tokens again."""
        self.max_tokens = self._limit

    def record_success(self) -> None:
        """Count a step that has run."""
        if self.max_tokens == self._limit:
            return
        self._num_successes += 1
        if self._num_successes == _RECOVERY_STEPS:
            self.max_tokens = min(2 * self.max_tokens, self._limit)
            self._num_successes = 0
