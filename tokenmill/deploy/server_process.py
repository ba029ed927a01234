"""The server of a replica: starts `tokenmill serve` as a child process, watches it, stops it."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from tokenmill.errors import StartError
from tokenmill.listening import listen

HAS_ENDED = "The server of this replica has ended: "
_LAST_LINES = 20
_POLL_S = 0.1


class ServerProcess:
    """A running `tokenmill serve` on a port of its own.

    It is killed when the thread that made this object ends, so that no server outlives its replica.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], host: str = "127.0.0.1") -> None:
        """Start the server. `words`: its options without address; `environment`: of the process, complete."""
        with listen(host, 0) as probe:
            self.port: int = probe.getsockname()[1]
        self.host = host
        self._lines: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tokenmill.parent", str(os.getpid()), "tokenmill", "serve",
             f"--hostname={host}", f"--port={self.port}", *words],
            env=dict(environment), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
        threading.Thread(target=self._copy_stderr, name="server's stderr", daemon=True).start()

    @property
    def running(self) -> bool:
        """True until the process has ended."""
        return self._process.poll() is None

    def how_it_ended(self) -> str:
        """Return the error that the server has printed last, or its exit code."""
        errors = [line for line in self._lines if line.startswith("Error: ")]
        return errors[-1] if errors else f"exit code {self._process.poll()}"

    def check(self) -> None:
        """Raise StartError if the process has ended."""
        if not self.running:
            raise StartError(HAS_ENDED + self.how_it_ended())

    async def stop(self, timeout_s: float) -> None:
        """Let running requests finish, for `timeout_s` seconds at most, and end the process. Idempotent."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while self.running and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        self.kill()

    def kill(self) -> None:
        """End the process and all its children at once: they end with it. Idempotent."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()

    def _copy_stderr(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line.rstrip("\n"))
            sys.stderr.write(line)
