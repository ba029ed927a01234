"""Short prompts that arrive while a long one is computed: time to first token of both.

    python -m bench.mixed_prompts                       a GPU's cost model, an 8B on an H200
    python -m bench.mixed_prompts --real --long 6000    the embedded model on this machine

Simulated: the scheduler is the server's, with the server's limits; the time of a step is counted from the program
(`program/cost.py`), one step is planned while another runs, as in the engine. Real: the engine in this process, on one
thread, by CPU time.

Three loads each: short prompts alone (quiet), the long prompt alone, both. In all of them `--streams` others decode.
A short prompt counts if it arrives while the long one waits for its first token.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from bench.gpu.shapes import SHAPES
from tokenmill.backends.base import StepResult
from tokenmill.backends.kind import GPU_DEFAULTS
from tokenmill.bench.load import percentile
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.sequence import Batch
from tokenmill.models.base import program_of
from tokenmill.program import ops
from tokenmill.program.cost import Cost, Load, cost
from tokenmill.program.value import Program
from tokenmill.runtime.assembly import scheduler_of
from tokenmill.wire.messages import EngineInfo, Request, SamplingParams, StoppingParams

HEAD = (
    "| long | streams | short alone p50 / p99 ms | beside the long p50 / p99 | p99 ratio | long alone s "
    "| with short ones | growth | gap p99 ms, long alone | both |\n|---|---|---|---|---|---|---|---|---|---|"
)
STREAM_PROMPT, STREAM_TOKENS, SHORT_TOKENS = 200, 100_000, 16


class Arrival(NamedTuple):
    """A request and when it comes; `kind`: "stream", "long", "short"."""

    at: float
    kind: str
    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Mix:
    """A load: streams at 0, the long prompt at `start`, short ones from there on, `rate` a second by chance."""

    long: int
    shorts: tuple[int, int]
    rate: float
    streams: int
    start: float
    duration: float  # of short prompts

    def arrivals(self, seed: int, kinds: str) -> list[Arrival]:
        """In order of time. No two prompts begin alike."""
        draw = random.Random(f"{seed} {kinds}")  # nothing is in the prefix cache

        def prompt(tokens: int) -> tuple[int, ...]:
            return tuple(draw.randrange(1000, 40_000) for _ in range(tokens))

        found = [Arrival(0.0, "stream", prompt(STREAM_PROMPT), STREAM_TOKENS) for _ in range(self.streams)]
        if "long" in kinds:
            found.append(Arrival(self.start, "long", prompt(self.long), 1))
        if "short" in kinds:
            at, chance = self.start, random.Random(seed)
            while (at := at + chance.expovariate(self.rate)) < self.start + self.duration:
                found.append(Arrival(at, "short", prompt(chance.randint(*self.shorts)), SHORT_TOKENS))
        return found


@dataclass(slots=True)
class Times:
    """Seconds to the first token, and between the tokens of streams meanwhile."""

    short: list[float] = field(default_factory=list)
    long: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


# ---- a cost model


class Device(NamedTuple):
    """A GPU: an H200 by what was measured on one. Its products of an 8B take 5.95 ms at 256 rows, 39.3 at 2,048."""

    bytes_per_s: float = 4.1e12
    flops_per_s: float = 7.5e14
    ramp_s: float = 1.2e-3  # of products of many rows, before they are that fast
    attention: float = 0.5  # of `flops_per_s`
    step_s: float = 3e-4  # launches and gaps


class StepTime:
    """Seconds of a step by a program's costs, which are linear in the load."""

    def __init__(self, program: Program, device: Device) -> None:
        self.device = device
        attention = [op for op in program.ops if op.keeps() is not None]
        others = [op for op in program.ops if op.keeps() is None]
        self._weights = _sum(others, Load(0, 0, 0, 0)).weights
        self._token = _sum(others, Load(1, 0, 0, 0)).flops
        self._sample = _sum(others, Load(0, 1, 0, 0)).flops
        self._pair = _sum(attention, Load(0, 0, 0, 1)).flops
        self._entry = _sum(attention, Load(0, 0, 1, 0)).cache

    def __call__(self, batch: Batch) -> float:
        starts, counts = batch.starts.astype(float), batch.counts.astype(float)
        pairs = float((counts * starts + counts * (counts + 1) / 2).sum())
        flops = batch.num_tokens * self._token + len(batch.samples) * self._sample
        device = self.device
        products = max(self._weights / device.bytes_per_s, device.ramp_s + flops / device.flops_per_s)
        cache = float((starts + counts).sum()) * self._entry / device.bytes_per_s
        return device.step_s + products + cache + pairs * self._pair / (device.attention * device.flops_per_s)


def _sum(operations: list[ops.Op], load: Load) -> Cost:
    return sum((cost(op, load, lambda weight: 16.0) for op in operations), Cost())


def simulate(scheduler: Scheduler, step_time: Callable[[Batch], float], arrivals: list[Arrival]) -> Times:
    """Run until all but the streams are served."""
    arrivals = sorted(arrivals, key=lambda arrival: arrival.at)
    seen = _Seen(arrivals)
    now = free = 0.0
    flying: tuple[Batch, float] | None = None
    coming = 0
    while seen.open:
        if not scheduler.has_work and not flying:
            now = max(now, arrivals[coming].at)
        while coming < len(arrivals) and arrivals[coming].at <= now:
            scheduler.add(_request(coming, arrivals[coming]))
            coming += 1
        batch = scheduler.schedule()
        if batch:
            free = max(now, free) + step_time(batch)
        if flying:
            done, end = flying
            now = max(now, end)
            for output in scheduler.update(done, StepResult([7] * len(done.samples))):
                seen.tokens(output.request_id, now)
        scheduler.notices()
        flying = (batch, free) if batch else None
    return seen.times


def _request(number: int, arrival: Arrival) -> Request:
    return Request(number, arrival.prompt, SamplingParams(), StoppingParams(arrival.new_tokens))


class _Seen:
    """The first tokens of the arrivals, by number."""

    def __init__(self, arrivals: list[Arrival]) -> None:
        self._arrivals = arrivals
        self.times = Times()
        self.open = {number for number, arrival in enumerate(arrivals) if arrival.kind != "stream"}
        self._last: dict[int, float] = {}
        self._long = any(arrival.kind == "long" for arrival in arrivals)
        self._start = min((a.at for a in arrivals if a.kind != "stream"), default=0.0)

    def tokens(self, number: int, now: float) -> None:
        """Tokens of a request came at `now`."""
        arrival = self._arrivals[number]
        if arrival.kind == "stream":
            if number in self._last and now > self._start and not (self._long and self.times.long):
                self.times.gaps.append(now - self._last[number])
            self._last[number] = now
        elif number in self.open:
            self.open.discard(number)
            if arrival.kind == "long":
                self.times.long.append(now - arrival.at)
                late = [n for n in self.open if self._arrivals[n].at > now]  # it had to do with none of them
                self.open.difference_update(late)
            else:
                self.times.short.append(now - arrival.at)


# ---- this machine


class Real:
    """The embedded model's engine on one thread, stepped from here. Seconds are of this process's CPU time, so that
    other work on the machine does not count.
    """

    def __init__(self) -> None:
        from tokenmill import LLM

        self._llm = LLM(cpu_threads=1)
        self._engine = self._llm._engine

    def run(self, arrivals: list[Arrival]) -> Times:
        """Run until all but the streams are served; abort these."""
        arrivals = sorted(arrivals, key=lambda arrival: arrival.at)
        seen, engine = _Seen(arrivals), self._engine
        begin, coming, ids = time.process_time(), 0, dict[int, int]()
        while seen.open:
            now = time.process_time() - begin
            if not ids and arrivals[coming].at > now:
                begin -= arrivals[coming].at - now  # nothing to do until then
                continue
            while coming < len(arrivals) and arrivals[coming].at <= now:
                new_tokens = min(arrivals[coming].new_tokens, 8000 - len(arrivals[coming].prompt))
                ids[coming] = engine.submit(arrivals[coming].prompt, stopping=StoppingParams(new_tokens))
                coming += 1
            engine.step()
            now = time.process_time() - begin
            for number, request_id in list(ids.items()):
                for output in engine.poll(request_id):
                    if output.token_ids:
                        seen.tokens(number, now)
                    if output.finish_reason:
                        del ids[number]
        for request_id in ids.values():
            engine.abort(request_id)
        while engine.step():
            pass
        return seen.times


# ---- tables


def measure(run: Callable[[list[Arrival]], Times], load: Mix, repeat: int) -> str:
    """A row of the table."""
    quiet, alone, both = Times(), Times(), Times()
    for seed in range(repeat):
        for kinds, into in (("short", quiet), ("long", alone), ("short long", both)):
            found = run(load.arrivals(seed, kinds))
            into.short += found.short
            into.long += found.long
            into.gaps += found.gaps
    s50, s99, b50, b99 = (percentile(times.short, share) * 1e3 for times in (quiet, both) for share in (0.5, 0.99))
    gap = f"{percentile(both.gaps, 0.99) * 1e3:.1f}" if both.gaps else "–"
    gap_alone = f"{percentile(alone.gaps, 0.99) * 1e3:.1f}" if alone.gaps else "–"
    growth = median(both.long) / median(alone.long) - 1
    return (
        f"| {load.long:,} | {load.streams} | {s50:,.0f} / {s99:,.0f} | {b50:,.0f} / {b99:,.0f} | {b99 / s99:.1f} | "
        f"{median(alone.long):.2f} | {median(both.long):.2f} | {growth:+.0%} | {gap_alone} | {gap} |"
    )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="the embedded model on this machine, not a cost model")
    parser.add_argument("--shape", default="8b", choices=["8b", "1b"])
    parser.add_argument("--long", default="30000,100000", help="tokens of the long prompt")
    parser.add_argument("--streams", default="32,0", help="sequences that decode meanwhile")
    parser.add_argument("--shorts", default="50,400", help="tokens of a short prompt, from and to")
    parser.add_argument("--rate", type=float, default=8.0, help="short prompts a second")
    parser.add_argument("--start", type=float, default=1.0, help="seconds at which the long prompt arrives")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of short prompts, at most")
    parser.add_argument("--repeat", type=int, default=10)
    options = parser.parse_args()
    shortest, longest = map(int, options.shorts.split(","))
    print(HEAD)
    run: Callable[[list[Arrival]], Times]
    if options.real:
        run = Real().run
    else:
        program = program_of(SHAPES[options.shape])
        info = EngineInfo(options.shape, "bfloat16", "cuda", "cuda", 40_000, 16, 128_256, 131_071, 131_072, 8192, 256)
        step_time = StepTime(program, Device())

        def run(arrivals: list[Arrival]) -> Times:
            return simulate(scheduler_of(info, GPU_DEFAULTS, program), step_time, arrivals)

    for streams in map(int, options.streams.split(",")):
        for long in map(int, options.long.split(",")):
            load = Mix(long, (shortest, longest), options.rate, streams, options.start, options.duration)
            print(measure(run, load, options.repeat), flush=True)


if __name__ == "__main__":
    main()
