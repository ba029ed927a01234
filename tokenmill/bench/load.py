"""Load a server with N concurrent streams and report throughput, time to first token and inter-token latency."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass

from tokenmill.bench.client import Answer, Ask, How, complete

_WORDS = (
    "river stone lamp garden paper cloud window music forest engine silver market winter bridge summer castle ocean "
    "letter mountain yellow circle dragon planet harbor basket candle meadow thunder violin pepper ladder orange"
).split()


def make_prompt(seed: int, words: int) -> str:
    """Generate text of about `words` tokens. Texts of different seeds share no prefix."""
    rng = random.Random(seed)
    return f"Story {seed}. " + " ".join(rng.choice(_WORDS) for _ in range(words))


@dataclass(frozen=True, slots=True)
class Report:
    """Report of one round; times in seconds. `decode_tokens_per_s`: from the last first token to the end."""

    streams: int
    tokens: int
    prompt_tokens: int
    wall_s: float
    tokens_per_s: float
    decode_tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    errors: int


def percentile(values: list[float], share: float) -> float:
    """Return the percentile `share` (0 … 1) of `values`, by nearest rank; nan if there are none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def report(answers: list[Answer], wall_s: float) -> Report:
    """Summarize the answers of a round. Failed answers count as errors only."""
    good = [a for a in answers if not a.error and a.events]
    tokens = sum(a.tokens for a in good)
    decode = float("nan")
    if good:
        start, end = max(a.events[0] for a in good), max(a.events[-1] for a in good)
        chunks = sum(len(a.events) for a in good)
        late = sum(sum(t > start for t in a.events) for a in good)
        if end > start and chunks:
            decode = late * (tokens / chunks) / (end - start)
    gaps = [gap for a in good for gap in a.gaps_s]
    first = [a.ttft_s for a in good]
    return Report(
        streams=len(answers),
        tokens=tokens,
        prompt_tokens=sum(a.prompt_tokens for a in good),
        wall_s=wall_s,
        tokens_per_s=tokens / wall_s,
        decode_tokens_per_s=decode,
        ttft_p50_s=statistics.median(first) if first else float("nan"),
        ttft_p99_s=percentile(first, 0.99),
        itl_p50_s=statistics.median(gaps) if gaps else float("nan"),
        itl_p99_s=percentile(gaps, 0.99),
        errors=len(answers) - len(good),
    )


async def run_round(base_url: str, asks: list[Ask], *, api_key: str = "") -> Report:
    """Send all of `asks` at once and wait for the last answer."""
    start = time.perf_counter()
    answers = await asyncio.gather(*(complete(base_url, ask, How(api_key=api_key)) for ask in asks))
    return report(list(answers), time.perf_counter() - start)


@dataclass(frozen=True, slots=True)
class Disturbed:
    """Report of streams that decode while prompts arrive one after another; times in seconds.

    `quiet_*`: before the first arrival. `gaps_*`: inter-token latencies that overlap the time of the arrivals.
    """

    streams: int
    arrivals: int
    arrival_prompt_tokens: int
    arrival_ttft_p50_s: float
    quiet_p50_s: float
    quiet_p99_s: float
    gaps_p50_s: float
    gaps_p99_s: float
    errors: int  # failed streams and arrivals, and streams that ended before the last arrival's token


async def run_disturbed(base_url: str, streams: list[Ask], arrivals: list[Ask], quiet_s: float = 0.5) -> Disturbed:
    """Start `streams`; `quiet_s` seconds after all of them have a token, send `arrivals`, each after the previous end.

    The streams are cut after the last arrival, so they may request more tokens than a server generates in that time.
    """
    begun, cut = [asyncio.Event() for _ in streams], asyncio.Event()
    tasks = [
        asyncio.create_task(complete(base_url, ask, How(started=event.set, cut=cut)))
        for ask, event in zip(streams, begun, strict=True)
    ]
    for event in begun:
        await event.wait()
    await asyncio.sleep(quiet_s)
    later = [await complete(base_url, ask) for ask in arrivals]
    cut.set()
    return disturbed(list(await asyncio.gather(*tasks)), later)


def disturbed(streams: list[Answer], arrivals: list[Answer]) -> Disturbed:
    """Summarize the answers of `run_disturbed`."""
    good, later = [a for a in streams if not a.error], [a for a in arrivals if not a.error and a.events]
    quiet, busy = [], []
    if good and later:
        all_started = max(a.events[0] for a in good)
        first, last = min(a.sent for a in later), max(a.events[-1] for a in later)
        pairs = [pair for a in good for pair in zip(a.events, a.events[1:], strict=False)]
        quiet = [b - a for a, b in pairs if a >= all_started and b <= first]
        busy = [b - a for a, b in pairs if b > first and a < last]
        good = [a for a in good if a.events[-1] >= last - 1.0]
    ttft = [a.ttft_s for a in later]
    return Disturbed(
        streams=len(streams),
        arrivals=len(arrivals),
        arrival_prompt_tokens=max((a.prompt_tokens for a in later), default=0),
        arrival_ttft_p50_s=statistics.median(ttft) if ttft else float("nan"),
        quiet_p50_s=percentile(quiet, 0.5),
        quiet_p99_s=percentile(quiet, 0.99),
        gaps_p50_s=percentile(busy, 0.5),
        gaps_p99_s=percentile(busy, 0.99),
        errors=len(streams) - len(good) + len(arrivals) - len(later),
    )


def table(rows: list[Report]) -> str:
    """Format reports as a Markdown table."""
    head = "| streams | tok/s | decode tok/s | TTFT p50 ms | p99 | ITL p50 ms | p99 | errors |\n" + "|---" * 8 + "|"
    body = [
        f"| {r.streams} | {r.tokens_per_s:.0f} | {r.decode_tokens_per_s:.0f} | {r.ttft_p50_s * 1e3:.0f} "
        f"| {r.ttft_p99_s * 1e3:.0f} | {r.itl_p50_s * 1e3:.1f} | {r.itl_p99_s * 1e3:.1f} | {r.errors} |"
        for r in rows
    ]
    return "\n".join([head, *body])
