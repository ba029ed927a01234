"""The transformers backend as a choice: it runs only models that transformers computes."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from tokenmill.backends.accounts import ITEM_BYTES
from tokenmill.backends.kind import BackendOptions, Description, Job, Placement
from tokenmill.backends.torch.kind import TorchKind
from tokenmill.errors import ArgumentError, ModelError
from tokenmill.program.foreign import body_of
from tokenmill.program.value import Program
from tokenmill.quant._settings import described
from tokenmill.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from tokenmill.backends.base import Backend


class TransformersKind(TorchKind):
    """Implements `backends.kind.Kind`."""

    name, preference = "transformers", 10

    def refusal(self, program: Program, options: BackendOptions, placement: Placement) -> str:
        """See `Kind`."""
        return "" if body_of(program) else "it runs no programs"

    def check(self, options: BackendOptions, placement: Placement, reason: str) -> None:
        """See `Kind`."""
        super().check(options, placement, "")
        if placement.ranks > 1:
            raise ArgumentError(
                f"`num-shard` is {placement.ranks}, but transformers computes this model, on one device. Give "
                "--num-shard 1, or serve a model type that docs/models.md lists with ranks."
            )
        if options.quantize:
            raise ArgumentError(
                f"`quantize` is {options.quantize}, but transformers computes this model, with the weights as they "
                "are. Leave the option out."
            )

    def weight_bytes(self, program: Program, source: Checkpoint, dtype: str, quantize: str = "") -> int:
        """See `Kind`. All tensors of the checkpoint are counted."""
        stored = described(source)
        if stored is not None:
            raise ModelError(
                f"The model's weights are quantized ({stored.method}: {stored.place}), and transformers computes it "
                "here with plain weights only. Serve the model that it was made from."
            )
        if source.format == "gguf":
            raise ModelError("transformers computes no GGUF files here. Serve the model's .safetensors files.")
        return sum(prod(source.shape(name) or ()) for name in source.names()) * ITEM_BYTES[dtype]

    def make(self, job: Job) -> Backend:
        """See `Kind`. Imports torch and transformers."""
        import torch

        from tokenmill.backends.transformers.backend import TransformersBackend

        if job.options.cpu_threads is not None:
            torch.set_num_threads(job.options.cpu_threads)  # of threads that begin to compute from now on
        return TransformersBackend(job)

    def describe(
        self, program: Program, source: Checkpoint, options: BackendOptions, dtype: str, ranks: int = 1
    ) -> Description:
        """See `Kind`."""
        return Description(dtype, flaw="transformers computes it, which is slower than a model type of docs/models.md")


KIND = TransformersKind()
