"""Which backend runs a program, and making it.

Where there is a GPU that is the CUDA backend, else the CPU backend, unless it cannot run the program or the user wants
another; then torch, with the reason in the log. Nothing of torch is imported before it is chosen.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenmill.backends.base import Backend, StepLimits
from tokenmill.errors import ArgumentError, Unsupported
from tokenmill.extras import need_torch
from tokenmill.parallel.group import Group
from tokenmill.program.cost import weights_of
from tokenmill.program.ops import Weight
from tokenmill.program.value import Program
from tokenmill.quant._unread import another_head, unread
from tokenmill.quant.base import check, reader_of
from tokenmill.weights.checkpoint import Checkpoint
from tokenmill.wire.messages import Progress

Report = Callable[[Progress], None]
_FLOATS = ("F16", "BF16", "F32")
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Computing:
    """What a user may say of who computes, and how; "" and None: not said."""

    backend: str = "auto"  # "cpu", "cuda", "torch"
    device: str = "auto"  # "cpu", "cuda"
    dtype: str = ""
    quantize: str = ""
    kv_cache_dtype: str = ""
    deterministic: bool = False
    attention: str = ""  # as the user or TGI calls it
    cpu_isa: str = ""
    cpu_threads: int | None = None
    cpus: int = 1  # that this process may use
    kernel_cache: str = ""  # folder; "": in the user's cache
    cuda_graphs: tuple[int, ...] | None = None  # batch sizes
    cuda_memory_fraction: float = 1.0  # of the device's


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend's name, and why it is not the one of this device ("": it is, or the user wanted another)."""

    name: str
    reason: str = ""
    device: str = "cpu"  # "cuda"


def choose(program: Program, wants: Computing, block_size: int, ranks: int) -> Choice:
    """Needs no weights. A StartError if what the user wants cannot be had."""
    if _on_gpu(wants):
        choice = Choice("torch", device="cuda") if wants.backend == "torch" else _choose_on_gpu(program, wants, ranks)
    else:
        choice = _choose_on_cpu(program, wants, block_size, ranks)
    _check_cache(choice, wants.kv_cache_dtype)
    if wants.deterministic and choice.name == "torch":
        why = f" It would serve because the {choice.device.upper()} backend cannot: {choice.reason}."
        raise ArgumentError(
            "`deterministic` is given, but the torch backend's sums depend on how many rows a step has."
            f"{why if choice.reason else ''} Leave the option out."
        )
    return choice


def _choose_on_cpu(program: Program, wants: Computing, block_size: int, ranks: int) -> Choice:
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


def _on_gpu(wants: Computing) -> bool:
    """Whether a CUDA device computes. Unsupported if that is wanted and there is none."""
    from tokenmill.backends.cuda.detect import missing

    asked = wants.device == "cuda" or wants.backend == "cuda"
    if wants.device == "cpu" and wants.backend == "cuda":
        raise ArgumentError("`backend` is cuda, but `device` is cpu. Leave one of them out.")
    if wants.device == "cuda" and wants.backend == "cpu":
        raise ArgumentError("`backend` is cpu, but `device` is cuda. Leave one of them out.")
    if not asked and (wants.device == "cpu" or wants.backend != "auto"):
        return False
    why = missing()
    if asked and why:
        raise Unsupported("device", "cuda", ("cpu",), f"Here, {why}.")
    return not why


def _choose_on_gpu(program: Program, wants: Computing, ranks: int) -> Choice:
    from tokenmill.backends.cuda.detect import capability
    from tokenmill.backends.cuda.prepare import LEAST_CAPABILITY, refusal

    reason, found = refusal(program, wants.dtype, ranks, wants.deterministic), capability()
    if not reason and found < LEAST_CAPABILITY:
        reason = f"it needs compute capability {_dotted(LEAST_CAPABILITY)}, this device has {_dotted(found)}"
    if not reason:
        return Choice("cuda", device="cuda")
    if wants.backend == "cuda":
        raise Unsupported("backend", "cuda", ("torch",), f"It cannot serve this: {reason}.")
    return Choice("torch", reason, "cuda")


def _check_cache(choice: Choice, wanted: str) -> None:
    """Unsupported, with what there is, if the backend has no cache of the format that is wanted."""
    if not wanted:
        return
    if choice.name == "cpu":
        known: tuple[str, ...] = ("int8",)
        cure = "The CPU backend's cache is float16 or int8; FP8 is for GPUs. Give `--kv-cache-dtype int8`, or none."
    elif choice.name == "torch":
        known, cure = (), "The torch backend's cache has the computation's dtype: leave the option out."
    else:
        from tokenmill.backends.cuda.detect import capability, device_name
        from tokenmill.backends.cuda.prepare import FP8_CAPABILITY, KV_DTYPES

        known, cure = KV_DTYPES, "On a GPU the cache has the computation's dtype, or FP8."
        if wanted in known and capability() < FP8_CAPABILITY:
            known, cure = (), (
                f"FP8 needs compute capability {_dotted(FP8_CAPABILITY)}; {device_name()} has {_dotted(capability())}. "
                "Leave the option out: the cache then has the computation's dtype."
            )  # fmt: skip
    if wanted not in known:
        raise Unsupported("KV cache dtype", wanted, known, cure)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


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
    if wants.attention and choice.name != "cuda":
        _log.warning("`attention` %s has no effect: the %s backend has its own.", wants.attention, choice.name)
    if choice.name == "cpu":
        return _cpu(program, checkpoint, limits, wants, group, report)
    if choice.name == "cuda":
        return _cuda(program, checkpoint, limits, wants, group, report)
    if choice.reason:
        _log.warning("The torch backend serves this model, for the %s backend cannot: %s.", choice.device.upper(),
                     choice.reason)  # fmt: skip
    return _torch(choice, program, checkpoint, limits, wants, group, report)


def weight_bytes(choice: Choice, program: Program, checkpoint: Checkpoint, dtype: str) -> int:
    """Of all ranks together, as the backend keeps them. ModelError if the checkpoint lacks one, or of another shape."""
    weights = weights_of(program)
    check(weights, checkpoint)
    _tell_unread(weights, checkpoint)
    if choice.name == "cpu":  # packed as stored
        return sum(checkpoint.nbytes(name) for name in dict.fromkeys(p.name for w in weights for p in w.parts))
    return sum(weight.size for weight in weights) * _ITEM_BYTES[dtype_of(choice, checkpoint, dtype)]


def _tell_unread(weights: Iterable[Weight], checkpoint: Checkpoint) -> None:
    """Log what the checkpoint has and the model does not read."""
    names = {part.name for weight in weights for part in weight.parts}
    table = next((weight.name for weight in weights if weight.table), "")
    left = [name for name in unread(names, checkpoint) if name != "lm_head.weight"]
    if left:
        shown = ", ".join(left[:5]) + (", …" if len(left) > 5 else "")
        _log.warning("The model does not read %d of the tensors in its files: %s.", len(left), shown)
    if table and another_head(names, table, checkpoint):
        _log.warning(
            "lm_head.weight differs from the embedding and is not read, for config.json says tie_word_embeddings. Set "
            "that to false to use it."
        )


def dtype_of(choice: Choice, checkpoint: Checkpoint, wanted: str) -> str:
    """What is computed in: as wanted, else on a GPU as the weights are stored (but in 16 bits), else float32."""
    if wanted or choice.name != "cuda":
        return wanted or "float32"
    return "float16" if _stored_dtype(checkpoint) == "float16" else "bfloat16"


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that config.json names in either spelling, else that of the first tensor of floats, as transformers."""
    for key in ("dtype", "torch_dtype"):
        named = str(checkpoint.config.get(key) or "").removeprefix("torch.")
        if named in _ITEM_BYTES:
            return named
    kinds = (checkpoint[name].kind for name in checkpoint.names())
    return {"F16": "float16", "F32": "float32"}.get(next((kind for kind in kinds if kind in _FLOATS), ""), "bfloat16")


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


def _cuda(
    program: Program, checkpoint: Checkpoint, limits: StepLimits, wants: Computing, group: Group, report: Report
) -> Backend:
    """Imports torch and triton."""
    from tokenmill.backends.cuda.backend import CudaBackend

    dtype = dtype_of(Choice("cuda"), checkpoint, wants.dtype)
    return CudaBackend(
        program,
        checkpoint,
        reader_of(checkpoint, wants.quantize),
        limits,
        group,
        dtype=dtype,
        device="cuda",
        graphs=wants.cuda_graphs,
        kv_cache_dtype=wants.kv_cache_dtype,
        deterministic=wants.deterministic,
        attention=_attention(program, wants, dtype),
        kernel_cache=wants.kernel_cache,
        jobs=wants.cpus,
        report=report,
    )


def _attention(program: Program, wants: Computing, dtype: str) -> str:
    """Whose kernels attend to runs of tokens on a GPU. Logs what became of what was wanted."""
    from tokenmill.backends.cuda.prepare import attention_of

    chosen, why_not = attention_of(program, wants.attention, dtype, wants.deterministic)
    if why_not:
        _log.warning("`attention` is %s, but Triton's kernels attend: %s.", wants.attention, why_not)
    elif wants.attention not in ("", chosen):
        _log.info("`attention` is %s: Triton's kernels are the nearest to it here, and attend.", wants.attention)
    elif chosen == "flashinfer":
        _log.info("flashinfer attends to runs of tokens, Triton's kernels to single ones.")
    return chosen


def _torch(
    choice: Choice,
    program: Program,
    checkpoint: Checkpoint,
    limits: StepLimits,
    wants: Computing,
    group: Group,
    report: Report,
) -> Backend:
    """Imports torch."""
    from tokenmill.backends.torch.backend import TorchBackend
    from tokenmill.backends.torch.threads import set_threads

    if wants.cpu_threads is not None:
        set_threads(wants.cpu_threads)
    read = reader_of(checkpoint, wants.quantize)
    dtype = wants.dtype or "float32"
    return TorchBackend(program, checkpoint, read, limits, group, dtype=dtype, device=choice.device, report=report)
