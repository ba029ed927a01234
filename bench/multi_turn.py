"""Prefix hits of conversations on several engines of one server, beside as many servers drawn at random.

    python -m bench.multi_turn [--engines 4] [--users 24] [--turns 6] [--real]

Mocked engines have the real scheduler and prefix cache, so their hits are those of a model; `--real`: the embedded one.
Each turn's prompt is all that was said before, and 60 new tokens; the hits are the servers' own count.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
import urllib.request
from random import Random

from bench.serving import served
from tokenmill.bench.client import Ask, complete
from tokenmill.bench.load import percentile

_NEW, _TURN = 20, 60  # tokens of an answer and of a turn


def counted(bases: list[str], name: str) -> float:
    """Return the sum of a metric over servers."""
    total = 0.0
    for base in bases:
        text = urllib.request.urlopen(base + "/metrics", timeout=5).read().decode()
        total += sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))
    return total


async def talk(bases: list[str], users: int, turns: int, seed: int) -> list[float]:
    """Let all users talk at once; each turn goes to a server drawn at random. Return the times to first token."""
    times: list[float] = []

    async def one(user: int) -> None:
        rng = Random(f"{seed} {user}")
        prompt: list[int] = []
        for _ in range(turns):
            prompt += [rng.randrange(3, 250) for _ in range(_TURN)]
            answer = await complete(rng.choice(bases), Ask(prompt, _NEW))
            assert not answer.error, answer.error
            times.append(answer.ttft_s)
            prompt += [rng.randrange(3, 250) for _ in range(_NEW)]  # the client's own words for the answer
            await asyncio.sleep(rng.random() * 0.2)

    await asyncio.gather(*map(one, range(users)))
    return times


def main() -> None:
    """Measure both, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--real", action="store_true", help="the embedded model")
    given = parser.parse_args()
    common = ["--cpu-threads", "1"] if given.real else ["--mock", "--mock-step-ms", "5"]
    found = []
    print("| placement | prompt tokens | cached | TTFT p50 / p99 ms |\n|---|---|---|---|")
    for name, servers, engines in (("one server", 1, given.engines), ("drawn at random", given.engines, 1)):
        with contextlib.ExitStack() as stack:
            options = [*common, *(["--data-parallel-size", str(engines)] if engines > 1 else [])]
            bases = [stack.enter_context(served(*options)) for _ in range(servers)]
            while counted(bases, "tokenmill_engine_up") < given.engines:
                time.sleep(0.1)
            time.sleep(3)  # until the processes have settled
            times = asyncio.run(talk(bases, given.users, given.turns, 0))
            tokens = counted(bases, "tokenmill_prompt_tokens_total")
            found.append(counted(bases, "tokenmill_cached_prompt_tokens_total") / tokens)
        ms = f"{1e3 * percentile(times, 0.5):.0f} / {1e3 * percentile(times, 0.99):.0f}"
        print(f"| {name} | {tokens:.0f} | {found[-1]:.1%} | {ms} |", flush=True)
    print(f"ratio of hits: {found[0] / found[1]:.2f}")


if __name__ == "__main__":
    main()
