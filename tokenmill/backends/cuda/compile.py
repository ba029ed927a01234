"""Compilation of Triton's kernels by several processes before the first step, and a watch for late ones.

Triton compiles kernels one after another, each at its first launch: half a minute for a model whose kernels are not in
the cache on disk. Therefore the warm-up first runs without launching anything: a hook of Triton records each kernel and
skips its launch. Helper processes, started while weights are read, compile the recorded kernels into the cache, from
which the first real launch loads them. A marker file beside the cache records that the kernels of such a start are
compiled, and the next one like it skips all of this.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenmill.backends import sampling
from tokenmill.backends.cuda.compiler import MOST_BYTES

_MOST_HELPERS = 16
_PATIENCE_S = 120.0  # for one kernel
_log = logging.getLogger(__name__)

Report = Callable[[int, int], None]
"""Called with the numbers of kernels compiled and recorded so far."""


class Kernels:
    """The kernels of one backend. `about`: the values that, besides the sources, select them.

    `folder`: for the cache; "": Triton's own. The folder that Triton's environment variable names has precedence.
    `jobs`: number of compiling processes. With fewer than two, or with a Triton without such hooks, a kernel is
    compiled at its first launch.
    """

    def __init__(self, folder: str, jobs: int, about: Iterable[object]) -> None:
        self._hooks = _hooks()
        self._helpers: _Helpers | None = None
        self._watching: Callable[..., None] | None = None
        self._note: Path | None = None
        if self._hooks is None:
            return
        cache = _use(folder)
        self._note = cache / "tokenmill" / _digest(about)
        if jobs > 1 and not self._note.is_file():
            self._helpers = _Helpers(min(jobs, _MOST_HELPERS), cache)

    def prepare(self, run: Callable[[], object], report: Report | None = None) -> None:
        """Compile the kernels that `run` launches, without launching them. Its other effects take place."""
        helpers, self._helpers = self._helpers, None
        if helpers is None:
            return
        start, noted = time.perf_counter(), set[str]()

        def note(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
            data = compile["specialization_data"]
            if data not in noted:
                noted.add(data)
                helpers.send(fn.module, fn.name, data)
            return True

        with helpers:
            try:
                with self._hooked(note):
                    run()
            except (AttributeError, KeyError, TypeError) as error:  # Hooks are not a stable part of Triton.
                _log.warning("Kernels are compiled one after another, for Triton's hook failed: %s", error)
                return
            failures = helpers.wait(report)
        for name, why in failures:
            _log.warning("Kernel %s could not be compiled beforehand: %s", name, why)
        _log.info("%d kernels were compiled in %.1f s.", len(noted) - len(failures), time.perf_counter() - start)

    def watch(self) -> None:
        """Write the marker that all kernels are compiled, and log a warning for each one compiled from now on."""
        if self._hooks is None or self._note is None:
            return
        with contextlib.suppress(OSError):  # Triton has logged why the folder is not writable.
            self._note.parent.mkdir(parents=True, exist_ok=True)
            self._note.touch()
        seen = set[str]()

        def tell(*, fn: Any, repr: str, **_: object) -> None:
            if fn.name not in seen:
                seen.add(fn.name)
                _log.warning("A step waits for a kernel that was not made ready before, please report it: %s", repr)

        self._watching = self._hooks.jit_cache_hook = tell

    def close(self) -> None:
        """End the helpers and the watch. Idempotent."""
        if self._helpers is not None:
            self._helpers.close()
            self._helpers = None
        if self._hooks is not None and self._watching is not None and self._hooks.jit_cache_hook is self._watching:
            self._hooks.jit_cache_hook = None

    @contextlib.contextmanager
    def _hooked(self, hook: Callable[..., object]) -> Iterator[None]:
        assert self._hooks is not None
        before, self._hooks.jit_cache_hook = self._hooks.jit_cache_hook, hook
        try:
            yield
        finally:
            self._hooks.jit_cache_hook = before


class _Helpers:
    """Compiling processes, which take jobs from one socket."""

    def __init__(self, count: int, cache: Path) -> None:
        target = _target()
        words = [str(cache), json.dumps([target.backend, target.arch, target.warp_size])]
        self._sent = 0
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_PATIENCE_S)
        with theirs:
            self._processes = [_start(words, theirs) for _ in range(count)]

    def send(self, module: str, name: str, data: str) -> None:
        """Queue a kernel for compilation. Blocks only while the queue is full."""
        with contextlib.suppress(OSError):  # The helpers are dead or hang, which `wait` reports.
            self._socket.send(json.dumps({"module": module, "name": name, "data": data}).encode())
        self._sent += 1

    def wait(self, report: Report | None) -> list[tuple[str, str]]:
        """Block until all kernels are compiled, and return the names of those that failed, with the reasons."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        failures: list[tuple[str, str]] = []
        for done in range(self._sent):
            if report is not None:
                report(done, self._sent)
            try:
                packet = self._socket.recv(MOST_BYTES)
            except OSError as error:
                packet, why = b"", str(error)
            else:
                why = "the helpers have ended"
            if not packet:
                return [*failures, *[("", why)] * (self._sent - done)]
            answer = json.loads(packet)
            if answer["error"]:
                failures.append((answer["name"], answer["error"]))
        return failures

    def close(self) -> None:
        """End the processes. Idempotent."""
        self._socket.close()
        for process in self._processes:
            process.kill()
            process.wait()

    def __enter__(self) -> _Helpers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _start(words: list[str], jobs: socket.socket) -> subprocess.Popen[bytes]:
    """Start a helper with the module search path of this process."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from tokenmill.backends.cuda.compiler import main; main({words!r})"
    null = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-c", code], stdin=jobs.fileno(), stdout=null, stderr=null)


def _hooks() -> Any:
    """Return Triton's namespace of hooks; None if this version has none, or if kernels are interpreted."""
    import triton

    runtime = getattr(getattr(triton, "knobs", None), "runtime", None)
    usable = hasattr(runtime, "jit_cache_hook") and not getattr(runtime, "interpret", True)
    return runtime if usable and hasattr(triton.JITFunction, "preload") else None


def _use(folder: str) -> Path:
    """Set Triton's cache to a subfolder of `folder`, unless the environment sets it, and return the cache's path."""
    import triton

    cache = triton.knobs.cache
    own = cache.get_triton_dir("cache")
    if folder and str(cache.dir) == own:
        wanted = Path(folder) / "triton"
        try:
            wanted.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=wanted):
                cache.dir = str(wanted)
        except OSError as error:
            _log.warning("%s cannot be written to (%s): compiled kernels are kept in %s.", wanted, error.strerror, own)
    return Path(cache.dir)


def _target() -> Any:
    """Return the kind of GPU that kernels are compiled for."""
    from triton.runtime import driver

    return driver.active.get_current_target()


def _digest(about: Iterable[object]) -> str:
    """Return a digest of everything that decides which kernels a start needs."""
    import torch
    import triton

    digest = hashlib.blake2b(digest_size=16)
    for path in (*sorted(Path(__file__).parent.rglob("*.py")), Path(sampling.__file__)):  # The columns of parameters.
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for item in (triton.__version__, torch.__version__, _target(), sys.version, *about):
        digest.update(repr(item).encode() + b"\0")
    return digest.hexdigest()
