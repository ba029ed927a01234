"""Steps and their limits, in a rank's heartbeat."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tokenmill.engine import watched
from tokenmill.engine.watched import LEAST_S, Usual, Watched
from tokenmill.errors import OutOfMemory
from tokenmill.heartbeat import STARTING, Heartbeat


@dataclass
class Device:
    """An executor whose steps take `seconds` of the `clock`."""

    clock: list[float]
    seconds: float = 1.0
    fails: str = ""

    def launch(self, batch: Any) -> object:
        return self._or_fail("launch", object())

    def complete(self, step: object) -> None:
        self._or_fail("complete", None)

    def collect(self, step: object) -> str:
        self.clock[0] += self.seconds
        return self._or_fail("collect", "result")

    def idle_work(self) -> bool:
        return True

    def _or_fail(self, name: str, result: Any) -> Any:
        if self.fails == name:
            raise OutOfMemory("full")
        return result


def batch(number: int, tokens: int = 1, start: int = 0) -> Any:
    return SimpleNamespace(number=number, sequences=[0], num_tokens=tokens, starts=np.array([start], np.int32),
                           counts=np.array([tokens], np.int32))  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(watched, "monotonic", lambda: now[0])
    return now


def test_a_step_is_noted_before_it_may_take_long_and_when_it_has_ended(tmp_path: Path, clock: list[float]) -> None:
    heartbeat = Heartbeat(str(tmp_path / "beat"))
    executor: Watched[Any] = Watched(Device(clock), heartbeat)
    seen = Heartbeat(str(tmp_path / "beat"))
    assert seen.read() == (0, 0.0, STARTING)
    assert not executor.busy
    step = executor.launch(batch(7, 40))
    assert executor.busy
    assert seen.read() == (1, 600.0, "step 7 (1 rows, 40 tokens)")
    assert executor.collect(step) == "result"
    assert seen.read() == (3, LEAST_S, "the end of step 7 (1 rows, 40 tokens)")


def test_the_step_that_is_waited_for_is_noted_and_the_later_ones_may_take_their_time(
    tmp_path: Path, clock: list[float]
) -> None:
    heartbeat = Heartbeat(str(tmp_path / "beat"))
    executor: Watched[Any] = Watched(Device(clock, 2.0), heartbeat)
    executor.collect(executor.launch(batch(1)))
    first, _ = executor.launch(batch(2)), executor.launch(batch(3, 4))
    assert heartbeat.read()[1:] == (60.0, "step 3 (1 rows, 4 tokens)")
    executor.collect(first)
    assert heartbeat.read()[1:] == (60.0, "step 3 (1 rows, 4 tokens)")
    executor.note()
    assert heartbeat.read().limit_s == 60.0


@pytest.mark.parametrize("where", ["launch", "complete", "collect"])
def test_a_step_that_finds_no_memory_is_forgotten(where: str, tmp_path: Path, clock: list[float]) -> None:
    heartbeat, device = Heartbeat(str(tmp_path / "beat")), Device(clock)
    executor: Watched[Any] = Watched(device, heartbeat)
    device.fails = where

    def run() -> None:
        step = executor.launch(batch(1))
        executor.complete(step)
        executor.collect(step)

    with pytest.raises(OutOfMemory):
        run()
    executor.note()
    assert heartbeat.read().limit_s == LEAST_S


def test_a_step_may_take_five_times_as_long_as_those_of_its_size() -> None:
    usual = Usual()
    assert usual.limit_s(3) == 600.0  # nothing is known
    for _ in range(7):
        usual.record(3, 0.01)
        assert usual.limit_s(3) == 60.0  # too few to know
    usual.record(3, 0.01)
    assert usual.limit_s(3) == LEAST_S
    usual.record(3, 2.0)
    assert usual.limit_s(3) == 10.0
    for _ in range(1000):
        usual.record(3, 0.01)
    assert usual.limit_s(3) == LEAST_S  # one slow step does not count for ever


def test_the_first_step_of_a_size_may_take_as_long_as_its_work_and_a_minute_at_least() -> None:
    usual = Usual()
    usual.record(3, 4.0)
    assert usual.limit_s(5) == 5 * 4.0 * 4
    assert usual.limit_s(1) == 60.0
    usual.record(0, 0.1)
    assert usual.limit_s(1) == 60.0


def test_a_rank_that_no_other_waits_for_has_more_time(tmp_path: Path, clock: list[float]) -> None:
    usual = Usual(10.0)
    for _ in range(8):
        usual.record(1, 0.5)
    assert usual.limit_s(1) == 10.0
    heartbeat = Heartbeat(str(tmp_path / "beat"))
    Watched(Device(clock), heartbeat, least_s=10.0).note()
    assert heartbeat.read().limit_s == 10.0


def test_attention_to_a_long_context_is_work(tmp_path: Path, clock: list[float]) -> None:
    heartbeat = Heartbeat(str(tmp_path / "beat"))
    executor: Watched[Any] = Watched(Device(clock, 4.0), heartbeat, context_weight=100)
    executor.collect(executor.launch(batch(1)))
    executor.launch(batch(2, start=100))
    assert heartbeat.read().limit_s == 60.0  # another size: not 20 s
    executor.launch(batch(3, 100_000, 1 << 20))  # no overflow
    assert heartbeat.read().limit_s > 1e9


def test_work_while_idle_may_take_a_minute(tmp_path: Path, clock: list[float]) -> None:
    heartbeat = Heartbeat(str(tmp_path / "beat"))
    assert Watched(Device(clock), heartbeat).idle_work()
    assert heartbeat.read() == (1, 60.0, "its work while idle")
