"""Ranks plan the same steps from the same messages; a rank that does not is found at the next step."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.engine import Engine
from tokenmill.engine.limits import SchedulerLimits
from tokenmill.engine.ranks import Broadcast, Follower, FollowerFrame, RanksDiverged, RankServer
from tokenmill.engine.scheduler import Scheduler
from tokenmill.runtime.mock import MockExecutor, MockStep
from tokenmill.wire.messages import Abort, Output, Request, SamplingParams, Stats, StoppingParams, ToScheduler

SCRIPT = tuple(range(50, 70))


class Script:
    """Link of rank 0 whose messages are given, step by step. Records the outputs."""

    def __init__(self, steps: Sequence[Sequence[ToScheduler]]) -> None:
        self._steps = iter(steps)
        self.outputs: list[Output] = []
        self.preemptions = 0

    def receive(self, block: bool, plan: bytes = b"") -> Sequence[ToScheduler]:
        return next(self._steps, ())

    def send(self, outputs: list[Output], stats: Stats) -> None:
        self.outputs += outputs
        self.preemptions = stats.preemptions


def history(seed: int) -> list[list[ToScheduler]]:
    """Return messages of 120 steps: requests that share prefixes, and aborts."""
    rng = random.Random(seed)
    steps: list[list[ToScheduler]] = []
    for number in range(1, 121):
        messages: list[ToScheduler] = []
        if number < 60 and rng.random() < 0.5:
            prompt = tuple(range(rng.randint(1, 20))) + tuple(rng.randint(0, 40) for _ in range(rng.randint(1, 20)))
            messages.append(Request(number, prompt, SamplingParams(), StoppingParams(rng.randint(1, 30))))
        if rng.random() < 0.1:
            messages.append(Abort(rng.randint(1, number)))
        steps.append(messages)
    return steps


def engine_of(link: Broadcast | Follower, stride: int = 1) -> Engine[MockStep]:
    limits = SchedulerLimits(24, 6, 64, 4, stride=stride)
    return Engine(Scheduler(BlockPool(30, 4), limits), MockExecutor(SCRIPT), link, compare_plans=True)


@contextmanager
def ranks(script: Script, run_dir: Path, size: int, stride: int = 1) -> Iterator[list[Engine[MockStep]]]:
    """Connect the engines of `size` ranks in this thread: each step of rank 0 comes before those of the others."""
    server = RankServer(str(run_dir / "ranks.sock"), size)
    followers = [Follower(str(run_dir / "ranks.sock"), rank) for rank in range(1, size)]
    try:
        server.wait(5.0)
        yield [engine_of(Broadcast(script, server), stride), *(engine_of(follower, stride) for follower in followers)]
    finally:
        for follower in followers:
            follower.close()
        server.close()


@pytest.mark.parametrize("stride", [1, 3])
def test_every_rank_plans_the_steps_of_rank_0_through_preemptions_and_aborts(stride: int, run_dir: Path) -> None:
    for seed in range(3):
        script = Script(history(seed))
        with ranks(script, run_dir, 3, stride) as engines:
            for _ in range(300 * stride):
                for engine in engines:
                    engine.step()  # a follower raises RanksDiverged
            assert all(engine.idle for engine in engines)
            stats = [engine.scheduler.stats(None, 0.0) for engine in engines]
            assert stats[0] == stats[1] == stats[2]
            assert script.preemptions > 0
            assert any(output.finish_reason == "length" for output in script.outputs)


class Recorder:
    """Link around `inner` that records what rank 0 sends to the others."""

    def __init__(self, inner: Script) -> None:
        self._inner, self.frames = inner, list[FollowerFrame]()

    def receive(self, block: bool, plan: bytes = b"") -> Sequence[ToScheduler]:
        messages = self._inner.receive(block, plan)
        self.frames.append(FollowerFrame(tuple(messages), plan))
        return messages

    def send(self, outputs: list[Output], stats: Stats) -> None:
        self._inner.send(outputs, stats)


def replay(frames: Sequence[FollowerFrame], run_dir: Path) -> None:
    """Run a follower, newly made, on recorded frames. Raise RanksDiverged if it plans another step."""
    server = RankServer(str(run_dir / "replay.sock"), 2)
    follower = Follower(str(run_dir / "replay.sock"), 1)
    try:
        server.wait(5.0)
        engine = engine_of(follower)
        for frame in frames:
            server.broadcast(frame)
            engine.step()
    finally:
        follower.close()
        server.close()


def test_a_recorded_history_is_planned_again_and_a_changed_one_is_not(run_dir: Path) -> None:
    recorder = Recorder(Script(history(7)))
    engine = engine_of(recorder)  # type: ignore[arg-type]
    for _ in range(200):
        engine.step()
    replay(recorder.frames, run_dir)
    changed = list(recorder.frames)
    at = next(i for i, frame in enumerate(changed) if frame.messages)
    changed[at] = FollowerFrame((), changed[at].plan)  # a lost message
    with pytest.raises(RanksDiverged, match="rank 1 planned another step than rank 0"):
        replay(changed, run_dir)
