"""A process that compiles Triton's kernels into its cache on disk. It needs no GPU.

    python -m tokenmill.backends.cuda.compiler FOLDER TARGET

Its standard input is a socket of packets, which several such processes may share: each takes the next job and answers
with another packet. It ends when the other side closes. See `compile.py`.
"""

from __future__ import annotations

import importlib
import json
import socket
import sys
from collections.abc import Callable
from typing import Any

MOST_BYTES = 1 << 20  # of a packet


class _NoDevice:
    """A stand-in for Triton's driver that has a target but no device."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        """Return the target of compilation."""
        return self._target

    def get_current_device(self) -> int:
        """Return 0; nothing is launched."""
        return 0


def compile_one(job: dict[str, str], make_launcher: Callable[[Any, Any], object]) -> str:
    """Compile a kernel and its launcher unless they are cached. Return the reason of a failure, or "".

    `job`: `module` and `name` of the function, `data` of Triton's hook.
    """
    try:
        kernel = getattr(importlib.import_module(job["module"]), job["name"]).preload(job["data"])
        make_launcher(kernel.src, kernel.metadata)
    except Exception as error:  # noqa: BLE001  A compiler may raise anything. The engine then compiles this kernel.
        return f"{type(error).__name__}: {error}"
    return ""


def _launcher_of(target: Any) -> Callable[[Any, Any], object]:
    """Return the class that compiles a kernel's launcher from C; None where Triton has launchers ready."""
    from triton.backends import backends

    (backend,) = [each for each in backends.values() if each.compiler.supports_target(target)]
    driver = importlib.import_module(backend.driver.__module__)
    return getattr(driver, "CudaLauncher", lambda source, metadata: None)


def main(words: list[str]) -> None:
    """Compile jobs from the socket until the other side closes it."""
    folder, target = words
    import triton
    from triton.backends.compiler import GPUTarget

    triton.knobs.cache.dir = folder
    device = GPUTarget(*json.loads(target))
    triton.runtime.driver.set_active(_NoDevice(device))
    make_launcher = _launcher_of(device)
    with socket.socket(fileno=sys.stdin.fileno()) as jobs:
        while packet := jobs.recv(MOST_BYTES):
            job = json.loads(packet)
            jobs.send(json.dumps({"name": job["name"], "error": compile_one(job, make_launcher)}).encode()[:MOST_BYTES])


if __name__ == "__main__":
    main(sys.argv[1:])
