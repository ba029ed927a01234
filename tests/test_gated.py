"""Requests wait for their prerequisites only; others pass."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pytest
from oracle import ListLink, request

from tokenmill.engine.border import Border
from tokenmill.engine.gated import Gated
from tokenmill.errors import RequestError
from tokenmill.wire.channel import Channel
from tokenmill.wire.messages import Abort, EngineInfo, FromEngine, Output, Request, Stats, StepOutputs, ToEngine

INFO = EngineInfo("model", "float32", "mock", "mock", 64, 4, 100, 99, 100, 64, 8)


class Thing(Future[str]):
    """A `Pending` that records its calls: `taken` and `given_up`."""

    taken = given_up = False

    def result(self, timeout: float | None = None) -> str:
        self.taken = True
        return super().result(0)  # the gate calls it when done: a wrong call fails instead of blocking

    def cancel(self) -> bool:
        self.given_up = True
        return super().cancel()


class Needed:
    """A `Prerequisite` of requests whose id contains the digit."""

    def __init__(self, name: str, digit: str) -> None:
        self.name, self.digit = name, digit
        self.things: dict[int, Thing] = {}
        self.error: Exception | None = None

    def begin(self, request: Request) -> Thing | None:
        if self.digit not in str(request.id):
            return None
        if self.error:
            raise self.error
        return self.things.setdefault(request.id, Thing())


class House:
    def __init__(self, *script: list[ToEngine]) -> None:
        self.link = ListLink(list(script))
        self.ones, self.twos = Needed("grammar", "1"), Needed("adapter", "2")
        self.gated = Gated(self.link, [self.ones, self.twos])

    def ids(self) -> list[int]:
        return [message.id for message in self.gated.receive(False)]

    def refused(self) -> list[Output]:
        self.link.outputs.clear()
        self.gated.send([], Stats())
        return [output for outputs in self.link.outputs.values() for output in outputs]


def asked(*ids: int) -> list[ToEngine]:
    return [request(i, [1, 2]) for i in ids]


def test_a_request_waits_until_all_that_it_needs_is_there_and_the_others_pass() -> None:
    house = House(asked(3, 12, 1, 4))
    assert house.ids() == [3, 4]
    house.ones.things[12].set_result("")
    assert house.ids() == []
    assert house.link.wakes == 1
    house.ones.things[1].set_result("")
    house.twos.things[12].set_result("")
    assert house.gated.holds
    assert house.ids() == [12, 1], "in the order in which they came"
    assert not house.gated.holds
    assert house.ones.things[12].taken
    assert house.twos.things[12].taken
    assert not house.ones.things[12].given_up


def test_a_need_that_fails_ends_its_request_alone_and_the_other_needs_are_given_up() -> None:
    house = House(asked(12, 21, 1))
    house.ids()
    house.ones.things[12].set_result("")
    house.twos.things[12].set_exception(RequestError("there is no such adapter"))
    house.ones.things[21].set_exception(ZeroDivisionError())
    house.twos.things[21].set_result("")
    house.ones.things[1].set_result("")
    assert house.ids() == [1]
    assert house.refused() == [
        Output(12, finish_reason="error", message="there is no such adapter"),
        Output(21, finish_reason="error", message="the grammar that was asked for failed; the server's log says more"),
    ]
    assert house.refused() == [], "once"
    assert house.ones.things[12].given_up
    assert house.twos.things[21].given_up


def test_a_need_that_cannot_be_begun_ends_its_request_and_gives_up_what_was_begun() -> None:
    house = House(asked(12, 1))
    house.twos.error = RequestError("adapters are off")
    assert house.ids() == []
    assert house.refused() == [Output(12, finish_reason="error", message="adapters are off")]
    assert house.ones.things[12].given_up
    house.ones.things[1].set_result("")
    assert house.ids() == [1]


def test_an_abort_passes_and_what_its_request_waited_for_is_given_up() -> None:
    house = House(asked(12, 1), [Abort(12), Abort(99)])
    house.ids()
    assert house.ids() == [12, 99]
    assert house.ones.things[12].given_up
    assert house.twos.things[12].given_up
    house.ones.things[1].set_result("")
    assert house.ids() == [1]
    assert house.refused() == []


def test_what_is_there_at_once_holds_up_nothing() -> None:
    house = House(asked(1))
    house.ones.things[1] = Thing()
    house.ones.things[1].set_result("")
    assert house.ids() == [1]


def test_the_end_gives_up_all_that_is_waited_for() -> None:
    house = House(asked(1, 2))
    house.ids()
    house.gated.close()
    house.gated.close()
    assert house.ones.things[1].given_up
    assert house.twos.things[2].given_up
    assert not house.gated.holds


@pytest.mark.parametrize("fails", [False, True])
def test_a_request_that_need_not_wait_any_longer_wakes_an_idle_engine(run_dir: Path, fails: bool) -> None:
    border = Border(str(run_dir / "engine.sock"), INFO, heartbeat_s=30.0)
    needed = Needed("grammar", "1")
    gated = Gated(border, [needed])
    worker: Channel[FromEngine] = Channel.connect(str(run_dir / "engine.sock"), FromEngine)
    worker.set_timeout(10)
    assert gated.receive(False) == []
    assert worker.receive() == INFO
    worker.send(asked(1))
    assert gated.receive(False) == []
    thing = needed.things[1]
    finish = partial(thing.set_exception, RequestError("none")) if fails else partial(thing.set_result, "")
    opener = threading.Timer(0.1, finish)
    opener.start()
    began = time.monotonic()
    assert gated.receive(True) == ([] if fails else asked(1))
    assert time.monotonic() - began < 5
    gated.send([] if fails else [Output(1, (9,), "stop")], Stats())
    frame = worker.receive()
    assert isinstance(frame, StepOutputs)
    assert [output.finish_reason for output in frame.outputs] == ["error" if fails else "stop"]
    opener.join()
    worker.close()
    border.close()
