"""Executor of a rank of several stages: the messages about a step that its ranks exchange beside activations.

The last stage has the logits, so its first rank samples. Rank 0, in the first stage, has the constraints and sends the
outputs. The ranks run the same loop, so they exchange in the same order:

* when a step with constrained rows is completed: the masks of rank 0;
* when a step is collected: its result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from tokenmill.backends.base import Backend, Masks, Step, StepResult
from tokenmill.engine.sequence import Batch
from tokenmill.errors import OutOfMemory
from tokenmill.parallel.mesh import Mesh
from tokenmill.runtime.executor import Masking
from tokenmill.runtime.inputs import StepBuilder
from tokenmill.runtime.token_feed import FedStep, TokenFeed
from tokenmill.wire.messages import Request


class _MaskFrame(msgspec.Struct, frozen=True, array_like=True):
    """Masks of a step: `Masks` as bytes."""

    rows: bytes = b""
    bits: bytes = b""
    words: int = 1  # of a row of `bits`


@dataclass(frozen=True, slots=True)
class StagedStep:
    """A step of all stages, seen from one rank."""

    batch: Batch
    fed: FedStep
    masked: bool  # rank 0 sends masks, maybe none
    deferred: bool  # on rank 0: there are masks


class StagedExecutor:
    """Implementation of `engine.Executor` on a backend that runs one stage. The caller closes the backend.

    `is_constrained`: true for requests whose rows may have masks, the same on every rank. `masking`: on rank 0.
    """

    def __init__(
        self,
        backend: Backend,
        max_batch_size: int,
        mesh: Mesh,
        is_constrained: Callable[[Request], bool],
        masking: Masking | None = None,
    ) -> None:
        self._backend, self._mesh, self._masking = backend, mesh, masking
        self._builder, self._feed = StepBuilder(max_batch_size), TokenFeed(backend.run)
        self._is_constrained = is_constrained
        self._constrained = np.zeros(max_batch_size, bool)  # by slot
        self._results: msgspec.msgpack.Decoder[StepResult] = msgspec.msgpack.Decoder(StepResult)
        self._masks: msgspec.msgpack.Decoder[_MaskFrame] = msgspec.msgpack.Decoder(_MaskFrame)

    def launch(self, batch: Batch) -> StagedStep:
        """See `engine.Executor`. Raise the errors of `Backend.run`."""
        for slot, seq in zip(batch.slots[len(batch.slots) - len(batch.admitted) :], batch.admitted, strict=True):
            self._constrained[slot] = self._is_constrained(seq.request)
        deferred = self._masking is not None and self._masking.defers(batch)
        masked = bool(self._constrained[batch.slots[batch.samples]].any())
        assert masked or not deferred
        inputs = self._builder.build(batch, masked and self._mesh.samples)
        if self._mesh.stage == 0:
            return StagedStep(batch, self._feed.launch(inputs), masked, deferred)
        return StagedStep(batch, FedStep(inputs, [], step=self._backend.run(inputs)), masked, deferred)

    def complete(self, step: StagedStep) -> None:
        """See `engine.Executor`: send the masks from rank 0 to the rank that samples."""
        if not step.masked:
            return
        frame = _MaskFrame()
        if self._masking is not None and step.deferred:
            masks = self._masking.masks(step.batch)
            frame = _MaskFrame(masks.rows.tobytes(), masks.bits.tobytes(), masks.bits.shape[1])
        sent = self._mesh.world.exchange(msgspec.msgpack.encode(frame) if self._mesh.world.rank == 0 else b"")
        if self._mesh.samples:
            frame = self._masks.decode(sent[0])
            bits = np.frombuffer(frame.bits, np.uint32).reshape(-1, frame.words)
            _step_of(step).sample(Masks(np.frombuffer(frame.rows, np.int32), bits))

    def collect(self, step: StagedStep) -> StepResult:
        """See `engine.Executor`. The result is that of the rank that samples, on every rank.

        Raise RuntimeError if this rank had no memory: the ranks cannot retract a step that others run.
        """
        try:
            own = _step_of(step).result()
        except OutOfMemory as error:
            raise RuntimeError(f"a stage had no memory for a step: {error}") from error
        mesh = self._mesh
        sent = mesh.world.exchange(msgspec.msgpack.encode(own) if mesh.samples else b"")
        result = own if mesh.samples else self._results.decode(sent[mesh.sampler])
        if mesh.stage == 0:
            self._feed.arrive(step.fed, result.token_ids)
        if self._masking is not None:
            self._masking.observe(step.batch, result.token_ids)
        return result

    def idle_work(self) -> bool:
        """See `engine.Executor`."""
        return self._backend.idle_work()


def _step_of(step: StagedStep) -> Step:
    """Return the launched step. The engine completes and collects a step after those whose tokens it computes."""
    assert step.fed.step is not None
    return step.fed.step
