"""`tokenmill doctor`: what would be served here, by which backend and kernels, and what is in the way.

Takes the options of `serve` and looks at each thing that a start depends on, without starting anything: a finding each,
so that one that is bad hides none of the others.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

import tokenmill
from tokenmill.config import Settings, memory_bytes
from tokenmill.errors import StartError
from tokenmill.extras import has_torch
from tokenmill.operate.env import cpu_name

Verdict = Literal["ok", "note", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `bad`: a server with these options cannot start."""

    name: str
    verdict: Verdict
    text: str
    details: tuple[str, ...] = ()


def main(words: Sequence[str]) -> int:
    """Print the findings; 1 if one is bad."""
    settings = Settings.from_args(words, prog="tokenmill doctor")
    print(f"tokenmill {tokenmill.__version__}, Python {sys.version.split()[0]}")
    bad = 0
    for finding in examine(settings):
        print(f"{finding.verdict.ljust(5)} {finding.name.ljust(13)} {finding.text}", flush=True)
        for line in finding.details:
            print(f"{'':21}{line}")
        bad += finding.verdict == "bad"
    return 1 if bad else 0


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at everything, cheap things first. Reads of a model its headers only."""
    for name, look in _LOOKS.items():
        try:
            yield look(settings)
        except StartError as error:
            yield Finding(name, "bad", str(error))


def _processor(settings: Settings) -> Finding:
    from tokenmill.backends.cpu.isa import available, detect

    if settings.backend == "torch":
        return Finding("processor", "ok", cpu_name())
    isa = detect(settings.cpu_isa)
    others = ", ".join(other.name for other in available() if other != isa)
    forced = ", forced by TOKENMILL_ISA" if settings.cpu_isa else ""
    return Finding("processor", "ok", f"{cpu_name()}: {isa.name}{forced}{f'; also {others}' if others else ''}")


def _memory(settings: Settings) -> Finding:
    from tokenmill.runtime.memory import available_bytes, size

    limit = memory_bytes(settings.memory_limit)
    allowed = f"; at most {size(limit)} are used" if limit is not None else ""
    return Finding("memory", "ok", f"{size(available_bytes())} free of {size(psutil.virtual_memory().total)}{allowed}")


def _kernel_cache(settings: Settings) -> Finding:
    folder = Path(settings.kernel_cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Finding("kernel cache", "ok", str(folder))
    except OSError as error:
        return Finding(
            "kernel cache", "note",
            f"{folder} cannot be written to ({error.strerror}): kernels are compiled at every start. Name another "
            "folder with --kernel-cache.",
        )  # fmt: skip


def _torch(settings: Settings) -> Finding:
    if has_torch():
        return Finding("torch", "ok", f"{importlib.metadata.version('torch')}")
    return Finding("torch", "ok", "not installed; needed only where the CPU engine lacks a kernel (`make torch`)")


def _port(settings: Settings) -> Finding:
    from tokenmill.launcher import listen

    try:
        listen(settings.hostname, settings.port).close()
    except StartError as error:
        return Finding("port", "note", str(error))  # perhaps it is the server that is asked about
    return Finding("port", "ok", f"{settings.hostname}:{settings.port} is free")


_LOOKS: dict[str, Callable[[Settings], Finding]] = {
    "processor": _processor,
    "memory": _memory,
    "kernel cache": _kernel_cache,
    "torch": _torch,
    "port": _port,
}
