"""Run `python -m bench.peers`: measure, print the tables, write the figures as JSON."""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from bench.peers import environments, rows, tables
from bench.peers.servers import LlamaCpp, OpenVino, Server, Tokenmill
from tokenmill.config import default_cache_dir
from tokenmill.host import usable_cpus
from tokenmill.weights import embedded
from tokenmill.weights.source import ModelSource, local_source

ROWS = ("first", "streams", "standard", "mixed", "long", "sampling", "http")
_IDLE_PERCENT = 15.0
_OURS = "tokenmill=tokenmill serve"


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running server is stopped too
    source = _source(options)
    servers, wanted = _servers(options, Path(source.path)), _rows(options)
    record: dict[str, Any] = {**_conditions(options, source), "rows": []}
    for done in range(options.passes):
        for taken in _one_pass(options, source, servers, wanted, done):
            record["rows"].append(taken)
            if options.json:  # after each, so that an interrupted run keeps its results
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(tables.document(record))


def _source(options: argparse.Namespace) -> ModelSource:
    """Return the model that is measured: the given GGUF file, or the embedded one."""
    if options.model is None:
        return embedded.resolve(options.cache_dir, False, lambda _: None)
    if not options.model.is_file():
        raise SystemExit(f"--model {options.model} is no file. Give a GGUF file, which llama.cpp reads too.")
    return local_source(options.model.resolve())


def _one_pass(
    options: argparse.Namespace, source: ModelSource, servers: list[Server], wanted: list[rows.Row], done: int
) -> Iterator[dict[str, Any]]:
    for index, row in enumerate(wanted):
        turn = (done + index) % len(servers)  # no server is always first
        for server in servers[turn:] + servers[:turn]:
            if isinstance(server, Tokenmill) or not row.ours_only:
                yield _measure(row, server, done, 1 + done * 100 + index, options.wait_idle)
    for server in servers if "http" in options.rows else ():
        if isinstance(server, Tokenmill):
            yield _entry("HTTP cost", server.name, done, rows.http_cost(server, source, 50 + done * 100))


def _measure(row: rows.Row, server: Server, done: int, seed: int, wait_s: float) -> dict[str, Any]:
    _wait_until_idle(wait_s)
    with server.start(row.needs) as running:
        if row.settled:
            running.settle()
        figures = row.measure(running, seed)
        figures |= {"start_s": running.start_s, "rss_mb": running.rss_mb()}
    return _entry(row.name, server.name, done, figures)


def _wait_until_idle(wait_s: float) -> None:
    """Wait until the CPUs are idle, for `wait_s` seconds at most."""
    until = time.monotonic() + wait_s
    while time.monotonic() < until and psutil.cpu_percent(0.5) > _IDLE_PERCENT:
        time.sleep(0.5)


def _entry(row: str, server: str, done: int, figures: rows.Figures) -> dict[str, Any]:
    load = psutil.getloadavg()[0]
    plain = {name: round(value, 5) for name, value in figures.items() if math.isfinite(value)}
    print(f"pass {done + 1}: {row}: {server}: {tables.short(plain)}", file=sys.stderr, flush=True)
    return {"row": row, "server": server, "pass": done + 1, "load": load, "figures": plain}


def _servers(options: argparse.Namespace, gguf: Path) -> list[Server]:
    servers: list[Server] = []
    for given in options.server or [_OURS]:
        name, _, command = given.partition("=")
        servers.append(Tokenmill(name, f"{command} --model-id {shlex.quote(str(gguf))}" if options.model else command))
    if "llamacpp" in options.peers:
        environments.interpreter("llamacpp")
        servers += [LlamaCpp(gguf, flash == "on", options.threads) for flash in options.flash]
    if "openvino" in options.peers:
        environments.openvino_model(gguf)
        servers.append(OpenVino(gguf, options.threads))
    return servers


def _rows(options: argparse.Namespace) -> list[rows.Row]:
    wanted: list[rows.Row] = []
    if "first" in options.rows:
        wanted.append(rows.first_row())
    if "streams" in options.rows:
        wanted += rows.stream_rows([int(n) for n in options.streams.split(",")])
    if "standard" in options.rows:
        wanted += rows.standard_rows()
    if "mixed" in options.rows:
        wanted.append(rows.mixed_row())
    if "long" in options.rows:
        wanted += rows.long_rows()
    if "sampling" in options.rows:
        wanted.append(rows.sampling_row())
    return wanted


def _conditions(options: argparse.Namespace, source: ModelSource) -> dict[str, Any]:
    """Return the conditions of the measurement: machine, versions, model."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "bench.peers", *sys.argv[1:]]),
        "cpu": _cpu(),
        "cpus": usable_cpus(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "python": platform.python_version(),
        "model": Path(source.path).name,
        "tokenmill": version("tokenmill"),
        "peers": {name: environments.REQUIREMENTS[name][0] for name in options.peers},
        "servers": options.server or [_OURS],
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    known = [f for f in ("avx2", "avx_vnni", "avx512_vnni", "amx_int8") if f in flags]
    return f"{name or platform.machine()} ({', '.join(known)})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument(
        "--server", action="append", metavar="NAME=COMMAND",
        help="one of ours, several may be given: 'avx2=TOKENMILL_ISA=avx2 tokenmill serve --backend cpu'",
    )  # fmt: skip
    parser.add_argument("--model", type=Path, metavar="FILE.gguf", help="measure it instead of the embedded model")
    parser.add_argument("--peers", nargs="*", default=["llamacpp", "openvino"], choices=["llamacpp", "openvino"])
    parser.add_argument("--flash", nargs="+", default=["off", "on"], choices=["off", "on"], help="llama.cpp's setting")
    parser.add_argument("--rows", nargs="+", default=["first", "streams", "standard"], choices=ROWS)
    parser.add_argument("--streams", default="1,4,16,32")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--wait-idle", type=float, default=20, metavar="S", help="before each measurement, at most")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="of the peers")
    parser.add_argument("--cache-dir", default=default_cache_dir())
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
