"""Load a server with N streams at once and say what it did: throughput, time to first token, inter-token latency."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass

from tokenmill.bench.client import Answer, Ask, complete

_WORDS = (
    "river stone lamp garden paper cloud window music forest engine silver market winter bridge summer castle ocean "
    "letter mountain yellow circle dragon planet harbor basket candle meadow thunder violin pepper ladder orange"
).split()


def make_prompt(seed: int, words: int) -> str:
    """Text of about `words` tokens whose first words differ from any other seed's, so that no prefix is shared."""
    rng = random.Random(seed)
    return f"Story {seed}. " + " ".join(rng.choice(_WORDS) for _ in range(words))


@dataclass(frozen=True, slots=True)
class Report:
    """One round of load. Seconds; `decode_tokens_per_s` counts from the last first token to the end."""

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
    """The value below which `share` (0 … 1) of them lie, by nearest rank; nan of none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def report(answers: list[Answer], wall_s: float) -> Report:
    """Fold a round's answers. Failed ones count as errors and nothing else."""
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
    """Send all of `asks` at once and wait for the last."""
    start = time.perf_counter()
    answers = await asyncio.gather(*(complete(base_url, ask, api_key=api_key) for ask in asks))
    return report(list(answers), time.perf_counter() - start)


def table(rows: list[Report]) -> str:
    """Reports as a markdown table."""
    head = "| streams | tok/s | decode tok/s | TTFT p50 ms | p99 | ITL p50 ms | p99 | errors |\n" + "|---" * 8 + "|"
    body = [
        f"| {r.streams} | {r.tokens_per_s:.0f} | {r.decode_tokens_per_s:.0f} | {r.ttft_p50_s * 1e3:.0f} "
        f"| {r.ttft_p99_s * 1e3:.0f} | {r.itl_p50_s * 1e3:.1f} | {r.itl_p99_s * 1e3:.1f} | {r.errors} |"
        for r in rows
    ]
    return "\n".join([head, *body])
