"""`tokenmill doctor`: report the model, backend and kernels that would serve here, and the problems that prevent it.

Takes the options of `serve` and checks everything that a start depends on, without starting anything. Each check has
its own finding, so that one problem does not hide another.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import psutil

import tokenmill
from tokenmill import fetch
from tokenmill.amounts import memory_bytes
from tokenmill.backends.accounts import forms_of_weights, stored_dtype
from tokenmill.backends.kind import BackendOptions
from tokenmill.config import Settings
from tokenmill.errors import DownloadError, StartError
from tokenmill.extras import has_torch
from tokenmill.host import available_bytes, usable_cpus
from tokenmill.models.base import Programs
from tokenmill.operate.env import cpu_name
from tokenmill.quant.base import reader_of
from tokenmill.runtime.assembly import measure_weights
from tokenmill.runtime.choice import check_machine, choose
from tokenmill.runtime.memory import size
from tokenmill.runtime.programs import programs_for
from tokenmill.runtime.worker import backend_options
from tokenmill.weights.checkpoint import Checkpoint, model_config, open_checkpoint
from tokenmill.weights.source import ModelSource
from tokenmill.wire.messages import Place

Verdict = Literal["ok", "note", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check. `bad`: a server with these options cannot start."""

    name: str
    verdict: Verdict
    text: str
    details: tuple[str, ...] = ()


def main(words: Sequence[str]) -> int:
    """Print the findings and return the exit code: 1 if one of them is bad, else 0."""
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
    """Run all checks, cheap ones first. Reads only the headers of a model's files."""
    for name, look in _LOOKS.items():
        try:
            yield look(settings)
        except StartError as error:
            yield Finding(name, "bad", str(error))


def _processor(settings: Settings) -> Finding:
    from tokenmill.backends.cpu.isa import available, detect

    if settings.backend in ("torch", "transformers"):
        return Finding("processor", "ok", cpu_name())
    isa = detect(settings.cpu_isa)
    others = ", ".join(other.name for other in available() if other != isa)
    forced = ", forced by TOKENMILL_ISA" if settings.cpu_isa else ""
    return Finding("processor", "ok", f"{cpu_name()}: {isa.name}{forced}{f'; also {others}' if others else ''}")


def _ranks(settings: Settings) -> Finding:
    engines, each = settings.data_parallel_size, settings.ranks_per_engine
    ranks = engines * each
    devices = check_machine(backend_options(settings, Place(ranks=ranks)))
    what = f"{engines} engine{'s' if engines > 1 else ''} of {each} rank{'s' if each > 1 else ''}"
    if devices is not None:
        shared = f"; up to {-(-ranks // devices)} ranks share one" if ranks > devices > 0 else ""
        return Finding("ranks", "ok", f"{what} on {min(ranks, devices)} of {devices} visible devices{shared}")
    threads = settings.cpu_threads or max(1, usable_cpus() // ranks)
    return Finding("ranks", "ok", f"{what} on {threads} of {usable_cpus()} usable CPUs each")


def _memory(settings: Settings) -> Finding:
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


def _model(settings: Settings) -> Finding:
    source = _source(settings)
    if source is None:
        wanted = settings.model_id or "the embedded default"
        return Finding("model", "note", f"{wanted} is not on this machine: `serve` fetches it at its first start")
    config = model_config(source)
    merged = f" with the adapter {source.adapter}" if source.adapter else ""
    facts = f"{source.path}{merged} ({source.format}, {config.get('model_type')})"
    return Finding("model", "ok", f"{source.model_id}: {facts}")


def _source(settings: Settings) -> ModelSource | None:
    """Return the model if it is on this machine, else None."""
    try:
        return fetch.fetch(msgspec.structs.replace(settings, offline=True), lambda progress: None, convert=False)
    except DownloadError:
        return None


def _backend(settings: Settings) -> Finding:
    source = _source(settings)
    if source is None:
        return Finding("backend", "note", "is chosen when the model is here")
    checkpoint = open_checkpoint(source)
    options = backend_options(settings, Place(ranks=settings.ranks_per_engine * settings.data_parallel_size))
    programs = programs_for(checkpoint, options)
    try:
        choice = choose(programs.decoder, options, settings.block_size, settings.num_shard or 1)
    except StartError as error:
        return Finding("backend", "bad", str(error), _elsewhere(programs, checkpoint, options, settings.num_shard or 1))
    limit = memory_bytes(settings.memory_limit)
    dtype, needed = measure_weights(choice, programs, checkpoint, options, limit)
    found = choice.kind.describe(programs.decoder, checkpoint, options, dtype, settings.num_shard or 1)
    why = f"because the {choice.device.upper()} backend cannot serve this: {choice.reason}" if choice.reason else ""
    parts = [f"{choice.name}, {found.text}, weights {size(needed)}", found.state, found.flaw, why]
    verdict: Verdict = "note" if found.flaw or why else "ok"
    read = reader_of(checkpoint, options.quantize)
    forms = forms_of_weights(programs.decoder, checkpoint, read, choice.kind.form, dtype)
    return Finding("backend", verdict, "; ".join(filter(None, parts)), (*_weights(forms), *found.details))


def _weights(forms: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"weights: {form}" for form in forms)


def _elsewhere(programs: Programs, checkpoint: Checkpoint, options: BackendOptions, ranks: int) -> tuple[str, ...]:
    """Return the refusals of the GPU backend, if one is requested and this machine has no GPU."""
    from tokenmill.backends.cuda.kind import KIND

    if "cuda" not in (options.device, options.backend) or not KIND.missing():
        return ()
    dtype = KIND.dtype(stored_dtype(programs.config.dtype, checkpoint), options.dtype)
    details = KIND.describe_elsewhere(programs.decoder, checkpoint, options, dtype, ranks)
    return ("Where there is one, it would be:", *details) if details else ()


def _torch(settings: Settings) -> Finding:
    if has_torch():
        return Finding("torch", "ok", f"{importlib.metadata.version('torch')}")
    return Finding("torch", "ok", "not installed; needed only where the CPU engine lacks a kernel (`make torch`)")


def _port(settings: Settings) -> Finding:
    from tokenmill.listening import listen, place

    try:
        listen(settings.hostname, settings.port).close()
    except StartError as error:
        return Finding("port", "note", str(error))  # only a note, because the process may be the server itself
    return Finding("port", "ok", f"{place(settings.hostname, settings.port)} is free")


_LOOKS: dict[str, Callable[[Settings], Finding]] = {
    "processor": _processor,
    "ranks": _ranks,
    "memory": _memory,
    "kernel cache": _kernel_cache,
    "model": _model,
    "backend": _backend,
    "torch": _torch,
    "port": _port,
}
