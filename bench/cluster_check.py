"""Compare the simulated replica of `bench/cluster_sim.py` with a real server: one replica, the embedded model.

    python -m bench.cluster_check [--requests 150 --rate 4]

The step time is fitted to the server's own steps first: gaps between tokens at several batches and contexts, and first
tokens of prompts of two lengths. Then requests of random lengths come at random times, and the simulation gets the same
ones. Token ids are random, so nothing is cached.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import urllib.request
from collections.abc import Sequence
from heapq import heappop, heappush
from random import Random
from statistics import mean, median
from typing import NamedTuple

import numpy as np

from bench.cluster_model import Machine, Replica, StepTime, Stream
from bench.cluster_sim import limits_of
from bench.serving import served
from tokenmill.backends.kind import CPU_DEFAULTS
from tokenmill.bench.client import Answer, Ask, complete
from tokenmill.bench.load import percentile

_BATCHES = ((1, 128), (4, 128), (16, 128), (32, 128), (8, 1000))  # streams, tokens of their prompts
_SHORT, _LONG = 16, 480  # tokens of prompts


class Arrival(NamedTuple):
    """A request and its time in seconds."""

    at: float
    prompt_tokens: int
    new_tokens: int


class Seen(NamedTuple):
    """Results of a load; times in seconds."""

    tokens_per_s: float
    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    latency_mean: float
    latency_p99: float


def ids(rng: Random, number: int) -> list[int]:
    """Return random token ids."""
    return [rng.randrange(1000, 40_000) for _ in range(number)]


def seen(first: Sequence[float], whole: Sequence[float], tokens: int, seconds: float) -> Seen:
    """Return the report of a load: times to first and to last tokens, and all tokens in `seconds`."""
    ttft, latency = list(first), list(whole)
    return Seen(
        tokens / seconds, mean(ttft), median(ttft), percentile(ttft, 0.99), mean(latency), percentile(latency, 0.99)
    )


async def fit(base: str, rng: Random) -> tuple[StepTime, float]:
    """Measure the server's steps. Return the step time, and the seconds of a request outside of them."""
    rows, times = [], []
    for streams, context in _BATCHES:
        asks = [Ask(ids(rng, context), 64) for _ in range(streams)]
        answers = await asyncio.gather(*(complete(base, ask) for ask in asks))
        began = max(answer.events[0] for answer in answers)  # all streams decode from here on
        gaps = [b - a for one in answers for a, b in zip(one.events, one.events[1:], strict=False) if a >= began]
        rows.append((1.0, streams, streams * (context + 48)))
        times.append(mean(gaps))
    fixed, row, context_s = np.linalg.lstsq(np.array(rows) / np.array(times)[:, None], np.ones(len(times)), rcond=None)[
        0
    ]
    first = {n: median([(await complete(base, Ask(ids(rng, n), 2))).ttft_s for _ in range(9)]) for n in (_SHORT, _LONG)}
    token = (first[_LONG] - first[_SHORT]) / (_LONG - _SHORT)
    time_of = StepTime(float(fixed), token, float(row), max(float(context_s), 0.0))
    return time_of, max(0.0, first[_SHORT] - time_of.step(_SHORT, 0, 0))


async def real(base: str, arrivals: list[Arrival], rng: Random) -> Seen:
    """Send the requests at their times."""
    begin = time.perf_counter()

    async def one(arrival: Arrival) -> Answer:
        await asyncio.sleep(begin + arrival.at - time.perf_counter())
        return await complete(base, Ask(ids(rng, arrival.prompt_tokens), arrival.new_tokens))

    answers = await asyncio.gather(*map(one, arrivals))
    assert not any(answer.error for answer in answers), next(answer.error for answer in answers if answer.error)
    end = max(answer.events[-1] for answer in answers)
    return seen(
        [answer.ttft_s for answer in answers], [answer.events[-1] - answer.sent for answer in answers],
        sum(answer.tokens for answer in answers), end - begin,
    )  # fmt: skip


def simulated(machine: Machine, arrivals: list[Arrival]) -> Seen:
    """Give the requests to a simulated replica."""
    replica, events = Replica(0, machine), list[tuple[float, int, Stream | None]]()
    for number, arrival in enumerate(arrivals):
        stream = Stream(arrival.at, number, number, 0, arrival.prompt_tokens, arrival.new_tokens)
        heappush(events, (arrival.at, number, stream))
    first, whole, now = [], [], 0.0
    while events:
        now, version, item = heappop(events)
        if item is not None:
            replica.submit(item, now)
        elif version == -replica.version:
            for stream in (ended := replica.advance()).started:
                first.append(now - stream.arrived + machine.overhead_s)
            whole += [now - stream.arrived + machine.overhead_s for stream in ended.finished]
        else:
            continue
        if replica.until is not None:
            heappush(events, (replica.until, -replica.version, None))
    return seen(first, whole, sum(arrival.new_tokens for arrival in arrivals), now)


def main() -> None:
    """Measure, simulate, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--rate", type=float, nargs="+", default=[4.0], help="requests a second")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = Random(given.seed)
    print("| requests a second | | tok/s | TTFT mean | p50 | p99 | latency mean | p99 ms |")
    print("|---|---|---|---|---|---|---|---|")
    with served("--max-batch-total-tokens", "40000") as base:
        capacity = json.load(urllib.request.urlopen(base + "/info", timeout=5))["max_batch_total_tokens"]
        asyncio.run(fit(base, rng))  # warm-up
        for rate in given.rate:
            arrivals, at = [], 0.0
            for _ in range(given.requests):
                at += rng.expovariate(rate)
                arrivals.append(Arrival(at, rng.randrange(20, 400), rng.randrange(16, 128)))
            before, overhead = asyncio.run(fit(base, rng))
            measured = asyncio.run(real(base, arrivals, rng))
            after, _ = asyncio.run(fit(base, rng))
            times = StepTime(*(mean(pair) for pair in zip(before, after, strict=True)))
            predicted = simulated(Machine(times, limits_of(CPU_DEFAULTS), capacity, overhead), arrivals)
            for name, result in (("measured", measured), ("simulated", predicted)):
                rest = " | ".join(f"{1e3 * value:.0f}" for value in result[1:])
                print(f"| {rate:g} | {name} | {result.tokens_per_s:.0f} | {rest} |")
            ratios = " | ".join(f"{b / a:.2f}" for a, b in zip(measured, predicted, strict=True))
            print(f"| | ratio | {ratios} |")
            micro = ", ".join(f"{name} {1e6 * value:.1f}" for name, value in times._asdict().items())
            drift = max(abs(a / b - 1) for a, b in zip(before[:3], after[:3], strict=True))
            print(f"step µs: {micro}; outside of steps {1e3 * overhead:.1f} ms; before and after differ by {drift:.0%}")


if __name__ == "__main__":
    main()
