"""Measure many concurrent streams from several processes, for servers that send more than one process can read.

    report = run_crowd("http://127.0.0.1:3000", asks, clients=8)

Each process reads its share of the streams with `client.receive`, and parses the bytes after the last stream has ended.
It also reports its CPU time, which shows whether the clients were the bottleneck. Processes communicate in JSON.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from tokenmill.bench.client import Answer, Ask, How, receive
from tokenmill.bench.load import percentile


@dataclass(frozen=True, slots=True)
class Crowd:
    """Report of one round of concurrent streams; times in seconds.

    `itl_*`: inter-token latency of a stream; tokens of the same event are 0 apart. `gap_*`: time between consecutive
    events. `client_busy`: CPU time of the busiest client process, divided by the duration of the round; near 1, the
    clients were the bottleneck.
    """

    streams: int
    clients: int
    tokens: int
    events: int
    wall_s: float  # from sending all requests to the last event
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    gap_p50_s: float
    gap_p99_s: float
    client_busy: float
    errors: int
    first_error: str

    @property
    def tokens_per_event(self) -> float:
        """Mean number of tokens per event."""
        return self.tokens / self.events if self.events else float("nan")


class Share(msgspec.Struct, frozen=True):
    """Requests that one client process sends."""

    base_url: str
    asks: list[Ask]
    timeout_s: float


class Found(msgspec.Struct, frozen=True):
    """Result of one client process."""

    answers: list[Answer]
    cpu_s: float  # from the start to the last byte, without parsing


def run_crowd(base_url: str, asks: list[Ask], *, clients: int = 1, timeout_s: float = 120.0, mark: str = "") -> Crowd:
    """Send all of `asks` at once from `clients` processes and wait for the last answer.

    `mark`: a text that occurs once in the text of every token, to count the tokens of an event; "": every event of a
    stream counts as the stream's mean number of tokens. A stream that fails or takes longer than `timeout_s` seconds
    counts as an error.
    """
    processes = [_start() for _ in range(min(clients, len(asks)))]
    try:
        for number, process in enumerate(processes):
            share = Share(base_url, asks[number :: len(processes)], timeout_s)
            _say(process, msgspec.json.encode(share))
        for process in processes:
            _hear(process)  # wait until it has read its share
        start = time.perf_counter() + 0.05
        for process in processes:
            _say(process, msgspec.json.encode(start))
        found = [msgspec.json.decode(_hear(process), type=Found) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return fold(found, start, mark)


def fold(found: list[Found], start: float, mark: str = "") -> Crowd:
    """Summarize a round that began at `start`. Failed streams count as errors only."""
    answers = [answer for one in found for answer in one.answers]
    good = [a for a in answers if not a.error and a.events]
    tokens = sum(a.tokens for a in good)
    wall = max((a.events[-1] for a in good), default=float("nan")) - start
    gaps = [gap for a in good for gap in a.gaps_s]
    tokens_apart = [gap for a in good for gap in token_gaps(a, mark)]
    first = [a.ttft_s for a in good]
    return Crowd(
        streams=len(answers),
        clients=len(found),
        tokens=tokens,
        events=sum(len(a.events) for a in good),
        wall_s=wall,
        tokens_per_s=tokens / wall,
        ttft_p50_s=statistics.median(first) if first else float("nan"),
        ttft_p99_s=percentile(first, 0.99),
        itl_p50_s=percentile(tokens_apart, 0.5),
        itl_p99_s=percentile(tokens_apart, 0.99),
        gap_p50_s=percentile(gaps, 0.5),
        gap_p99_s=percentile(gaps, 0.99),
        client_busy=max(one.cpu_s for one in found) / wall,
        errors=len(answers) - len(good),
        first_error=next((a.error or "no event" for a in answers if a not in good), ""),
    )


def token_gaps(answer: Answer, mark: str) -> list[float]:
    """Return the seconds between consecutive tokens. An event of k tokens yields the gap before it and k - 1 zeros."""
    if mark:
        counts = [max(1, text.count(mark)) for text in answer.texts]
    else:
        ends = [round(i * answer.tokens / len(answer.events)) for i in range(len(answer.events) + 1)]
        counts = [b - a for a, b in pairwise(ends)]
    gaps: list[float] = [0.0] * max(counts[0] - 1, 0)
    for gap, count in zip(answer.gaps_s, counts[1:], strict=True):
        gaps += [gap, *[0.0] * (count - 1)] if count else []
    return gaps


def _start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tokenmill.bench.crowd"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _say(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(data + b"\n")
    process.stdin.flush()


def _hear(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise ChildProcessError(f"a client process ended with exit code {process.wait()}")
    return line


async def _read_all(share: Share, start: float) -> Found:
    """Send the requests of one process and read their streams."""
    await asyncio.sleep(start - time.perf_counter())
    before = time.process_time()
    asked = [receive(share.base_url, ask, How(timeout_s=share.timeout_s)) for ask in share.asks]
    received = await asyncio.gather(*asked)
    cpu_s = time.process_time() - before
    return Found([one.answer() for one in received], cpu_s)


def main() -> None:
    """Run a client process: read a share, write "ready", read the start time, write the result; each a line of JSON."""
    import uvloop

    share = msgspec.json.decode(sys.stdin.buffer.readline(), type=Share)
    gc.disable()  # a garbage collection would delay all streams
    print(0, flush=True)
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=float)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(_read_all(share, start))
    with open(sys.stdout.fileno(), "wb", closefd=False) as out:  # sys.stdout may write partially if unbuffered
        out.write(msgspec.json.encode(found) + b"\n")


if __name__ == "__main__":
    main()
