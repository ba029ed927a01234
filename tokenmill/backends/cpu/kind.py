"""The CPU backend's entry in the list of backends: which programs and processors it supports, and its construction."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenmill.backends.accounts import Use, listed
from tokenmill.backends.cpu.forms import FLOATS
from tokenmill.backends.kind import CPU_DEFAULTS, BackendOptions, Defaults, Description, Job, Placement, Report
from tokenmill.errors import Unsupported
from tokenmill.program.encoded import encodes
from tokenmill.program.shard import shard
from tokenmill.program.value import Program
from tokenmill.quant.base import reader_of
from tokenmill.quant.coded import Coded
from tokenmill.weights.checkpoint import Checkpoint
from tokenmill.wire.messages import Progress

if TYPE_CHECKING:
    from tokenmill.backends.base import Backend
    from tokenmill.backends.cpu.cache import KernelCache

_CACHES = ("int8",)

_log = logging.getLogger(__name__)


class CpuKind:
    """Implements `backends.kind.Kind`."""

    name, devices, preference = "cpu", ("cpu",), 0

    def missing(self) -> str:
        """See `Kind`."""
        return ""

    def refusal(self, program: Program, options: BackendOptions, placement: Placement) -> str:
        """See `Kind`."""
        if importlib.util.find_spec("llvmlite") is None or importlib.util.find_spec("numba") is None:
            return "numba is not installed"
        from tokenmill.backends.cpu.isa import detect
        from tokenmill.backends.cpu.prepare import refusal

        try:
            detect(options.cpu_isa)
        except Unsupported as e:
            return f"its kernels are not written for this processor ({e.name})"
        if options.nodes > 1:
            return f"its ranks share memory, and there are {options.nodes} nodes"
        of_rank = shard(program, placement.ranks, whole_experts=options.expert_parallel)
        return refusal(of_rank, placement.block_size)

    def check(self, options: BackendOptions, placement: Placement, reason: str) -> None:
        """See `Kind`."""
        if options.kv_cache_dtype not in ("", *_CACHES):
            cure = "The CPU backend's cache is float16 or int8; FP8 is for GPUs. Give `--kv-cache-dtype int8`, or none."
            raise Unsupported("KV cache dtype", options.kv_cache_dtype, _CACHES, cure)

    def defaults(self, device: str) -> Defaults:
        """See `Kind`."""
        return CPU_DEFAULTS

    def dtype(self, stored: str, wanted: str) -> str:
        """See `Kind`. Products with 16-bit weights accumulate in float32 as well."""
        return wanted or "float32"

    def weight_bytes(self, program: Program, source: Checkpoint, dtype: str, quantize: str = "") -> int:
        """See `Kind`."""
        from tokenmill.backends.cpu.explain import packed_bytes

        return packed_bytes(program, source, reader_of(source, quantize))

    def num_devices(self, device: str) -> int | None:
        """See `Kind`."""
        return None

    def room(self, options: BackendOptions, device: str) -> int | None:
        """See `Kind`."""
        return None

    def instruction_set(self, options: BackendOptions) -> str:
        """See `Kind`."""
        from tokenmill.backends.cpu.isa import detect

        return detect(options.cpu_isa).name

    def make(self, job: Job) -> Backend:
        """See `Kind`."""
        from tokenmill.backends.cpu.backend import CpuBackend
        from tokenmill.backends.cpu.encoded import EncoderDecoderBackend
        from tokenmill.backends.cpu.staged import StageBackend

        if (dtype := job.options.dtype) in ("bfloat16", "float16"):
            _log.info("The CPU backend keeps weights as they are stored and computes in float32, not %s.", dtype)
        if job.mesh.num_stages > 1:
            return StageBackend(job)
        return EncoderDecoderBackend(job) if encodes(job.program) else CpuBackend(job)

    def form(self, parts: Sequence[Coded], use: Use, dtype: str) -> str:
        """See `Kind`. A name of `forms.py`."""
        from tokenmill.backends.cpu.pack import pack_loaded

        found = dict.fromkeys(packed.form for packed in pack_loaded(parts, product=use == "product"))
        forms = ", ".join(found)
        kept = not set(FLOATS) & set(found) or all(part.dense for part in parts)
        return forms if kept else f"converted to {forms} at load: no kernel multiplies its codes"

    def describe(
        self, program: Program, source: Checkpoint, options: BackendOptions, dtype: str, ranks: int = 1
    ) -> Description:
        """See `Kind`."""
        from tokenmill.backends.cpu.threads import default_threads

        kinds, names, cache = _kernels(program, source, options, ranks)
        missing = cache.missing(names)
        cached = "kernels are compiled"
        if missing:
            cached = f"{len(missing)} of {len(names)} kernels are still to be compiled"
        threads = options.cpu_threads or default_threads(options.cpus, ranks)
        on = f"{threads} thread{'s' if threads > 1 else ''} of {options.cpus} usable CPUs"
        if ranks > 1:
            on = f"{ranks} ranks of {on}, which share the model through memory"
        return Description(on, listed(kinds), cached)

    def compile(
        self, program: Program, source: Checkpoint, options: BackendOptions, report: Report, ranks: int = 1
    ) -> str | None:
        """See `Kind`."""
        _, names, cache = _kernels(program, source, options, ranks)
        began = time.monotonic()
        compiled = cache.fill(names, lambda done, total: report(Progress("compile", done, total, "kernels")))
        took = f"{compiled} compiled in {time.monotonic() - began:.1f} s" if compiled else "all were there"
        return f"{len(set(names))} kernels for {cache.isa.name} in {cache.folder}; {took}."


def _kernels(
    program: Program, source: Checkpoint, options: BackendOptions, ranks: int
) -> tuple[dict[str, Counter[str]], list[str], KernelCache]:
    """Return the kernels by kind of operation, the names of all kernels, and the kernel cache."""
    from tokenmill.backends.cpu.backend import KV_DTYPES
    from tokenmill.backends.cpu.cache import KernelCache, cache_folder
    from tokenmill.backends.cpu.explain import kernels_of
    from tokenmill.backends.cpu.isa import detect

    read, isa = reader_of(source, options.quantize), detect(options.cpu_isa)
    of_rank = shard(program, ranks, whole_experts=options.expert_parallel)
    kinds = kernels_of(of_rank, source, read, isa, KV_DTYPES[options.kv_cache_dtype])
    names = ["walk", "serve", *(name for kernels in kinds.values() for name in kernels)]
    return kinds, names, KernelCache(cache_folder(options.kernel_cache), isa, jobs=options.cpus)


KIND = CpuKind()
