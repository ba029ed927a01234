"""Which backend runs a program, and making it.

On a CPU that is the CPU backend, unless it cannot run the program or the user wants another; then torch, with the
reason in the log. Nothing of torch is imported before it is chosen.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenmill.backends.base import Backend, StepLimits
from tokenmill.errors import Unsupported
from tokenmill.extras import need_torch
from tokenmill.parallel.group import Group
from tokenmill.program.cost import weights_of
from tokenmill.program.value import Program
from tokenmill.quant.base import reader_of
from tokenmill.weights.checkpoint import Checkpoint
from tokenmill.wire.messages import Progress

Report = Callable[[Progress], None]
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Computing:
    """What a user may say of who computes, and how; "" and None: not said."""

    backend: str = "auto"  # "cpu", "torch"
    dtype: str = ""
    quantize: str = ""
    kv_cache_dtype: str = ""
    cpu_isa: str = ""
    cpu_threads: int | None = None
    cpus: int = 1  # that this process may use
    kernel_cache: str = ""  # folder; "": in the user's cache


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend's name, and why it is not the CPU backend ("": it is, or the user wanted another)."""

    name: str
    reason: str = ""


def choose(program: Program, wants: Computing, block_size: int, ranks: int) -> Choice:
    """Needs no weights. A StartError if what the user wants cannot be had."""
    if wants.backend == "torch":
        need_torch("The torch backend")
        return Choice("torch")
    reason = _refusal(program, wants, block_size, ranks)
    if not reason:
        return Choice("cpu")
    if wants.backend == "cpu":
        raise Unsupported("backend", "cpu", ("torch",), f"It cannot serve this: {reason}.")
    need_torch(f"The CPU backend cannot serve this ({reason}); the torch backend")
    return Choice("torch", reason)


def make_backend(
    choice: Choice,
    program: Program,
    checkpoint: Checkpoint,
    limits: StepLimits,
    wants: Computing,
    group: Group,
    report: Report,
) -> Backend:
    """The backend, its weights read."""
    if choice.name == "cpu":
        return _cpu(program, checkpoint, limits, wants, group, report)
    if choice.reason:
        _log.warning("The torch backend serves this model, for the CPU backend cannot: %s.", choice.reason)
    return _torch(program, checkpoint, limits, wants, group, report)


def weight_bytes(choice: Choice, program: Program, checkpoint: Checkpoint, dtype: str) -> int:
    """Of all ranks together, as the backend keeps them."""
    weights = weights_of(program)
    if choice.name == "cpu":  # packed as stored
        return sum(checkpoint.nbytes(name) for name in dict.fromkeys(p.name for w in weights for p in w.parts))
    return sum(weight.size for weight in weights) * _ITEM_BYTES[dtype or "float32"]


def instruction_set(choice: Choice, wants: Computing) -> str:
    """For which the backend's kernels are made: another may round differently."""
    if choice.name == "cpu":
        from tokenmill.backends.cpu.isa import detect

        return detect(wants.cpu_isa).name
    import torch

    return str(torch.backends.cpu.get_cpu_capability()).lower()


def _refusal(program: Program, wants: Computing, block_size: int, ranks: int) -> str:
    """Why the CPU backend cannot do it; "" if it can."""
    if ranks > 1:
        return "it does not share a model over several processes"
    if importlib.util.find_spec("llvmlite") is None or importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    from tokenmill.backends.cpu.isa import detect
    from tokenmill.backends.cpu.prepare import refusal

    try:
        detect(wants.cpu_isa)
    except Unsupported as e:
        return f"its kernels are not written for this processor ({e.name})"
    return refusal(program, block_size)


def _cpu(
    program: Program, checkpoint: Checkpoint, limits: StepLimits, wants: Computing, group: Group, report: Report
) -> Backend:
    from tokenmill.backends.cpu.backend import CpuBackend
    from tokenmill.backends.cpu.cache import user_folder
    from tokenmill.backends.cpu.threads import default_threads

    if wants.dtype in ("bfloat16", "float16"):
        _log.info("The CPU backend keeps weights as they are stored and computes in float32, not %s.", wants.dtype)
    return CpuBackend(
        program,
        checkpoint,
        reader_of(checkpoint, wants.quantize),
        limits,
        group,
        threads=wants.cpu_threads or default_threads(wants.cpus),
        isa=wants.cpu_isa,
        kv_dtype=wants.kv_cache_dtype,
        kernel_cache=Path(wants.kernel_cache) if wants.kernel_cache else user_folder(),
        report=report,
    )


def _torch(
    program: Program, checkpoint: Checkpoint, limits: StepLimits, wants: Computing, group: Group, report: Report
) -> Backend:
    """Imports torch."""
    from tokenmill.backends.torch.backend import TorchBackend
    from tokenmill.backends.torch.threads import set_threads

    if wants.kv_cache_dtype == "int8":
        raise Unsupported("KV cache dtype", "int8", (), "The torch backend's cache has the computation's dtype.")
    if wants.cpu_threads is not None:
        set_threads(wants.cpu_threads)
    read = reader_of(checkpoint, wants.quantize)
    dtype = wants.dtype or "float32"
    return TorchBackend(program, checkpoint, read, limits, group, dtype=dtype, device="cpu", report=report)
