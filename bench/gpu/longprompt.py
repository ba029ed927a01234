"""(d) Measure the inter-token latency of decoding streams before and while a long prompt is computed."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from bench.gpu.tell import figure
from tokenmill.bench.load import percentile


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """Workload: a prompt of `tokens` tokens while streams decode, whose own prompts have `context` tokens."""

    tokens: int = 32768
    streams: int = 32
    most_id: int = 10000
    context: int = 500
    stream_tokens: int = 3000  # limit of a stream, more than the measurement needs
    quiet_steps: int = 100
    repeat: int = 3

    def prompt(self, seed: int, length: int) -> list[int]:
        """Return token ids that share no prefix with those of other seeds."""
        draw = random.Random(seed)
        return [draw.randint(0, self.most_id) for _ in range(length)]


class Steps(Protocol):
    """Interface of an engine that the measurement steps."""

    def submit(self, prompt: list[int], max_tokens: int) -> int:
        """Queue a request and return its number."""

    def step(self) -> None:
        """Run one step."""

    def tokens(self, request: int) -> int:
        """Return the number of tokens of a request so far."""

    def abort(self, request: int) -> None:
        """Abort a request."""


@dataclass(slots=True)
class Gaps:
    """Recorder of the seconds between consecutive tokens of streams; tokens of the same step have gaps of 0."""

    last: dict[int, float]
    seen: dict[int, int]
    gaps: list[float] = field(default_factory=list)

    def look(self, tokens_of: Callable[[int], int]) -> None:
        """Record the tokens since the last call."""
        now = time.perf_counter()
        for request, before in self.seen.items():
            count = tokens_of(request)
            if count > before:
                self.gaps += [now - self.last[request], *[0.0] * (count - before - 1)]
                self.last[request], self.seen[request] = now, count


def measure(engine: Steps, shape: str, work: LongPrompt) -> None:
    """Measure an engine and print the figures. Requests are aborted at the end."""
    streams = [engine.submit(work.prompt(i, work.context), work.stream_tokens) for i in range(work.streams)]
    prompts = [work.prompt(1000 + i, work.tokens) for i in range(work.repeat)]  # in advance: longer than a step
    while not all(engine.tokens(stream) for stream in streams):
        engine.step()
    quiet, busy, ttft, slowest = [], [], [], []
    for prompt in prompts:
        gaps = _begin(engine, streams)
        for _ in range(work.quiet_steps):
            engine.step()
            gaps.look(engine.tokens)
        quiet += gaps.gaps
        gaps.gaps = []
        start = time.perf_counter()
        arrival, ends = engine.submit(prompt, 2), [start]
        while not engine.tokens(arrival):
            engine.step()
            gaps.look(engine.tokens)
            ends.append(time.perf_counter())
        ttft.append(ends[-1] - start)
        busy += gaps.gaps
        slowest.append(_slowest(ends))
        engine.abort(arrival)
    for stream in streams:
        engine.abort(stream)
    _tell(shape, work, quiet, busy, ttft, slowest)


def _begin(engine: Steps, streams: list[int]) -> Gaps:
    """Run some steps, then start recording after a step in which every stream got a token."""
    for _ in range(10):
        engine.step()
    now = time.perf_counter()
    return Gaps(dict.fromkeys(streams, now), {stream: engine.tokens(stream) for stream in streams})


def _slowest(ends: list[float], most: int = 4) -> str:
    """Format the longest steps of a prompt with their durations: "of 220: 1: 20.1 ms, …"."""
    took = sorted(((after - before, n) for n, (before, after) in enumerate(pairwise(ends), 1)), reverse=True)
    return f"of {len(took)}: " + ", ".join(f"{n}: {seconds * 1e3:.1f} ms" for seconds, n in took[:most])


def _tell(
    shape: str, work: LongPrompt, quiet: list[float], busy: list[float], ttft: list[float], slowest: list[str]
) -> None:
    def ms(gaps: list[float], share: float) -> float:
        return round(percentile(gaps, share) * 1e3, 2)

    before, during = ms(quiet, 0.99), ms(busy, 0.99)
    figure(shape, "long prompt: quiet p50", ms(quiet, 0.5), "ms")
    figure(shape, "long prompt: quiet p99", before, "ms", gaps=len(quiet))
    figure(shape, "long prompt: p50 meanwhile", ms(busy, 0.5), "ms")
    figure(shape, "long prompt: p99 meanwhile", during, "ms", gaps=len(busy), longest=ms(busy, 1.0),
           slowest_steps=slowest)  # fmt: skip
    figure(shape, "long prompt: p99 to quiet p99", round(during / before, 2), "×", less=True,
           to_quiet_p50=round(during / ms(quiet, 0.5), 2))  # fmt: skip
    figure(shape, "long prompt: first token", round(statistics.median(ttft), 3), "s", tokens=work.tokens,
           streams=work.streams, runs=[round(t, 3) for t in ttft])  # fmt: skip
