"""Idle work is done in units once the engine has been idle for a while."""

from __future__ import annotations

from typing import Any

from tokenmill.engine.idle import IdleLink
from tokenmill.wire.messages import Abort, Stats


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Inner:
    """A link that receives only the messages in `coming`. A wait takes a second."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.coming, self.sent = clock, [], []  # type: ignore[var-annotated]

    def receive(self, block: bool, plan: bytes = b"") -> list[Any]:
        if self.coming:
            return [self.coming.pop()]
        self.clock.now += 1.0 if block else 0.01
        return []

    def send(self, outputs: list[Any], stats: Any) -> None:
        self.sent.append((outputs, stats))


def link_of(pieces: list[float]) -> tuple[IdleLink, Inner, Clock]:
    clock = Clock()
    inner = Inner(clock)
    return IdleLink(inner, lambda: pieces.append(clock.now), 3.0, clock), inner, clock


def test_a_piece_is_begun_at_each_wait_once_it_was_quiet_for_long_enough() -> None:
    pieces: list[float] = []
    link, _, _ = link_of(pieces)
    for _ in range(5):
        assert link.receive(True) == []
    assert pieces == [103.0, 104.0, 105.0]


def test_a_message_begins_the_quiet_anew() -> None:
    pieces: list[float] = []
    link, inner, _ = link_of(pieces)
    link.receive(True)
    link.receive(True)
    inner.coming.append(Abort(1))
    assert link.receive(True) == [Abort(1)]
    link.receive(True)
    link.receive(True)
    assert pieces == []
    link.receive(True)
    assert pieces == [105.0]


def test_an_engine_that_works_is_never_idle_however_seldom_something_comes() -> None:
    pieces: list[float] = []
    link, _, clock = link_of(pieces)
    for _ in range(1000):
        link.receive(False)
    assert clock.now > 109
    link.receive(True)
    assert pieces == []


def test_outputs_pass() -> None:
    link, inner, _ = link_of([])
    stats = Stats()
    link.send([], stats)
    assert inner.sent == [([], stats)]
