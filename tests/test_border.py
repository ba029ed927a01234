"""Sockets around the engine: HTTP workers that come, go, send invalid frames or do not read; follower ranks."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tokenmill.backends.base import StepResult
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.border import Border
from tokenmill.engine.engine import Engine, Link
from tokenmill.engine.ranks import Broadcast, Follower, RanksDiverged, RankServer
from tokenmill.engine.scheduler import Scheduler, SchedulerLimits
from tokenmill.parallel.group import RanksMissing
from tokenmill.runtime.mock import MockExecutor, MockStep
from tokenmill.wire.channel import Channel, connect
from tokenmill.wire.messages import (
    Abort,
    EngineInfo,
    FromEngine,
    Output,
    Request,
    SamplingParams,
    Stats,
    StepOutputs,
    StoppingParams,
)

INFO = EngineInfo("model", "float32", "mock", "mock", 64, 4, 100, 99, 100, 64, 8)
LIMITS = SchedulerLimits(64, 8, 1000, block_size=4)


def request(request_id: int, max_new_tokens: int = 3) -> Request:
    return Request(request_id, (1, 2, 3), SamplingParams(), StoppingParams(max_new_tokens))


def engine_on(link: Link, num_blocks: int = 64, compare_plans: bool = False) -> Engine[MockStep]:
    scheduler = Scheduler(BlockPool(num_blocks, LIMITS.block_size), LIMITS)
    return Engine(scheduler, MockExecutor((5, 6, 7)), link, compare_plans=compare_plans)


class House:
    """A border, and connections of HTTP workers to it."""

    def __init__(self, run_dir: Path) -> None:
        self.address = str(run_dir / "engine.sock")
        self.border = Border(self.address, INFO, heartbeat_s=0.2, max_unread_bytes=1 << 16)
        self.channels: list[Channel[FromEngine]] = []

    def worker(self) -> Channel[FromEngine]:
        channel: Channel[FromEngine] = Channel.connect(self.address, FromEngine)
        channel.set_timeout(10)
        self.channels.append(channel)
        self.border.receive(False)  # accepts the connection
        assert channel.receive() == INFO
        return channel

    def close(self) -> None:
        self.border.close()
        for channel in self.channels:
            channel.close()


@pytest.fixture
def house(run_dir: Path) -> Iterator[House]:
    house = House(run_dir)
    yield house
    house.close()


def outputs_of(channel: Channel[FromEngine]) -> tuple[Output, ...]:
    frame = channel.receive()
    assert isinstance(frame, StepOutputs)
    return frame.outputs


def test_requests_arrive_in_order_and_each_worker_gets_only_its_own_outputs(house: House) -> None:
    a, b = house.worker(), house.worker()
    a.send([request(1), request(3), Abort(3)])
    b.send([request(2)])
    messages = house.border.receive(True) + house.border.receive(False)
    assert [m.id for m in messages if m.id != 2] == [1, 3, 3]
    assert isinstance(messages[-1 if messages[-1].id == 3 else -2], Abort)
    house.border.send([Output(2, (9,)), Output(1, (8,)), Output(77, (7,)), Output(3, (6,))], Stats(steps=1))
    assert outputs_of(a) == (Output(1, (8,)),)
    assert outputs_of(b) == (Output(2, (9,)),)


def test_an_abort_of_another_workers_request_is_ignored(house: House) -> None:
    a, b = house.worker(), house.worker()
    a.send([request(1)])
    assert house.border.receive(True) == [request(1)]
    b.send([Abort(1), Abort(99)])
    assert house.border.receive(True) == []
    b.send([request(2)])
    assert house.border.receive(True) == [request(2)]


def test_a_worker_that_goes_away_has_its_requests_aborted(house: House) -> None:
    a, b = house.worker(), house.worker()
    a.send([request(1), request(4), request(2)])
    house.border.receive(True)
    b.send([request(3)])
    house.border.receive(True)
    house.border.send([Output(4, (1,), "stop")], Stats())
    a.close()
    assert house.border.receive(True) == [Abort(1), Abort(2)]
    house.border.send([Output(3, (9,)), Output(1, (9,))], Stats())
    assert outputs_of(b) == (Output(3, (9,)),)


@pytest.mark.parametrize(
    "nonsense",
    [b"\x03\0\0\0abc", b"\xff\xff\xff\xff", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\0"],
)
def test_nonsense_closes_that_connection_only(house: House, nonsense: bytes) -> None:
    good, bad = house.worker(), house.worker()
    bad.send([request(1)])
    assert house.border.receive(True) == [request(1)]
    bad.send_bytes(nonsense)
    assert house.border.receive(True) == [Abort(1)]
    assert bad.receive() is None
    good.send([request(2)])
    assert house.border.receive(True) == [request(2)]


def test_an_id_that_is_in_use_closes_the_connection_that_sent_it_again(house: House) -> None:
    a, b = house.worker(), house.worker()
    a.send([request(1)])
    house.border.receive(True)
    b.send([request(2), request(1)])
    assert house.border.receive(True) == [request(2), Abort(2)]
    assert b.receive() is None
    house.border.send([Output(1, (5,))], Stats())
    assert outputs_of(a) == (Output(1, (5,)),)


def test_a_worker_that_does_not_read_is_cut_off_and_never_blocks_the_engine(house: House) -> None:
    reading, stuck = house.worker(), house.worker()
    stuck.send([request(1)])
    house.border.receive(True)
    began = time.monotonic()
    messages: list[object] = []
    for _ in range(100_000):
        house.border.send([Output(1, tuple(range(1000)))], Stats())
        if messages := list(house.border.receive(False)):
            break
    assert messages == [Abort(1)]
    assert time.monotonic() - began < 20
    reading.send([request(2)])
    assert house.border.receive(True) == [request(2)]


def test_a_slow_worker_gets_everything_in_the_end(house: House) -> None:
    slow = house.worker()
    slow.send([request(1)])
    house.border.receive(True)
    house.border._max_unread_bytes = 1 << 30
    frames = [StepOutputs((Output(1, tuple(range(step, step + 1000))),), Stats(steps=step)) for step in range(1000)]
    for sent in frames:
        house.border.send(list(sent.outputs), sent.stats)
    received: list[object] = []
    reader = threading.Thread(target=lambda: received.extend(slow.receive() for _ in frames))
    reader.start()
    while reader.is_alive():
        house.border.receive(False)
        time.sleep(0.001)
    assert received == frames


def test_an_idle_engine_waits_and_tells_that_it_lives(house: House) -> None:
    worker = house.worker()
    began = time.monotonic()
    assert house.border.receive(True) == []
    assert 0.1 < time.monotonic() - began < 2
    house.border.send([], Stats(steps=5))
    assert worker.receive() == StepOutputs((), Stats(steps=5))
    house.border.send([], Stats(steps=6))
    worker.send([request(1)])
    house.border.receive(True)
    house.border.send([Output(1)], Stats(steps=7))
    assert outputs_of(worker) == (Output(1),), "no second heartbeat so soon"


def test_a_wait_ends_when_the_watched_descriptor_becomes_readable(run_dir: Path) -> None:
    read_end, write_end = os.pipe()
    border = Border(str(run_dir / "e"), INFO, watch=read_end, heartbeat_s=30)
    threading.Timer(0.05, os.close, (write_end,)).start()
    began = time.monotonic()
    assert border.receive(True) == []
    assert time.monotonic() - began < 10
    border.close()
    os.close(read_end)


def test_a_connection_that_is_gone_before_it_is_accepted_does_no_harm(house: House) -> None:
    connect(house.address).close()
    house.border.receive(False)
    house.border.receive(False)
    worker = house.worker()
    worker.send([request(1)])
    assert house.border.receive(True) == [request(1)]


def test_an_engine_answers_over_the_socket(house: House) -> None:
    engine = engine_on(house.border)
    worker = house.worker()
    worker.send([request(1), request(2, 2)])
    for _ in range(6):
        engine.step()
    tokens: dict[int, list[int]] = {1: [], 2: []}
    finished: dict[int, str] = {}
    while len(finished) < 2:
        for output in outputs_of(worker):
            tokens[output.request_id] += output.token_ids
            if output.finish_reason:
                finished[output.request_id] = output.finish_reason
    assert tokens == {1: [5, 6, 7], 2: [5, 6]}


def test_a_workers_death_frees_the_blocks_within_a_step(house: House) -> None:
    engine = engine_on(house.border)
    worker = house.worker()
    worker.send([request(1, 200)])
    for _ in range(5):
        engine.step()
    assert engine.scheduler.running
    worker.close()
    engine.step()
    assert not engine.scheduler.has_work
    assert not any(engine.scheduler.pool.refs)


# ---- ranks


class Ranks:
    """Rank 0, driven by the test, and followers, each an engine in a thread of its own."""

    def __init__(self, run_dir: Path, size: int, blocks: Callable[[int], int] = lambda rank: 12) -> None:
        self.errors: dict[int, Exception] = {}
        self.engines: dict[int, Engine[MockStep]] = {}
        self.plans: dict[int, list[list[tuple[int, int, int]]]] = {}
        address = str(run_dir / "ranks.sock")
        self.threads = [threading.Thread(target=self.follow, args=(address, r, blocks(r))) for r in range(1, size)]
        for thread in self.threads:
            thread.start()
        server = RankServer(address, size)
        server.wait(10)
        self.server, self.border = server, Border(str(run_dir / "engine.sock"), INFO, heartbeat_s=0.05)
        self.engine = self.record(0, engine_on(Broadcast(self.border, server), blocks(0), compare_plans=True))

    def record(self, rank: int, engine: Engine[MockStep]) -> Engine[MockStep]:
        plans = self.plans[rank] = []
        launch = engine.executor.launch

        def recorded(batch):  # type: ignore[no-untyped-def]
            plans.append(list(zip(batch.slots.tolist(), batch.starts.tolist(), batch.counts.tolist(), strict=True)))
            return launch(batch)

        engine.executor.launch = recorded  # type: ignore[method-assign]
        self.engines[rank] = engine
        return engine

    def follow(self, address: str, rank: int, num_blocks: int) -> None:
        follower = Follower(address, rank, timeout_s=10)
        engine = self.record(rank, engine_on(follower, num_blocks, compare_plans=True))
        try:
            while True:
                engine.step()
        except (ConnectionError, RanksDiverged) as error:
            self.errors[rank] = error
        finally:
            follower.close()

    def close(self) -> None:
        self.border.close()
        self.server.close()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()


def test_a_wait_is_ended_by_a_wake_of_another_thread_and_by_one_that_came_before_it(house: House) -> None:
    house.border._heartbeat_s = 5.0
    began = time.monotonic()
    waker = threading.Timer(0.05, house.border.wake)
    waker.start()
    assert house.border.receive(True) == []
    house.border.wake()
    assert house.border.receive(True) == []
    house.border._heartbeat_s = 0.05
    assert time.monotonic() - began < 4
    house.border.receive(True)
    assert not house.border._woken, "a wake ends one wait"
    waker.join()


def test_a_wake_after_the_end_writes_to_no_descriptor(run_dir: Path) -> None:
    border = Border(str(run_dir / "e"), INFO)
    ends = border._waker._read, border._waker._write
    border.close()
    others = os.pipe()
    assert set(others) & set(ends), "the numbers are in use again"
    border.wake()
    border.close()
    os.set_blocking(others[0], False)
    with pytest.raises(BlockingIOError):
        os.read(others[0], 1)
    os.close(others[0])
    os.close(others[1])


def test_all_ranks_plan_the_same_steps(run_dir: Path) -> None:
    ranks = Ranks(run_dir, 3)
    worker: Channel[FromEngine] = Channel.connect(str(run_dir / "engine.sock"), FromEngine)
    worker.send([request(i, 10 + i) for i in range(7)])
    for number in range(80):
        ranks.engine.step()
        if number == 9:
            worker.send([Abort(3), request(8, 4)])
    assert ranks.engine.idle
    assert ranks.engine.scheduler.counts.preemptions
    worker.close()
    ranks.close()
    assert ranks.plans[0] == ranks.plans[1] == ranks.plans[2]
    assert all(isinstance(error, ConnectionError) for error in ranks.errors.values()), "they end with rank 0"
    assert len(ranks.errors) == 2


def turn(engine: Engine[MockStep], times: int) -> None:
    for _ in range(times):
        engine.step()
        time.sleep(0.002)


def test_ranks_that_plan_differently_are_found_out(run_dir: Path) -> None:
    ranks = Ranks(run_dir, 2, blocks=lambda rank: 12 if rank == 0 else 11)
    worker: Channel[FromEngine] = Channel.connect(str(run_dir / "engine.sock"), FromEngine)
    worker.send([request(i, 20) for i in range(7)])
    with pytest.raises(OSError):  # the follower that detected it is gone
        turn(ranks.engine, 200)
    assert isinstance(ranks.errors[1], RanksDiverged)
    worker.close()
    ranks.close()


def test_a_rank_that_does_not_come_is_named(run_dir: Path) -> None:
    server = RankServer(str(run_dir / "ranks.sock"), 3)
    follower = Follower(str(run_dir / "ranks.sock"), 2)
    with pytest.raises(RanksMissing, match=r"Rank 1 did not join the engine within 0.1 s.* --rank-timeout"):
        server.wait(0.1)
    follower.close()
    server.close()


def test_a_follower_waits_for_rank_0_to_listen(run_dir: Path) -> None:
    with pytest.raises(OSError):
        Follower(str(run_dir / "ranks.sock"), 1, timeout_s=0.05)


def test_a_step_result_of_a_backend_is_one_for_the_engine() -> None:
    scheduler = Scheduler(BlockPool(8, 4), LIMITS)
    scheduler.add(request(0, 2))
    batch = scheduler.schedule()
    assert batch is not None
    assert scheduler.update(batch, StepResult([4])) == [Output(0, (4,))]


def test_the_socket_is_private(house: House) -> None:
    assert os.stat(house.address).st_mode & 0o077 == 0
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(house.address)
