"""Measure throughput and latency over HTTP at 1, 4, 16, 32 streams: `bench/serving.py [--url URL] [--streams 1,4]`.

Without `--url`, the embedded model is served for the duration of the run. Each number of streams is measured in
`--passes` interleaved rounds, after one warm-up round. The table shows the round of median throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tokenmill.bench.client import Ask
from tokenmill.bench.load import Report, make_prompt, run_round, table


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def served(*arguments: str, timeout_s: float = 120.0) -> Iterator[str]:
    """Start a server with `arguments`, yield its base URL once it is ready, and stop it at the end."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tokenmill", "serve", "--hostname", "127.0.0.1", "--port", str(port), *arguments],
        stdout=subprocess.DEVNULL,
    )
    base = f"http://127.0.0.1:{port}"
    try:
        start = time.perf_counter()
        while time.perf_counter() - start < timeout_s:
            with contextlib.suppress(OSError), urllib.request.urlopen(base + "/health", timeout=1) as answer:
                if answer.status == 200:
                    break
            if server.poll() is not None:
                raise SystemExit(f"the server ended with exit code {server.returncode}")
            time.sleep(0.05)
        else:
            raise SystemExit(f"the server is not ready after {timeout_s:.0f} s")
        print(f"ready in {time.perf_counter() - start:.1f} s: tokenmill serve {' '.join(arguments)}", file=sys.stderr)
        yield base
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def median_report(reports: list[Report]) -> Report:
    """Return the report of median throughput."""
    return sorted(reports, key=lambda r: r.tokens_per_s)[len(reports) // 2]


def measure(base: str, streams: list[int], words: int, new_tokens: int, passes: int) -> list[Report]:
    """Measure each number of streams; return one report for each."""
    rounds: dict[int, list[Report]] = {n: [] for n in streams}
    seed = 0
    for done in range(passes + 1):
        for n in streams:
            asks = [Ask(make_prompt(seed + i, words), new_tokens if done else 8) for i in range(n)]
            seed += n
            found = asyncio.run(run_round(base, asks))
            if done:
                rounds[n].append(found)
    return [median_report(reports) for reports in rounds.values()]


def main() -> None:
    """Measure, print the table, and write the figures as JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a running server; else the embedded model is served")
    parser.add_argument("--streams", default="1,4,16,32")
    parser.add_argument("--words", type=int, default=120, help="about this many prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--serve", default="", help="more options of the server, in one string")
    options = parser.parse_args()
    streams = [int(n) for n in options.streams.split(",")]
    with contextlib.ExitStack() as stack:
        base = options.url or stack.enter_context(served(*options.serve.split()))
        reports = measure(base, streams, options.words, options.new_tokens, options.passes)
    how = f"{options.words} prompt tokens, {options.new_tokens} new, greedy, {options.passes} passes"
    print(f"{how}, {os.cpu_count()} CPUs, {platform.machine()}")
    print(table(reports))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")


if __name__ == "__main__":
    main()
