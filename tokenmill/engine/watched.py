"""Executor that notes its steps in a heartbeat, with the time that each may take."""

from __future__ import annotations

from collections import Counter
from time import monotonic
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from tokenmill.engine.engine import Executor
from tokenmill.engine.sequence import Batch, StepResult
from tokenmill.errors import OutOfMemory
from tokenmill.heartbeat import Heartbeat

StepT = TypeVar("StepT")

LEAST_S = 3.0
"""Least time without a finished step after which a rank is hung; also the limit between steps."""
ALONE_S = 10.0
"""The same of a rank that no other waits for."""

_TIMES = 5.0  # of the usual time of such a step
_UNSEEN_S = 60.0  # least limit of the first step of a size
_FIRST_S = 600.0  # least limit of the first step of all, whose time nothing is known about
_KNOWN = 8  # steps of a size after which their usual time is known
_FORGET = 0.995  # per step of a size, so that one slow step does not count for ever


class _Launched(NamedTuple):
    """A step on the device."""

    step: object
    place: str
    size: int
    limit_s: float
    launch_time: float


class Usual:
    """Usual duration of steps, by the class of their work: powers of two. `least_s`: least limit of a step."""

    def __init__(self, least_s: float = LEAST_S) -> None:
        self._least_s = least_s
        self._usual: dict[int, float] = {}
        self._steps: Counter[int] = Counter()

    def limit_s(self, size: int) -> float:
        """Return the seconds after which a step of this size is hung.

        A size that is not known takes as long as the next smaller one per work, or as the smallest one.
        """
        usual = self._usual
        if not usual:
            return _FIRST_S
        if self._steps[size] >= _KNOWN:
            return max(self._least_s, _TIMES * usual[size])
        smaller = [other for other in usual if other <= size]
        nearest = max(smaller) if smaller else min(usual)
        return max(_UNSEEN_S, _TIMES * usual[nearest] * 2.0 ** max(0, size - nearest))

    def record(self, size: int, seconds: float) -> None:
        """Record the duration of a step."""
        self._steps[size] += 1
        self._usual[size] = max(seconds, self._usual.get(size, 0.0) * _FORGET)


class Watched(Generic[StepT]):
    """Executor around `inner` whose every launch and result is noted in `heartbeat`.

    `context_weight`: position at which the attention of a token costs as much as its products; 0: attention is not
    counted as work. `least_s`: least limit of a step.
    """

    def __init__(
        self, inner: Executor[StepT], heartbeat: Heartbeat, context_weight: int = 0, least_s: float = LEAST_S
    ) -> None:
        self._inner, self._heartbeat, self._context_weight = inner, heartbeat, context_weight
        self._usual, self._least_s = Usual(least_s), least_s
        self._launched: list[_Launched] = []
        self._place = "the wait for a first step"
        self._limit_s = least_s  # of the steps on the device
        self._last_collected = 0.0

    @property
    def busy(self) -> bool:
        """True if a step is on the device."""
        return bool(self._launched)

    def note(self) -> None:
        """Note that the rank lives. Steps on the device may take their time, too."""
        self._heartbeat.note(self._place, self._limit_s)

    def launch(self, batch: Batch) -> StepT:
        """See `Executor`."""
        size = self._work(batch).bit_length()
        limit_s = self._usual.limit_s(size)
        place = self._place = f"step {batch.number} ({len(batch.sequences)} rows, {batch.num_tokens} tokens)"
        self._heartbeat.note(place, max(limit_s, self._limit_s))
        step = self._inner.launch(batch)
        self._launched.append(_Launched(step, place, size, limit_s, monotonic()))
        self._limit_s = max(limit_s, self._limit_s)
        return step

    def complete(self, step: StepT) -> None:
        """See `Executor`."""
        try:
            self._inner.complete(step)
        except OutOfMemory:  # the step is not collected
            self._forget(self._find(step))
            raise

    def collect(self, step: StepT) -> StepResult:
        """See `Executor`."""
        launched = self._find(step)
        self._place = launched.place
        self.note()
        try:
            result = self._inner.collect(step)
        finally:
            self._forget(launched)
        now = monotonic()
        self._usual.record(launched.size, now - max(launched.launch_time, self._last_collected))
        self._last_collected = now
        self._place = self._launched[-1].place if self._launched else f"the end of {launched.place}"
        self.note()
        return result

    def idle_work(self) -> bool:
        """See `Executor`."""
        self._heartbeat.note("its work while idle", _UNSEEN_S)
        return self._inner.idle_work()

    def _find(self, step: StepT) -> _Launched:
        [found] = [launched for launched in self._launched if launched.step is step]
        return found

    def _forget(self, launched: _Launched) -> None:
        self._launched.remove(launched)
        self._limit_s = max([self._least_s, *(other.limit_s for other in self._launched)])

    def _work(self, batch: Batch) -> int:
        """Return the work of a step, in tokens without a context."""
        if not self._context_weight:
            return batch.num_tokens
        pairs = int(np.add(batch.starts, batch.counts, dtype=np.int64).dot(batch.counts))
        return batch.num_tokens + pairs // self._context_weight
