"""Start, query and stop the servers of the comparison. A server runs as long as its `with` block."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Awaitable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import psutil
import uvloop

from bench.peers import environments
from bench.settle import settle
from tokenmill.bench.client import Answer, Ask
from tokenmill.bench.load import Disturbed, Report, disturbed, report, run_disturbed, run_round

_HERE = Path(__file__).parent
_READY_S = 180.0


@dataclass(frozen=True, slots=True)
class Needs:
    """Capacity of a server that a row of the table requires."""

    slots: int  # concurrent requests
    context: int  # tokens of each request, prompt and answer


class Running(Protocol):
    """Ready server."""

    start_s: float  # from starting its process to ready

    def round(self, asks: list[Ask]) -> Report:
        """Send all of `asks` at once and report."""

    def disturbed(self, streams: list[Ask], arrivals: list[Ask]) -> Disturbed:
        """As `load.run_disturbed`."""

    def settle(self) -> float:
        """Wait until the server has finished its idle work; return the CPU seconds that it used."""

    def rss_mb(self) -> float:
        """Return the peak resident set, summed over the processes (shared pages count in each)."""


class Server(Protocol):
    """Server that can be started."""

    name: str

    def start(self, needs: Needs) -> contextlib.AbstractContextManager[Running]:
        """Start the server; it is ready when the block begins and stopped when it ends."""


class _Process:
    """Child process and its descendants."""

    def __init__(self, child: subprocess.Popen[str], started: float) -> None:
        self._child = child
        self.start_s = time.perf_counter() - started

    def settle(self) -> float:
        return settle(self._child.pid)

    def rss_mb(self) -> float:
        total = 0.0
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(self._child.pid)
            total = sum(_peak_mb(p.pid) for p in [parent, *parent.children(recursive=True)])
        return total


def _peak_mb(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return 0.0


class Http(_Process):
    """Server with OpenAI's `/v1/completions`."""

    def __init__(self, child: subprocess.Popen[str], started: float, base: str) -> None:
        super().__init__(child, started)
        self.base_url = base

    def round(self, asks: list[Ask]) -> Report:
        """Send all of `asks` at once and report."""
        return _run(run_round(self.base_url, asks))

    def disturbed(self, streams: list[Ask], arrivals: list[Ask]) -> Disturbed:
        """Run the streams, and the arrivals one after another, and report."""
        return _run(run_disturbed(self.base_url, streams, arrivals))


def _run(waited: Awaitable[Any]) -> Any:
    async def main() -> Any:
        return await waited

    return uvloop.run(main())


class Lines(_Process):
    """Child process that answers each JSON line with one."""

    def ask(self, question: object) -> Any:
        """Send a question and return the answer."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(question) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit(f"{self._child.args} ended with exit code {self._child.wait()}")
        return json.loads(line)


class OpenVinoRunning(Lines):
    """OpenVINO's pipeline in its own process, timed there."""

    def round(self, asks: list[Ask]) -> Report:
        """Send all of `asks` at once and report."""
        answers, _ = self._play(asks, [])
        wall = max(a.events[-1] for a in answers) - min(a.sent for a in answers)
        return report(answers, wall)

    def disturbed(self, streams: list[Ask], arrivals: list[Ask]) -> Disturbed:
        """Run the streams, and the arrivals one after another, and report."""
        return disturbed(*self._play(streams, arrivals))

    def token_ids(self, ask: Ask) -> list[int]:
        """Return the tokens of one answer."""
        found = self.ask({"streams": [asdict(ask)], "arrivals": [], "quiet_s": 0})
        return list(found["streams"][0]["token_ids"])

    def _play(self, streams: list[Ask], arrivals: list[Ask]) -> tuple[list[Answer], list[Answer]]:
        found = self.ask(
            {"streams": [asdict(a) for a in streams], "arrivals": [asdict(a) for a in arrivals], "quiet_s": 0.5}
        )
        return [_answer(a) for a in found["streams"]], [_answer(a) for a in found["arrivals"]]


def _answer(found: dict[str, Any]) -> Answer:
    return Answer(
        found["sent"], found["events"], prompt_tokens=found["prompt_tokens"], completion_tokens=len(found["events"])
    )


@contextlib.contextmanager
def _child(command: list[str], variables: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[str], IO]]:
    """Start a process in its own group, yield it and its standard error, and kill the group at the end."""
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, **(variables or {})},
            start_new_session=True,
        )
        try:
            yield child, said
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def _wait_for_line(child: subprocess.Popen[str], said: IO) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("READY"):
            return
    said.seek(0)
    raise SystemExit(f"{child.args} ended with exit code {child.wait()}:\n{said.read()[-3000:]}")


def _wait_for_health(child: subprocess.Popen[str], said: IO, base: str) -> None:
    until = time.perf_counter() + _READY_S
    while time.perf_counter() < until:
        with contextlib.suppress(OSError), urllib.request.urlopen(base + "/health", timeout=1) as answer:
            if answer.status == 200:
                return
        if child.poll() is not None:
            said.seek(0)
            raise SystemExit(f"{child.args} ended with exit code {child.returncode}:\n{said.read()[-3000:]}")
        time.sleep(0.02)
    raise SystemExit(f"{child.args} is not ready after {_READY_S:.0f} s")


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass(frozen=True)
class Tokenmill:
    """This project's server, by a shell-like command: `TOKENMILL_ISA=avx2 tokenmill serve --backend cpu`."""

    name: str
    command: str

    @contextlib.contextmanager
    def start(self, needs: Needs) -> Iterator[Running]:
        """Start the server, with its default size of the KV cache."""
        variables, arguments = split_command(self.command)
        port, started = free_port(), time.perf_counter()
        with _child([*arguments, "--hostname", "127.0.0.1", "--port", str(port)], variables) as (child, said):
            base = f"http://127.0.0.1:{port}"
            _drain(child)
            _wait_for_health(child, said, base)
            yield Http(child, started, base)

    @contextlib.contextmanager
    def in_process(self) -> Iterator[Lines]:
        """Start the same engine with the same options without HTTP: see `tokenmill_worker`."""
        variables, arguments = split_command(self.command)
        options = arguments[arguments.index("serve") + 1 :] if "serve" in arguments else arguments[1:]
        started = time.perf_counter()
        with _child([sys.executable, str(_HERE / "tokenmill_worker.py"), *options], variables) as (child, said):
            _wait_for_line(child, said)
            yield Lines(child, started)


def split_command(command: str) -> tuple[dict[str, str], list[str]]:
    """Split `A=1 program x` into {"A": "1"} and ["program", "x"]; `tokenmill` is that of this environment."""
    words, variables = shlex.split(command), {}
    while words and "=" in words[0] and not words[0].startswith("-"):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    if words[:1] == ["tokenmill"]:
        words[:1] = [sys.executable, "-m", "tokenmill"]
    return variables, words


def _drain(child: subprocess.Popen[str]) -> None:
    """Discard the server's output, so that its pipe does not fill."""
    assert child.stdout is not None
    threading.Thread(target=lambda stream: [None for _ in stream], args=(child.stdout,), daemon=True).start()


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp's HTTP server, with the slots and context that a row requires."""

    gguf: Path
    flash: bool
    threads: int

    @property
    def name(self) -> str:
        """Name in the tables."""
        return f"llama.cpp, flash attention {'on' if self.flash else 'off'}"

    @contextlib.contextmanager
    def start(self, needs: Needs) -> Iterator[Http]:
        """Start the server with one slot per request and no cache between requests."""
        python, port = environments.interpreter("llamacpp"), free_port()
        asked = {"gguf": str(self.gguf), "slots": needs.slots, "context": needs.context, "threads": self.threads,
                 "flash": self.flash, "port": port}  # fmt: skip
        started = time.perf_counter()
        with _child([str(python), str(_HERE / "llamacpp_server.py"), json.dumps(asked)]) as (child, said):
            _wait_for_line(child, said)
            _drain(child)
            yield Http(child, started, f"http://127.0.0.1:{port}")


@dataclass(frozen=True)
class OpenVino:
    """OpenVINO GenAI's continuous batching, in process."""

    gguf: Path
    threads: int
    name: str = "OpenVINO"

    @contextlib.contextmanager
    def start(self, needs: Needs) -> Iterator[OpenVinoRunning]:
        """Load the converted model, with a KV cache of the size that the row requires."""
        python, model = environments.interpreter("openvino"), environments.openvino_model(self.gguf)
        gigabytes = max(1, -(-needs.slots * needs.context * 24 // 1_000_000))
        asked = {"model": str(model), "cache_gb": gigabytes, "threads": self.threads}
        started = time.perf_counter()
        with _child([str(python), str(_HERE / "openvino_worker.py"), json.dumps(asked)]) as (child, said):
            _wait_for_line(child, said)
            yield OpenVinoRunning(child, started)
