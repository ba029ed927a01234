"""Simulate a cluster: throughput, time to first token, prefix hits, cost of routing, loss of a zone.

    python -m bench.cluster_sim                                  rows of 1 to 2,000 replicas
    python -m bench.cluster_sim --replicas 10000 --streams 1000000 --rate 8
    python -m bench.cluster_sim --replicas 200 --policy random   two-choices, random: placements to compare with
    python -m bench.cluster_sim --replicas 200 --lose-zone 10    a quarter of the replicas is gone after 10 s
    python -m bench.cluster_sim --cost                           microseconds a decision, bytes a prefix

Placement is the servers' own code, the prefill budget of a step the engine's. A replica is an 8B on an H200: its step
time is fitted to the measured steps of docs/performance.md, batch 1 to 256, with the bytes of a cache entry over the
memory's bandwidth for the context (`program/cost.py`). Predicted, not measured, is everything beyond one replica; one
replica is compared with a real server by `bench/cluster_check.py`.

The load is of conversations: a system prompt that many share, turns of about 120 tokens in and 180 out, each prompt the
whole conversation so far, a pause of some seconds between.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from heapq import heappop, heappush
from itertools import count
from random import Random

import numpy as np
from numpy.typing import NDArray

from bench.cluster_model import Machine, Replica, StepTime, Stream
from tokenmill.backends.kind import GPU_DEFAULTS, Defaults
from tokenmill.engine.limits import SchedulerLimits
from tokenmill.placement.placement import MAX_KEYS, Placement, Ticket
from tokenmill.placement.prompt import EDGES, Prompt, prompt_of_tokens

MEASURED = ((1, 3.95), (8, 4.46), (32, 4.95), (64, 6.27), (128, 7.56), (256, 12.1))
"""Batch and milliseconds of a step of the 8B on an H200, at 512 to 692 tokens of context."""
_CONTEXT_S = 32 * 2 * 1024 * 2 / 4.8e12  # bytes of an entry in 32 layers over the bandwidth
_PREFILL_S = 1 / 43_900  # 42,800 to 45,000 tokens a second
_ZONES = 4
POLICIES = ("placed", "two-choices", "random")


def limits_of(defaults: Defaults, max_total_tokens: int = 32_768) -> SchedulerLimits:
    """Return the limits that the server has by default on such a device."""
    return SchedulerLimits(
        defaults.batch_tokens, defaults.batch_size, max_total_tokens, prefill_beside=defaults.prefill_beside,
        max_chunk=defaults.max_chunk,
    )  # fmt: skip


def h200() -> Machine:
    """Return an 8B on one H200. The cache has what 141 GB leave beside 16 GB of weights."""
    rows, ms = np.array(MEASURED).T
    own = ms / 1e3 - rows * 600 * _CONTEXT_S
    row, fixed = np.polyfit(rows, own, 1)
    time_of = StepTime(float(fixed), _PREFILL_S, float(row), _CONTEXT_S)
    return Machine(time_of, limits_of(GPU_DEFAULTS), capacity=850_000)


@dataclass(frozen=True, slots=True)
class Load:
    """Conversations. `rate`: requests a second and replica; `systems`: number of system prompts, some more common."""

    streams: int
    rate: float
    turns: float = 4.0
    systems: int = 200
    system_tokens: int = 800
    turn_tokens: float = 120.0
    answer_tokens: float = 180.0
    pause_s: float = 10.0


@dataclass(slots=True)
class Conversation:
    """A conversation and the keys of its prefixes so far."""

    number: int
    system: int
    shared: int
    left: int  # turns
    length: int = 0  # tokens
    keys: list[bytes] = field(default_factory=list)

    def prompt(self) -> Prompt:
        """Return the prefixes of the whole conversation. A key is a name here, and as long as a hash."""
        while len(self.keys) < len(EDGES) and EDGES[len(self.keys)] <= self.length:
            edge = EDGES[len(self.keys)]
            name = -1 - self.system if edge <= self.shared else self.number
            self.keys.append((name * 256 + len(self.keys)).to_bytes(8, "little", signed=True))
        return Prompt(self.keys, self.length)


@dataclass(frozen=True, slots=True)
class Result:
    """Report of a run. Times in seconds of the simulated clock, but `decision_*` and `run_s`, of this machine."""

    policy: str
    replicas: int
    streams: int
    seconds: float
    tokens_per_s: float
    hit_share: float  # of prompt tokens
    ttft_p50_s: float
    ttft_p99_s: float
    busy: float  # mean over the replicas
    busy_max: float
    decision_p50_us: float
    decision_p99_us: float
    keys: int
    moved: int
    moved_gap_p99_s: float  # from the loss of a replica to the next token
    run_s: float
    rss_mb: float


class Cluster:
    """A simulation. Use it once: `run`."""

    def __init__(self, machine: Machine, load: Load, replicas: int, *, policy: str = "placed", seed: int = 0,
                 max_keys: int = MAX_KEYS, routers: int = 1, told: bool = True,
                 lose_zone_at: float = 0.0, back_after_s: float = 30.0) -> None:  # fmt: skip
        self.machine, self.load, self.policy, self.lose_zone_at = machine, load, policy, lose_zone_at
        self.back_after_s, self.told = back_after_s, told
        self.replicas = [Replica(index, machine) for index in range(replicas)]
        self.placements: list[Placement[int]] = [Placement(seed=seed + n, max_keys=max_keys) for n in range(routers)]
        for index in range(replicas):
            self._join(index)
        self.rng, self._random = np.random.default_rng(seed), Random(seed)
        self._events: list[tuple[float, int, str, object]] = []
        self._order = count()
        self._conversations: dict[int, Conversation] = {}
        self._numbers = self._draws()
        self.ttft: list[float] = []
        self.gaps: list[float] = []
        self.decisions: list[float] = []
        self.tokens = self.arrived = self.moved = 0
        self.down: set[int] = set()
        self.stopped = 0.0  # when the last stream arrived
        self._busy: NDArray[np.float64] = np.zeros(0)
        self._num_at_once = int(load.rate * replicas * load.pause_s)

    def run(self) -> Result:
        """Run until the last stream has ended."""
        began, load, now = time.process_time(), self.load, 0.0
        starts = enumerate(self._starts())
        self._put(0.0, "start", next(starts))
        if self.lose_zone_at:
            self._put(self.lose_zone_at, "lose", None)
        gc.disable()
        while self._events:
            now, _, what, item = heappop(self._events)
            if what == "end":
                replica, version = item  # type: ignore[misc]
                if replica.version == version:
                    self._advance(replica, now)
            elif what == "turn":
                if self.arrived < load.streams:
                    self._turn(item, now)  # type: ignore[arg-type]
            elif what == "start":
                number, at = item  # type: ignore[misc]
                self._put(at, "turn", self._new(number))
                if self.arrived < load.streams:
                    self._put(at if number >= self._num_at_once else 0.0, "start", next(starts))
                else:
                    self._stop(now)
            elif what == "lose":
                self._lose(now)
            else:
                for index in sorted(self.down):
                    self._join(index)
                self.down.clear()
        gc.enable()
        return self._result(time.process_time() - began)

    def _starts(self) -> Iterator[float]:
        """Yield the starts of conversations: as many as are under way at any time, then a Poisson process."""
        each = self.load.turns / self.load.rate / len(self.replicas)
        yield from self.rng.exponential(self.load.pause_s, self._num_at_once).tolist()
        at = 0.0
        while True:
            for gap in self.rng.exponential(each, 4096).tolist():
                at += gap
                yield at

    def _draws(self) -> Iterator[tuple[int, int, float]]:
        """Yield tokens of a turn, tokens of its answer, and the pause after it, drawn in blocks."""
        load = self.load
        while True:
            turn = self.rng.lognormal(np.log(load.turn_tokens) - 0.32, 0.8, 4096).astype(int) + 1
            answer = self.rng.lognormal(np.log(load.answer_tokens) - 0.32, 0.8, 4096).astype(int) + 1
            pause = self.rng.exponential(load.pause_s, 4096)
            yield from zip(turn.tolist(), np.minimum(answer, 4000).tolist(), pause.tolist(), strict=True)

    def _new(self, number: int) -> Conversation:
        load = self.load
        system = min(int(self._random.paretovariate(0.8)) - 1, load.systems - 1)
        shared = load.system_tokens // 2 + system * 37 % load.system_tokens
        turns = 1 + min(int(self._random.expovariate(1 / (load.turns - 1))) if load.turns > 1 else 0, 30)
        return Conversation(number, system, shared, turns, shared)

    def _put(self, at: float, what: str, item: object) -> None:
        heappush(self._events, (at, next(self._order), what, item))

    def _turn(self, talk: Conversation, now: float) -> None:
        turn, answer, _ = next(self._numbers)
        talk.length += turn
        talk.left -= 1
        self.arrived += 1
        self._conversations[talk.number] = talk
        stream = Stream(now, talk.number, talk.system, talk.shared, talk.length, answer)
        self._send(stream, talk.prompt(), now)

    def _send(self, stream: Stream, prompt: Prompt, now: float) -> None:
        begin = time.thread_time()
        stream.router = self._random.randrange(len(self.placements)) if len(self.placements) > 1 else 0
        stream.ticket = self._place(self.placements[stream.router], prompt, stream.new_tokens)
        self.decisions.append(time.thread_time() - begin)
        if stream.ticket and self.told and self.policy == "placed":
            for placement in self.placements:
                if placement is not self.placements[stream.router]:
                    placement.record(stream.ticket.replica, prompt, stream.ticket.num_cached)
        replica = self.replicas[stream.ticket.replica if stream.ticket else self._any()]
        if replica.submit(stream, now) is not None:
            self._put(replica.until or now, "end", (replica, replica.version))

    def _join(self, index: int) -> None:
        for placement in self.placements:
            placement.add(index, self.machine.capacity)

    def _place(self, placement: Placement[int], prompt: Prompt, new_tokens: int) -> Ticket[int] | None:
        if self.policy == "random":
            return None
        if self.policy == "two-choices":
            prompt = Prompt([], prompt.num_tokens)
        return placement.place(prompt, new_tokens)

    def _any(self) -> int:
        while (index := self._random.randrange(len(self.replicas))) in self.down:
            pass
        return index

    def _advance(self, replica: Replica, now: float) -> None:
        ended = replica.advance()
        for stream in ended.started:
            if stream.ticket:
                self.placements[stream.router].started(stream.ticket)
            if stream.moved_at:
                self.gaps.append(now - stream.moved_at)
            else:
                self.ttft.append(now - stream.arrived + self.machine.overhead_s)
        for stream in ended.finished:
            self._finish(stream, now)
        if len(self.placements) > 1:  # a frame of the engine tells its load to the routers that it has outputs for
            for router in {stream.router for stream in ended.started + ended.finished}:
                self.placements[router].report(replica.index, replica.num_requests)
        if replica.until is not None:
            self._put(replica.until, "end", (replica, replica.version))

    def _finish(self, stream: Stream, now: float) -> None:
        if stream.ticket:
            self.placements[stream.router].ended(stream.ticket, stream.new_tokens)
        if not self.stopped:
            self.tokens += stream.new_tokens + stream.num_generated
        talk = self._conversations.pop(stream.conversation)
        talk.length = stream.prompt_tokens + stream.new_tokens
        if talk.left:
            self._put(now + next(self._numbers)[2], "turn", talk)

    def _lose(self, now: float) -> None:
        """End the replicas of a zone. Their streams go on elsewhere, behind the tokens that they have."""
        lost = self.replicas[::_ZONES]
        streams = []
        for old in lost:
            for placement in self.placements:
                placement.remove(old.index)
            self.down.add(old.index)
            streams += [(stream, old.generated(stream) if stream.last_step else 0) for stream in old.streams]
            self.replicas[old.index] = Replica(old.index, self.machine)
            old.version += 1
        for stream, got in streams:
            moved = Stream(stream.arrived, stream.conversation, stream.system, stream.shared,
                           stream.prompt_tokens + got, stream.new_tokens - got)  # fmt: skip
            moved.num_generated, moved.moved_at = stream.num_generated + got, now if stream.first else 0.0
            moved.first = stream.first
            talk = self._conversations[stream.conversation]
            self.moved += 1
            self._send(moved, Prompt(talk.prompt().keys, moved.prompt_tokens), now)
        self._put(now + self.back_after_s, "back", None)

    def _stop(self, now: float) -> None:
        """Record the end of the load. What comes later counts for times only."""
        self.stopped = now
        self._busy = np.array([one.busy_s for one in self.replicas]) / now

    def _result(self, run_s: float) -> Result:
        hits = sum(one.num_hits for one in self.replicas)
        keys = sum(placement.num_keys for placement in self.placements)
        return Result(
            self.policy, len(self.replicas), self.arrived, self.stopped, self.tokens / self.stopped,
            hits / max(1, sum(one.num_prompt for one in self.replicas)),
            *_percentiles(self.ttft), float(self._busy.mean()), float(self._busy.max()),
            *(1e6 * value for value in _percentiles(self.decisions)), keys, self.moved,
            _percentiles(self.gaps)[1], run_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        )  # fmt: skip


def _percentiles(values: list[float]) -> tuple[float, float]:
    """Return the median and the 99th percentile; nan without values."""
    found: NDArray[np.float64] = np.array(values or [np.nan])
    return float(np.percentile(found, 50)), float(np.percentile(found, 99))


def costs(replicas: tuple[int, ...] = (2, 20, 200, 2000, 10_000)) -> None:
    """Print CPU time of keys and a decision, by number of replicas and length of the prompt, and bytes of a key."""
    print("| replicas | prompt | keys p50 µs | decision p50 | both p99 |\n|---|---|---|---|---|")
    for number in replicas:
        for length in (500, 2000, 8000):
            rng, times = Random(0), []
            placement: Placement[int] = Placement()
            for index in range(number):
                placement.add(index, 850_000)
            system = [rng.randrange(50_000) for _ in range(length // 2)]
            for _ in range(2000):
                ids = (*system, *(rng.randrange(50_000) for _ in range(length // 2)))
                begin = time.thread_time()
                prompt = prompt_of_tokens(ids)
                middle = time.thread_time()
                placement.place(prompt, 100)
                times.append((middle - begin, time.thread_time() - middle))
            keys, decision = (_percentiles([one[part] for one in times])[0] for part in (0, 1))
            both = _percentiles([sum(one) for one in times])[1]
            print(f"| {number:,} | {length:,} | {keys * 1e6:.0f} | {decision * 1e6:.0f} | {both * 1e6:.0f} |")
    tracemalloc.start()
    placement = Placement()
    placement.add(0, 1 << 40)
    rng = Random(0)
    for _ in range(3000):
        placement.place(prompt_of_tokens([rng.randrange(50_000) for _ in range(2000)]), 100)
    print(f"{tracemalloc.get_traced_memory()[0] / placement.num_keys:.0f} bytes a key of one replica")


HEAD = (
    "| replicas | streams | placement | tokens/s | hits | TTFT p50 / p99 ms | busy mean / max | decision p50 / p99 µs "
    "| keys | moved, gap p99 s | simulated s, run s | MB |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(r: Result) -> str:
    """Return a line of the table."""
    return (
        f"| {r.replicas:,} | {r.streams:,} | {r.policy} | {r.tokens_per_s:,.0f} | {100 * r.hit_share:.0f} % "
        f"| {1e3 * r.ttft_p50_s:.0f} / {1e3 * r.ttft_p99_s:.0f} | {r.busy:.2f} / {r.busy_max:.2f} "
        f"| {r.decision_p50_us:.0f} / {r.decision_p99_us:.0f} | {r.keys:,} | {r.moved:,}, {r.moved_gap_p99_s:.2f} "
        f"| {r.seconds:.0f}, {r.run_s:.0f} | {r.rss_mb:.0f} |"
    )


def main() -> None:
    """Run what the arguments ask for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 20, 200, 2000])
    parser.add_argument("--streams", type=int, help="in all; default: 1,000 a replica, at most 200,000")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second and replica")
    parser.add_argument("--pause", type=float, default=10.0, help="seconds between the turns of a conversation")
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=["placed"])
    parser.add_argument("--max-keys", type=int, default=MAX_KEYS)
    parser.add_argument("--routers", type=int, default=1, help="that each place a part of the requests")
    parser.add_argument("--apart", action="store_true", help="routers do not tell each other where they place")
    parser.add_argument("--lose-zone", type=float, default=0.0, metavar="S", help="second at which a quarter is lost")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.cost:
        costs()
        return
    print(f"{h200().time}", file=sys.stderr)
    if not given.json:
        print(HEAD, flush=True)
    for replicas in given.replicas:
        for policy in given.policy:
            load = Load(given.streams or min(200_000, 1000 * replicas), given.rate, pause_s=given.pause)
            cluster = Cluster(h200(), load, replicas, policy=policy, seed=given.seed, max_keys=given.max_keys,
                              routers=given.routers, told=not given.apart, lose_zone_at=given.lose_zone)  # fmt: skip
            result = cluster.run()
            print(json.dumps(asdict(result)) if given.json else row(result), flush=True)


if __name__ == "__main__":
    main()
