"""Run a plan of measurements within a time limit: `python -m bench.gpu --parts offline-8b,http-8b,peer-8b …`.

    tests                    the CUDA backend's tests
    offline-SHAPE            decode, prefill, crowds; (b), (c), (a)
    long-SHAPE               a long prompt while streams decode; (d)
    http-SHAPE               the server: seconds to ready, many streams
    variants-SHAPE           offline again with the backend options of --variant
    peer-SHAPE, peer-long-SHAPE, peer-http-SHAPE       the same for vLLM, whose packages are in --peer FOLDER

Parts run in their order. With two cards, the peer's parts run on the second one, in parallel with ours; HTTP
measurements have the host to themselves. Lines are written to gpu.jsonl in $OUT (or --out) at once, with logs next to
it; --table FILE prints its table again. Checkpoints and caches of compiled kernels stay in --work for the next run;
http-SHAPE begins with an empty cache.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.gpu.machine import machine, visible
from bench.gpu.runner import Part, Record, Runner
from bench.gpu.shapes import SHAPES
from bench.gpu.table import read, table

LIMITS = {
    "tests": 240, "offline-8b": 240, "offline-1b": 150, "long": 120, "http-8b": 200, "http-1b": 150, "variants": 150,
    "peer-8b": 320, "peer-1b": 170, "peer-long": 320, "peer-http-8b": 300, "peer-http-1b": 170,
}  # fmt: skip
"""Part's name or prefix of it -> time limit in seconds, without the time of waiting for the host"""
VARIANTS = ("fp8=--kv-cache-dtype fp8_e4m3fn", "deterministic=--deterministic")
_END_S = 8.0  # time reserved for the table
_ROOT = Path(__file__).resolve().parents[2]


class Plan:
    """Plan: from names of parts to processes."""

    def __init__(self, args: argparse.Namespace, folder: Path, empty: Path) -> None:
        """`folder`: for logs. `empty`: for caches that are empty at the start of this run."""
        self.args, self.folder, self.empty = args, folder, empty
        self.kept = args.work / "peer-cache"
        self.limits = LIMITS | {name: float(s) for name, _, s in (one.partition("=") for one in args.limit)}
        inherited = [str(_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self.ours = {"PYTHONPATH": os.pathsep.join(inherited), "TRITON_CACHE_DIR": str(args.work / "triton")}
        peer = [str(path) for path in (args.peer, args.peer / "fi") if path.is_dir()] if args.peer else []
        cache = self.kept
        self.peer = {
            "PYTHONPATH": os.pathsep.join([*peer, *inherited]), "VLLM_CACHE_ROOT": str(cache / "vllm"),
            "FLASHINFER_WORKSPACE_BASE": str(cache / "flashinfer"), "TRITON_CACHE_DIR": str(cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "MAX_JOBS": str(min(16, os.cpu_count() or 1)),
        }  # fmt: skip

    def parts(self) -> list[Part]:
        """Return all parts in order. Raises SystemExit for an unknown name."""
        found: list[Part] = []
        for name in filter(None, self.args.parts.split(",")):
            kind, _, shape = name.rpartition("-")
            if name == "tests":
                found.append(self._part(name, "", [sys.executable, "-m", "bench.gpu.checks", *self._tests()]))
            elif shape not in SHAPES or kind not in self._kinds():
                known = ", ".join(f"{kind}-SHAPE" for kind in self._kinds())
                raise SystemExit(f"there is no part {name!r}; known: tests, {known}; shapes: {', '.join(SHAPES)}")
            else:
                found += self._kinds()[kind](name, shape)
        return found

    def model(self, shape: str) -> Path:
        """Return the folder of a shape's checkpoint."""
        return Path(self.args.checkpoint or self.args.work / "checkpoints") / shape

    def checkpoints(self, parts: list[Part]) -> list[Part]:
        """Return the parts that write the checkpoints which `parts` need."""
        shapes = dict.fromkeys(part.shape for part in parts if part.needs)
        return [
            Part(name=f"checkpoint-{shape}", who="files", shape=shape, limit_s=200, environment=self.ours,
                 command=[sys.executable, "-m", "bench.gpu.checkpoint", "--shape", shape, "--checkpoint",
                          str(self.model(shape))])
            for shape in shapes
        ]  # fmt: skip

    def _tests(self) -> list[str]:
        return self.args.tests.split() or [str(path) for path in sorted(_ROOT.glob("tests/test_cuda*.py"))]

    def _kinds(self) -> dict[str, Any]:
        return {
            "offline": lambda name, shape: [self._offline(name, shape, "b,c,a", self.args.offline)],
            "long": lambda name, shape: [self._offline(name, shape, "d", self.args.offline)],
            "variants": self._variants,
            "http": lambda name, shape: [self._http(name, shape)],
            "peer": lambda name, shape: [self._peer(name, shape, "b,c,a")],
            "peer-long": lambda name, shape: [self._peer(name, shape, "d")],
            "peer-http": lambda name, shape: [self._peer_http(name, shape)],
        }

    def _part(self, name: str, shape: str, command: list[str], **more: Any) -> Part:
        begins = (name, name.partition(":")[0], name.partition(":")[0].rpartition("-")[0])
        limit = next((self.limits[key] for key in begins if key in self.limits), 200.0)
        who, environment = ("peer", self.peer) if name.startswith("peer") else ("ours", self.ours)
        return Part(name=name, who=who, shape=shape, command=command, limit_s=limit, environment=environment, **more)

    def _workload(self) -> list[str]:
        args = self.args
        return ["--streams", args.streams, "--longest", str(args.longest), "--repeat", str(args.repeat), "--wait"]

    def _offline(self, name: str, shape: str, only: str, more: str, variant: str = "") -> Part:
        command = [sys.executable, "-m", "bench.gpu.offline", "--shape", shape, "--only", only, *self._workload()]
        return self._part(name, shape, [*command, "--decode-repeat", "3", *more.split()], variant=variant)

    def _variants(self, name: str, shape: str) -> list[Part]:
        found = []
        for one in self.args.variant or VARIANTS:
            label, _, words = one.partition("=")
            more = f"--batches {self.args.variant_batches} {self.args.offline} {words}"
            found.append(self._offline(f"{name}:{label}", shape, "b,c,a", more, label))
        return found

    def _http(self, name: str, shape: str) -> Part:
        words = ["--who", "ours", "--http-workers", self.args.http_workers, "--cache", str(self.empty / name)]
        return self._serving(name, shape, [*words, f"--serve={self.args.serve}"])

    def _peer_http(self, name: str, shape: str) -> Part:
        words = ["--who", "peer", "--http-workers", self.args.peer_workers, "--cache", str(self.kept), "--no-twice"]
        return self._serving(
            name, shape, [*words, f"--serve={self.args.peer_serve}", f"--command={self.args.peer_command}"]
        )

    def _serving(self, name: str, shape: str, words: list[str]) -> Part:
        command = [
            sys.executable, "-m", "bench.gpu.serving", "--shape", shape, "--model", str(self.model(shape)),
            "--log", str(self.folder / f"{name}-server.log"), *words, *self._workload(),
            *(["--clients", str(self.args.clients)] if self.args.clients else []),
        ]  # fmt: skip
        part = self._part(name, shape, command, needs=f"checkpoint-{shape}")
        more = words[words.index("--http-workers") + 1].count(",")  # number of servers after the first
        return replace(part, limit_s=part.limit_s * (1 + 0.4 * more))

    def _peer(self, name: str, shape: str, only: str) -> Part:
        command = [sys.executable, "-m", self.args.peer_module, "--shape", shape, "--only", only, *self._workload()]
        return self._part(name, shape, command)


def run(plan: Plan, record: Record, until: float) -> None:
    """Run all parts; ours and the peer's in parallel if there are two cards."""
    parts, cards = plan.parts(), visible()
    record.add(machine=machine(), parts=[part.name for part in parts])
    runner = Runner(record, plan.folder, until - _END_S)
    first, second = [*cards, "", ""][:2]
    lanes = [(plan.checkpoints(parts), "")]
    if second:
        lanes += [([part for part in parts if part.who == who], card)
                  for who, card in (("ours", first), ("peer", second))]  # fmt: skip
    else:
        lanes.append((parts, first))
    threads = [threading.Thread(target=runner.lane, args=lane) for lane in lanes]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        runner.stopped.set()
        for thread in threads:
            thread.join()


def options() -> argparse.ArgumentParser:
    """Return the parser of a plan's options."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--parts", default="", help="names with commas between")
    parser.add_argument("--table", type=Path, help="print the table of such a file, measure nothing")
    parser.add_argument("--out", type=Path, help="folder of gpu.jsonl and logs; default: $OUT, else a new one")
    parser.add_argument("--time", type=float, default=530.0, help="seconds of the whole run")
    parser.add_argument("--limit", action="append", default=[], help="PART=SECONDS, in place of its limit; repeatable")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tokenmill-bench",
                        help="folder of what is large and kept for the next run")  # fmt: skip
    parser.add_argument("--checkpoint", help="folder of checkpoints; default: one in --work")
    parser.add_argument("--peer", type=Path, help="folder with vLLM's packages; its folder fi is used, too")
    parser.add_argument("--streams", default="64,256", help="requests of a crowd, and streams at once over HTTP")
    parser.add_argument("--longest", type=int, default=1024, help="tokens in and out of their requests at most")
    parser.add_argument("--repeat", type=int, default=3, help="rounds of each crowd; the median is told")
    parser.add_argument("--http-workers", default="4", help="HTTP processes of this server; all of 4,1,2,8")
    parser.add_argument("--peer-workers", default="1", help="the same of the peer")
    parser.add_argument("--clients", type=int, default=0, help="client processes; 0: by the number of cores")
    parser.add_argument("--offline", default="", help="more options of bench.gpu.offline, in one string")
    parser.add_argument("--serve", default="", help="more options of this server, in one string")
    parser.add_argument("--peer-serve", default="", help="more options of the peer's server, in one string")
    parser.add_argument("--peer-command", default="", help="another server in its place: its command")
    parser.add_argument("--peer-module", default="bench.gpu.peer", help="another program in place of the peer's")
    parser.add_argument("--variant", action="append", help=f"NAME=OPTIONS, repeatable; default: {', '.join(VARIANTS)}")
    parser.add_argument("--variant-batches", default="1,64,256")
    parser.add_argument("--tests", default="", help="files and options for pytest; default: the CUDA backend's")
    return parser


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the signal may be sent twice
    raise KeyboardInterrupt


def main(words: list[str] | None = None) -> None:
    until = time.monotonic()
    args = options().parse_args(words)
    if args.table:
        print(table(read(args.table)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work, ignore_cleanup_errors=True) as scratch:
        folder = Path(args.out or os.environ.get("OUT") or Path(scratch) / "out")
        folder.mkdir(parents=True, exist_ok=True)
        record = Record(folder / "gpu.jsonl")
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            run(Plan(args, folder, Path(scratch)), record, until + args.time)
        except KeyboardInterrupt:
            record.add(part="plan", failed="interrupted")
        print(table(record.lines), flush=True)


if __name__ == "__main__":
    main()
