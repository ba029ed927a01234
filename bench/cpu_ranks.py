"""Compare ranks of one thread with one rank of as many threads on this CPU: `python -m bench.cpu_ranks [--ranks 2]`.

Both engines are loaded at once and take turns, so that other work on the machine meets both alike. Figures are medians:
time of a decode step by streams, and of a prompt. CPU s: seconds of all threads of an engine, which other processes
disturb less. SmolLM2's 9 heads do not divide, so ranks compute padding; --model takes other models.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from tokenmill import fetch
from tokenmill.backends.kind import BackendOptions
from tokenmill.config import Settings
from tokenmill.host import usable_cpus
from tokenmill.parallel.group import Group
from tokenmill.runtime.assembly import EngineOptions, assemble
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.wire.messages import SamplingParams, StoppingParams

_DECODED = 24  # tokens of each stream in a turn
_PROMPT = 8  # tokens of a stream's prompt


def main() -> None:
    """Measure and print a table."""
    options = _options()
    if options.rank is not None:
        _serve(options)
        return
    loads = [("decode", int(n)) for n in options.streams.split(",")] + [("prompt", options.prompt)]
    one, many = f"1 rank × {options.ranks} threads", f"{options.ranks} ranks × 1 thread"
    with tempfile.TemporaryDirectory(prefix="tokenmill-bench-") as folder:
        engines = {one: _Engine(options, folder, 1), many: _Engine(options, folder, options.ranks)}
        found: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
        for turn in range(-1, options.turns):
            for load in loads:
                for name in list(engines)[:: 1 if turn % 2 else -1]:
                    measured = engines[name].measure(*load)
                    if turn >= 0:  # the first turn only warms up
                        found.setdefault((name, *load), []).append(measured)
        for engine in engines.values():
            engine.close()
    print(f"{options.model or 'SmolLM2-135M-Instruct'}, {usable_cpus()} CPUs, medians of {options.turns} turns")
    for what, size in loads:
        (a, a_cpu), (b, b_cpu) = (_medians(found[name, what, size]) for name in (one, many))
        label = f"{what}, {size} {'streams, ms a step' if what == 'decode' else 'tokens, ms'}"
        print(f"{label:32}{one} {a:8.2f}   {many} {b:8.2f}   ratio {b / a:.3f}   CPU {b_cpu / a_cpu:.3f}")


def _medians(measured: list[tuple[float, float]]) -> tuple[float, float]:
    return median(wall for wall, _ in measured) * 1e3, median(cpu for _, cpu in measured) * 1e3


class _Engine:
    """The processes of an engine: its ranks, of which each is asked for the same."""

    def __init__(self, options: argparse.Namespace, folder: str, ranks: int) -> None:
        threads = options.ranks // ranks
        command = [sys.executable, "-m", "bench.cpu_ranks", "--ranks", str(ranks), "--threads", str(threads)]
        command += ["--address", f"{folder}/{ranks}.sock", "--model", options.model]
        self._ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for rank in range(ranks)
        ]
        for rank in self._ranks:
            self._answer(rank)

    def measure(self, what: str, size: int) -> tuple[float, float]:
        """Return the seconds of a step or a prompt, and those of all its threads on their CPUs."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps([what, size]) + "\n")
            rank.stdin.flush()
        answers = [self._answer(rank) for rank in self._ranks]
        return max(wall for wall, _ in answers), sum(cpu for _, cpu in answers)

    def _answer(self, rank: subprocess.Popen[str]) -> Any:
        assert rank.stdout is not None
        if not (line := rank.stdout.readline()):
            sys.exit("A rank has ended; its message is above.")
        return json.loads(line)

    def close(self) -> None:
        """End the processes."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.close()
        for rank in self._ranks:
            rank.wait()


def _serve(options: argparse.Namespace) -> None:
    """Run one rank: answer each line of stdin with a line of seconds."""
    settings = Settings.from_args(["--model-id", options.model] if options.model else [], prog="bench")
    source = fetch.fetch(settings, lambda progress: None)
    group = Group.connect(options.rank, options.ranks, options.address)
    backend = BackendOptions(backend="cpu", device="cpu", cpu_threads=options.threads, cpus=usable_cpus())
    wanted = EngineOptions(backend=backend, max_total_tokens=2048, max_batch_tokens=512, max_batch_size=32)
    with OfflineEngine(assemble(source, wanted, group, lambda progress: None)) as engine:
        print(json.dumps([0, 0]), flush=True)
        for turn, line in enumerate(sys.stdin):
            what, size = json.loads(line)
            group.exchange()
            print(json.dumps(_measured(engine, what, size, turn)), flush=True)
    group.close()


def _measured(engine: OfflineEngine, what: str, size: int, turn: int) -> tuple[float, float]:
    """Return seconds of a decode step or of a prompt. `turn`: makes prompts new, so that none is cached."""
    count, length = (1, size) if what == "prompt" else (size, _PROMPT)
    prompts = [[(turn * 977 + i * 131 + j * 7) % 30_000 + 10 for j in range(length)] for i in range(count)]
    stopping = StoppingParams(1 if what == "prompt" else _DECODED)
    began, cpu = time.perf_counter(), _cpu_seconds()
    engine.generate(prompts, SamplingParams(), stopping)
    steps = 1 if what == "prompt" else _DECODED
    return (time.perf_counter() - began) / steps, (_cpu_seconds() - cpu) / steps


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ranks of one thread beside one rank of as many threads.")
    parser.add_argument("--model", default="", help="model id or path; default: the embedded one")
    parser.add_argument("--ranks", type=int, default=2, help="ranks, and threads of the one beside them")
    parser.add_argument("--turns", type=int, default=9, help="measurements of each load")
    parser.add_argument("--streams", default="1,16", help="streams that decode")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    for name, kind in (("--rank", int), ("--threads", int), ("--address", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.address = os.fspath(options.address) if options.address else ""
    return options


if __name__ == "__main__":
    main()
