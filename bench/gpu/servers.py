"""Start servers for measurements over HTTP, wait until they are ready, and measure their CPU time."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_POLL_S = 0.02
_STOP_S = 20.0

OURS = (
    "{python} -m tokenmill serve --model-id {model} --hostname 127.0.0.1 --port {port} --http-workers {workers} "
    "--max-batch-size {streams} --max-concurrent-requests {room} --max-total-tokens {total} --log-level info {more}"
)
PEER = (
    "{python} -m vllm.entrypoints.cli.main serve {model} --host 127.0.0.1 --port {port} --served-model-name tgi "
    "--dtype bfloat16 --no-enable-prefix-caching --max-model-len {total} --max-num-seqs {streams} "
    "--gpu-memory-utilization 0.85 --disable-uvicorn-access-log --api-server-count {workers} {more}"
)
PEER_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false", "FLASHINFER_DISABLE_VERSION_CHECK": "1", "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
}  # fmt: skip
"""Variables of vLLM on a Hopper machine without a network"""


@dataclass(frozen=True, slots=True)
class Server:
    """Command with the placeholders {python}, {model}, {port}, {workers}, {streams}, {room}, {total}, {more}."""

    command: str
    model: Path
    streams: int = 256
    total: int = 4096  # tokens of a sequence
    more: str = ""  # further options

    def words(self, port: int, workers: int) -> list[str]:
        """Return the command line."""
        places = {
            "python": sys.executable, "model": self.model, "port": port, "workers": workers, "streams": self.streams,
            "room": 2 * self.streams, "total": self.total, "more": self.more,
        }  # fmt: skip
        return [part for word in self.command.split() for part in word.format(**places).split()]


@dataclass(frozen=True, slots=True)
class Running:
    """Ready server. `ready_s`: seconds from the start of its process to the first 200 of /health."""

    base_url: str
    ready_s: float
    pid: int

    def cpu_s(self) -> dict[str, dict[int, float]]:
        """Return the CPU seconds of its processes so far: {"engine": {process id: seconds}, "HTTP": {…}}."""
        found: dict[str, dict[int, float]] = {"engine": {}, "HTTP": {}}
        root = psutil.Process(self.pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                words = f"{process.name()} {' '.join(process.cmdline())}"
                role = "engine" if "runtime.worker" in words or "EngineCore" in words else "HTTP"
                times = process.cpu_times()
                found[role][process.pid] = times.user + times.system
        return found


@contextlib.contextmanager
def running(
    server: Server, workers: int, log: Path, timeout_s: float, environment: dict[str, str]
) -> Iterator[Running]:
    """Start a server, yield it once it is ready, and stop it. SystemExit with its last log line if it fails."""
    port = _free_port()
    with open(log, "ab") as out:
        start = time.perf_counter()
        process = subprocess.Popen(server.words(port, workers), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                   env=os.environ | environment)  # fmt: skip
        try:
            ready_s = _wait(process, port, start, timeout_s, log)
            yield Running(f"http://127.0.0.1:{port}", ready_s, process.pid)
        finally:
            _stop(process)


def last_line(log: Path) -> str:
    """Return the last error in a log, else the last line that is not empty."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()[-200:] if line.strip()]
    telling = [line for line in lines if "Error" in line or "error:" in line]
    return (telling or lines or ["nothing in the log"])[-1][:300]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], port: int, start: float, timeout_s: float, log: Path) -> float:
    while time.perf_counter() - start < timeout_s:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return time.perf_counter() - start
        connection.close()
        if process.poll() is not None:
            raise SystemExit(f"the server ended with exit code {process.returncode}: {last_line(log)}")
        time.sleep(_POLL_S)
    raise SystemExit(f"the server is not ready after {timeout_s:.0f} s: {last_line(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and its descendants."""
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(children, timeout=5)
    if process.poll() is None:
        process.kill()
        process.wait()
