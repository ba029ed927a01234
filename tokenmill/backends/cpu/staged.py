"""The CPU backend for one stage of a model.

The table of a stage has no rows for `Receive` and `Send`: the values that it receives are written to the arena before
the table is executed, and those that it sends are read from there afterwards.
"""

from __future__ import annotations

import numpy as np

from tokenmill.backends.base import StepInputs
from tokenmill.backends.cpu.backend import CpuBackend, StepPlan
from tokenmill.backends.deferred import AwaitedMasks
from tokenmill.backends.kind import Job
from tokenmill.backends.steps import PromptPositions
from tokenmill.parallel.pipes import Pipes
from tokenmill.program.stage import Receive, Send
from tokenmill.wire.messages import TokenDetails


class StageBackend(CpuBackend):
    """Implements `backends.base.Backend` for one of several stages."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._received = [op.out for op in self.program.ops if isinstance(op, Receive)]
        self._sent = [op.x for op in self.program.ops if isinstance(op, Send)]
        self._mesh = job.mesh
        self._pipes: Pipes | None = None

    def allocate(self, num_blocks: int) -> None:
        """Allocate the KV cache, and connect to the other stages. Raises NotEnoughMemory if it does not fit."""
        super().allocate(num_blocks)
        self._pipes = Pipes(self._mesh)

    def close(self) -> None:
        """Stop the threads. A step that waits for another stage ends. Idempotent."""
        if self._pipes is not None:
            self._pipes.close()
        super().close()

    def _compute(self, inputs: StepInputs, plan: StepPlan, masks: AwaitedMasks | None = None) -> list[int]:
        """Receive, execute the table, and send. Return the sampled ids; [] in a stage before the last one."""
        if not len(inputs.slots):
            return []
        assert self._pipes is not None
        count = int(inputs.counts.sum())
        for value in self._received:
            rows = np.empty((count, value.width), np.float32)
            self._pipes.receive(rows.data)
            self._memory.view(value, count)[:] = rows
        if self.program.samples:
            return super()._compute(inputs, plan, masks)
        self._scratch.begin(plan)
        self._walk(self._first, self._body)
        for value in self._sent:
            self._pipes.send(self._memory.view(value, count).tobytes())
        return []

    def _score(self, part: PromptPositions) -> list[TokenDetails | None]:
        """Return the details of some positions' targets; None for each in a stage before the last one."""
        return super()._score(part) if self.program.samples else [None] * len(part.rows)
