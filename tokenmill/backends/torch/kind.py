"""The torch backend as a choice: it runs every program, on any device, if no faster backend does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenmill.backends.accounts import Use, dense_bytes
from tokenmill.backends.kind import (
    CPU_DEFAULTS,
    GPU_DEFAULTS,
    BackendOptions,
    Defaults,
    Description,
    Job,
    Placement,
    Report,
)
from tokenmill.errors import ArgumentError, Unsupported
from tokenmill.extras import need_torch
from tokenmill.program.encoded import encodes
from tokenmill.program.foreign import body_of
from tokenmill.program.value import Program
from tokenmill.quant.coded import Coded
from tokenmill.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from tokenmill.backends.base import Backend


class TorchKind:
    """Implements `backends.kind.Kind`."""

    name, devices, preference = "torch", ("cpu", "cuda"), 9

    def missing(self) -> str:
        """See `Kind`."""
        return ""

    def refusal(self, program: Program, options: BackendOptions, placement: Placement) -> str:
        """See `Kind`."""
        return "transformers computes this model" if body_of(program) else ""

    def check(self, options: BackendOptions, placement: Placement, reason: str) -> None:
        """See `Kind`."""
        device = placement.device.upper()
        instead = f"The {device} backend cannot serve this ({reason}); the" if reason else "The"
        need_torch(f"{instead} {self.name} backend")
        if options.kv_cache_dtype:
            cure = f"The {self.name} backend's cache has the computation's dtype: leave the option out."
            raise Unsupported("KV cache dtype", options.kv_cache_dtype, (), cure)
        if options.deterministic:
            why = f" It would serve because the {device} backend cannot: {reason}." if reason else ""
            raise ArgumentError(
                f"`deterministic` is given, but the {self.name} backend's sums depend on how many rows a step has."
                f"{why} Leave the option out."
            )

    def defaults(self, device: str) -> Defaults:
        """See `Kind`."""
        return GPU_DEFAULTS if device == "cuda" else CPU_DEFAULTS

    def dtype(self, stored: str, wanted: str) -> str:
        """See `Kind`."""
        return wanted or "float32"

    def weight_bytes(self, program: Program, source: Checkpoint, dtype: str, quantize: str = "") -> int:
        """See `Kind`."""
        return dense_bytes(program, source, dtype)

    def num_devices(self, device: str) -> int | None:
        """See `Kind`."""
        if device != "cuda":
            return None
        from tokenmill.backends.cuda.detect import num_devices

        return num_devices()

    def room(self, options: BackendOptions, device: str) -> int | None:
        """See `Kind`. Imports torch for a GPU."""
        if device != "cuda":
            return None
        from tokenmill.backends.cuda.room import room

        return room(options, device)

    def instruction_set(self, options: BackendOptions) -> str:
        """See `Kind`. Imports torch."""
        import torch

        return str(torch.backends.cpu.get_cpu_capability()).lower()

    def make(self, job: Job) -> Backend:
        """See `Kind`. Imports torch."""
        import torch

        from tokenmill.backends.torch.backend import TorchBackend
        from tokenmill.backends.torch.encoded import EncoderDecoderBackend

        if job.options.cpu_threads is not None:
            torch.set_num_threads(job.options.cpu_threads)  # of threads that begin to compute from now on
        return EncoderDecoderBackend(job) if encodes(job.program) else TorchBackend(job)

    def form(self, parts: Sequence[Coded], use: Use, dtype: str) -> str:
        """See `Kind`. Every matrix is converted to the computation's dtype."""
        return dtype if all(part.dense for part in parts) else f"converted to {dtype} at load"

    def describe(
        self, program: Program, source: Checkpoint, options: BackendOptions, dtype: str, ranks: int = 1
    ) -> Description:
        """See `Kind`."""
        return Description(dtype)

    def compile(
        self, program: Program, source: Checkpoint, options: BackendOptions, report: Report, ranks: int = 1
    ) -> str | None:
        """See `Kind`."""
        return ""


KIND = TorchKind()
