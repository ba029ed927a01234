"""Background work for idle periods of the engine.

Idle time is measured at the link, so the engine's loop has no code for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tokenmill.engine.engine import Link
from tokenmill.wire.messages import Output, Stats, ToScheduler

QUIET_S = 3.0
"""Idle seconds before the work starts. A client that waited for the start sends its request in this time."""


class IdleLink:
    """Link around `link` that calls `idle_work` between two waits, once the engine was idle for `after_s` seconds.

    `idle_work`: starts the next unit of the work and returns at once; also called when no work is left.
    """

    def __init__(
        self,
        link: Link,
        idle_work: Callable[[], object],
        after_s: float = QUIET_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link, self._idle_work, self._after_s, self._clock = link, idle_work, after_s, clock
        self._last_busy = clock()  # last time at which the engine had work

    def receive(self, block: bool, plan: bytes = b"") -> Sequence[ToScheduler]:
        """See `engine.Link`. The engine is idle if it asks for a blocking call."""
        messages = self._link.receive(block, plan)
        if messages or not block:
            self._last_busy = self._clock()
        elif self._clock() - self._last_busy >= self._after_s:
            self._idle_work()
        return messages

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """See `engine.Link`."""
        self._link.send(outputs, stats)
