"""The CUDA backend as a choice: what it can run, on which devices, and how it is made."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tokenmill.backends.accounts import Use, listed
from tokenmill.backends.kind import GPU_DEFAULTS, BackendOptions, Defaults, Description, Job, Placement, Report
from tokenmill.backends.torch.kind import KIND as TORCH
from tokenmill.errors import MissingPackage, Unsupported
from tokenmill.extras import has_torch
from tokenmill.program.encoded import encodes
from tokenmill.program.shard import shard
from tokenmill.program.value import Program
from tokenmill.quant.coded import Coded
from tokenmill.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from tokenmill.backends.base import Backend

_log = logging.getLogger(__name__)


class CudaKind:
    """Implements `backends.kind.Kind`."""

    name, devices, preference = "cuda", ("cuda",), 0

    def missing(self) -> str:
        """See `Kind`."""
        from tokenmill.backends.cuda.detect import missing

        return missing()

    def refusal(self, program: Program, options: BackendOptions, placement: Placement) -> str:
        """See `Kind`."""
        if placement.stages > 1:
            return "it has no kernels for the stages of a model"
        from tokenmill.backends.cuda.detect import capability
        from tokenmill.backends.cuda.prepare import LEAST_CAPABILITY, refusal

        found = capability(options.device_index)
        of_rank = shard(program, placement.ranks, whole_experts=options.expert_parallel)
        reason = refusal(of_rank, options.dtype, options.deterministic)
        if not reason and found < LEAST_CAPABILITY:
            reason = f"it needs compute capability {_dotted(LEAST_CAPABILITY)}, this device has {_dotted(found)}"
        return reason

    def check(self, options: BackendOptions, placement: Placement, reason: str) -> None:
        """See `Kind`."""
        from tokenmill.backends.cuda.detect import capability, device_name
        from tokenmill.backends.cuda.prepare import FP8_CAPABILITY, KV_DTYPES

        if placement.ranks > 1 and not options.share_devices and not _has_nccl():
            raise MissingPackage(
                f"{placement.ranks} ranks on GPUs (--num-shard) need NCCL, which this build of torch does not have: "
                "pip install 'tokenmill[cuda]', or give --device cpu."
            )
        wanted = options.kv_cache_dtype
        if not wanted:
            return
        if wanted not in KV_DTYPES:
            cure = "On a GPU the cache has the computation's dtype, or FP8."
            raise Unsupported("KV cache dtype", wanted, KV_DTYPES, cure)
        if (found := capability(options.device_index)) < FP8_CAPABILITY:
            name = device_name(options.device_index)
            cure = (
                f"FP8 needs compute capability {_dotted(FP8_CAPABILITY)}; {name} has {_dotted(found)}. "
                "Leave the option out: the cache then has the computation's dtype."
            )
            raise Unsupported("KV cache dtype", wanted, (), cure)

    def defaults(self, device: str) -> Defaults:
        """See `Kind`."""
        return GPU_DEFAULTS

    def dtype(self, stored: str, wanted: str) -> str:
        """See `Kind`. The stored dtype, in 16 bits."""
        return wanted or ("float16" if stored == "float16" else "bfloat16")

    def weight_bytes(self, program: Program, source: Checkpoint, dtype: str, quantize: str = "") -> int:
        """See `Kind`. Imports torch and triton."""
        from tokenmill.backends.cuda.held import weight_bytes

        return weight_bytes(program, source, dtype, quantize)

    def num_devices(self, device: str) -> int | None:
        """See `Kind`."""
        from tokenmill.backends.cuda.detect import num_devices

        return num_devices()

    def room(self, options: BackendOptions, device: str) -> int | None:
        """See `Kind`. Imports torch."""
        from tokenmill.backends.cuda.room import room

        return room(options, device)

    def instruction_set(self, options: BackendOptions) -> str:
        """See `Kind`. Imports torch, which has these kernels."""
        return TORCH.instruction_set(options)

    def make(self, job: Job) -> Backend:
        """See `Kind`. Imports torch and triton."""
        from tokenmill.backends.cuda.backend import CudaBackend
        from tokenmill.backends.cuda.encoded import EncoderDecoderBackend

        chosen = attention(job.program, job.options, job.dtype)
        made = EncoderDecoderBackend if encodes(job.program) else CudaBackend
        return made(job._replace(options=replace(job.options, attention=chosen)))

    def form(self, parts: Sequence[Coded], use: Use, dtype: str) -> str:
        """See `Kind`. Imports torch and triton."""
        from tokenmill.backends.cuda.detect import capability, missing
        from tokenmill.backends.cuda.explain import form_of_matrix
        from tokenmill.backends.cuda.products.fp8 import CAPABILITY

        return form_of_matrix(parts, use, dtype, fp8=bool(missing()) or capability() >= CAPABILITY)

    def describe(
        self, program: Program, source: Checkpoint, options: BackendOptions, dtype: str, ranks: int = 1
    ) -> Description:
        """See `Kind`."""
        from tokenmill.backends.cuda.detect import capability, device_name, not_compilable

        found = capability(options.device_index)
        text = f"{device_name()} (compute capability {_dotted(found)}), {dtype}"
        of_rank = shard(program, ranks, whole_experts=options.expert_parallel)
        kernels = _kernels(of_rank, source, options, dtype, copies=found >= (9, 0), ranks=ranks)
        return Description(text, kernels, flaw=not_compilable())

    def describe_elsewhere(
        self, program: Program, source: Checkpoint, options: BackendOptions, dtype: str, ranks: int = 1
    ) -> tuple[str, ...]:
        """Return the details of `describe` on a newer GPU, for a machine without one; () without torch and triton."""
        from tokenmill.backends.cuda.prepare import refusal

        program = shard(program, ranks, whole_experts=options.expert_parallel)
        if refusal(program, options.dtype, options.deterministic) or not (has_torch() and find_spec("triton")):
            return ()
        return _kernels(program, source, options, dtype, copies=True, ranks=ranks)

    def compile(
        self, program: Program, source: Checkpoint, options: BackendOptions, report: Report, ranks: int = 1
    ) -> str | None:
        """See `Kind`."""
        return None


def attention(program: Program, options: BackendOptions, dtype: str) -> str:
    """Return the kernels of runs of tokens, "triton" or "flashinfer". Logs a choice other than the user's."""
    from tokenmill.backends.cuda.prepare import attention_of

    chosen, why_not = attention_of(program, options.attention, dtype, options.deterministic)
    if why_not:
        _log.warning("`attention` is %s, but Triton's kernels attend: %s.", options.attention, why_not)
    elif options.attention not in ("", chosen):
        _log.info("`attention` is %s: Triton's kernels are the nearest to it here, and attend.", options.attention)
    elif chosen == "flashinfer":
        _log.info("flashinfer attends to runs of tokens, Triton's kernels to single ones.")
    return chosen


def _kernels(
    program: Program, source: Checkpoint, options: BackendOptions, dtype: str, *, copies: bool, ranks: int
) -> tuple[str, ...]:
    """Return lines of kernels and rules of the program of one rank. Imports torch and triton.

    `copies`: the GPU has a copy engine for tiles.
    """
    from tokenmill.backends.cuda.explain import KernelOptions, kernels_of, rules_of
    from tokenmill.backends.cuda.held import held
    from tokenmill.backends.cuda.prepare import fused

    chosen = KernelOptions(
        dtype=dtype,
        kv_cache_dtype=options.kv_cache_dtype,
        deterministic=options.deterministic,
        attention=options.attention,
        held=held(fused(program), source, dtype, options.quantize),
        copies=copies,
        ranks=ranks,
    )
    return listed(kernels_of(program, chosen), rules_of(program, source, chosen))


def _has_nccl() -> bool:
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_nccl_available()


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


KIND = CudaKind()
