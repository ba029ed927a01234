"""Permits: the bound on the sequences that a worker generates at the same time."""

from __future__ import annotations

from tokenmill.errors import Overloaded
from tokenmill.server.metrics import Metrics


class Permits:
    """Permits of one worker, one for each sequence. For the event loop only."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self.in_flight = 0
        self._limit, self._metrics = limit, metrics

    def take(self, count: int) -> None:
        """Take `count` permits without waiting. Raises Overloaded if fewer are left."""
        if self.in_flight + count > self._limit:
            raise Overloaded
        self._set(self.in_flight + count)

    def release(self, count: int) -> None:
        """Give `count` permits back."""
        self._set(self.in_flight - count)

    def _set(self, in_flight: int) -> None:
        self.in_flight = in_flight
        self._metrics.set("tokenmill_requests_in_flight", in_flight)
