"""Measure a server over HTTP: seconds to ready, and many concurrent streams.

    python -m bench.gpu.serving --shape 8b --model FOLDER --streams 64,256 --http-workers 4,1,2,8

`--who peer` measures vLLM with the same clients. Prompts are token ids, with the lengths of (a); every answer has its
full length (`ignore_eos`), at temperature 0.6. The tokenizer is generated, so that an event's text shows its tokens.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from bench.gpu.servers import OURS, PEER, PEER_ENVIRONMENT, Running, Server, running
from bench.gpu.shapes import SHAPES, crowd, unshared
from bench.gpu.tell import Turn, figure, tell
from bench.gpu.tokenizer import MARK
from tokenmill.bench.client import Ask
from tokenmill.bench.crowd import Crowd, run_crowd


class Load:
    """Load of concurrent streams."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.shape, self.longest, self.clients = args.shape, args.longest, args.clients
        self.streams = [int(n) for n in args.streams.split(",")]
        self.repeat, self.round_s = args.repeat, args.round
        self.most_id = min(10000, SHAPES[args.shape]["vocab_size"] - 1)
        self._rounds = 0

    def asks(self, streams: int, new_tokens: int = 0) -> list[Ask]:
        """Return requests that share no prefix with earlier rounds. `new_tokens`: of each; 0: as in (a)."""
        self._rounds += 1
        work = crowd(streams, min(100, self.longest), self.longest, most_ids=self.most_id)
        prompts = unshared(work.prompts, self._rounds, self.most_id)
        return [
            Ask(prompt, new_tokens or count, temperature=0.6)
            for prompt, count in zip(prompts, work.counts, strict=True)
        ]

    def measure(self, server: Running, suffix: str) -> None:
        """Warm up, measure each number of streams, and print its round of median throughput."""
        self._round(server, self.asks(max(self.streams), 16), "warm-up")
        for streams in self.streams:
            name = f"HTTP, {streams} streams{suffix}"
            rounds = [self._round(server, self.asks(streams), name) for _ in range(self.repeat)]
            rounds.sort(key=lambda r: r[0].tokens_per_s if r[0].tokens else 0.0)
            rates = [round(found.tokens_per_s) if found.tokens else 0 for found, _ in rounds]
            self._tell(name, rounds[len(rounds) // 2], rates, short=bool(suffix))

    def _round(self, server: Running, asks: list[Ask], name: str) -> tuple[Crowd, dict[str, list[float]]]:
        before = server.cpu_s()
        found = run_crowd(server.base_url, asks, clients=self.clients, timeout_s=self.round_s, mark=MARK)
        cpu = {
            role: sorted((round(after - before[role].get(pid, 0.0), 2) for pid, after in each.items()), reverse=True)
            for role, each in server.cpu_s().items()
        }
        told = {key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(found).items()}
        tell(bench=name, shape=self.shape, cpu_s=cpu, **told)
        return found, cpu

    def _tell(self, name: str, told: tuple[Crowd, dict[str, list[float]]], rates: list[int], *, short: bool) -> None:
        """Print a round. `short`: only figures that depend on the HTTP processes. `rates`: those of all rounds."""
        found, cpu = told
        if not found.tokens:
            raise SystemExit(f"{name}: no stream was answered: {found.first_error[:300]}")
        figure(self.shape, name, round(found.tokens_per_s), "tok/s", longest=self.longest, runs=rates)
        times = {"first token p50": found.ttft_p50_s, "first token p99": found.ttft_p99_s,
                 "token gap p50": found.itl_p50_s, "token gap p99": found.itl_p99_s,
                 "event gap p99": found.gap_p99_s}  # fmt: skip
        for what in ("first token p99", "token gap p99") if short else times:
            figure(self.shape, f"{name}: {what}", round(times[what] * 1e3, 2), "ms")
        for role, each in cpu.items():
            figure(self.shape, f"{name}: CPU of {role}", round(sum(each), 2), "s", each=each)
        if not short:
            figure(self.shape, f"{name}: tokens an event", round(found.tokens_per_event, 3), "", less=True)
            figure(self.shape, f"{name}: busiest client", round(found.client_busy, 2), "cores", less=True)
        if found.errors or not short:
            figure(self.shape, f"{name}: errors", found.errors, "", less=True, first=found.first_error[:300])


def _caches(folder: Path) -> dict[str, str]:
    """Return the variables that set the folders of compiled kernels, for both servers."""
    names = {"TRITON_CACHE_DIR": "triton", "TOKENMILL_KERNEL_CACHE": "kernels", "VLLM_CACHE_ROOT": "vllm",
             "FLASHINFER_WORKSPACE_BASE": "flashinfer", "TORCHINDUCTOR_CACHE_DIR": "inductor"}  # fmt: skip
    return {variable: str(folder / name) for variable, name in names.items()}


def measure(args: argparse.Namespace) -> None:
    """Measure the time to ready, first without compiled kernels, then the load."""
    load = Load(args)
    command = args.command or (OURS if args.who == "ours" else PEER)
    server = Server(command, args.model, max(load.streams), args.total, args.serve)
    environment = _caches(args.cache) | (PEER_ENVIRONMENT if args.who == "peer" else {})
    cached = args.cache.is_dir() and any(args.cache.rglob("*"))
    workers = [int(n) for n in args.http_workers.split(",")]
    if not cached and args.twice:
        with Turn(args.wait), running(server, workers[0], args.log, args.start, environment) as found:
            figure(args.shape, "ready, kernels not cached", round(found.ready_s, 2), "s")
        cached = True
    for i, number in enumerate(workers):
        with running(server, number, args.log, args.start, environment) as found:
            if not i:
                name = f"ready, kernels{' not' if not cached else ''} cached"
                figure(args.shape, name, round(found.ready_s, 2), "s", workers=number)
            time.sleep(args.settle)
            with Turn(args.wait, alone=True):
                load.measure(found, f", {number} worker{'s' * (number > 1)}" if i else "")


def options() -> argparse.ArgumentParser:
    """Return the parser of this measurement's options."""
    parser = argparse.ArgumentParser(prog="bench.gpu.serving", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--who", choices=("ours", "peer"), default="ours")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--model", type=Path, required=True, help="folder that bench.gpu --checkpoint wrote")
    parser.add_argument("--streams", default="64,256", help="at once")
    parser.add_argument("--longest", type=int, default=1024, help="tokens in and out of a request at most")
    parser.add_argument("--total", type=int, default=4096, help="tokens of a sequence that the server allows")
    parser.add_argument("--http-workers", default="4", help="HTTP processes; each of several is measured, as 4,1,2,8")
    parser.add_argument("--clients", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)))
    parser.add_argument("--repeat", type=int, default=3, help="rounds of each number of streams; the median is told")
    parser.add_argument("--round", type=float, default=90.0, help="seconds of a round at most")
    parser.add_argument("--settle", type=float, default=3.0, help="seconds after ready: servers go on preparing")
    parser.add_argument("--start", type=float, default=300.0, help="seconds to ready at most")
    parser.add_argument("--serve", default="", help="more options of the server, in one string")
    parser.add_argument("--command", default="", help="another command, with the places of bench.gpu.servers.Server")
    parser.add_argument("--cache", type=Path, help="folder of compiled kernels; default: an empty one")
    parser.add_argument("--twice", action=argparse.BooleanOptionalAction, default=True,
                        help="start once more before, if the cache is empty")  # fmt: skip
    parser.add_argument("--log", type=Path, default=Path("server.log"), help="the server's output")
    parser.add_argument("--wait", action="store_true", help="ask for each timed part on standard output")
    return parser


def main(words: list[str] | None = None) -> None:
    args = options().parse_args(words)
    with tempfile.TemporaryDirectory() as empty:
        args.cache = args.cache or Path(empty) / "cache"
        measure(args)


if __name__ == "__main__":
    main()
