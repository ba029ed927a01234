"""Work that nobody waits for, done while an engine has nothing else to do.

Measured around the engine, at the link, so that the loop does not know of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tokenmill.engine.engine import Link
from tokenmill.wire.messages import Output, Stats, ToScheduler

QUIET_S = 3.0
"""How long nothing was asked for when the first piece is begun: who has just waited for a server asks it at once."""


class IdleLink:
    """The link of rank 0, which calls `piece` between two waits for messages once nothing came for `after_s` seconds.

    `piece` begins the next piece of the work and returns at once; also called when nothing is left.
    """

    def __init__(
        self,
        link: Link,
        piece: Callable[[], object],
        after_s: float = QUIET_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link, self._piece, self._after_s, self._clock = link, piece, after_s, clock
        self._busy = clock()  # when there last was something to do

    def receive(self, block: bool, plan: bytes = b"") -> Sequence[ToScheduler]:
        """See `engine.Link`. Only an engine without work lets it block."""
        messages = self._link.receive(block, plan)
        if messages or not block:
            self._busy = self._clock()
        elif self._clock() - self._busy >= self._after_s:
            self._piece()
        return messages

    def send(self, outputs: list[Output], stats: Stats) -> None:
        """See `engine.Link`."""
        self._link.send(outputs, stats)
