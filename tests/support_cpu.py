"""Driver that feeds steps to the CPU backend. No torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support_jobs import job_of

from tokenmill.backends.base import Admitted, StepInputs, StepLimits, StepResult
from tokenmill.backends.cpu.backend import CpuBackend
from tokenmill.config import default_cache_dir
from tokenmill.models.base import program_of
from tokenmill.program.value import Program
from tokenmill.quant.base import Reader
from tokenmill.weights.checkpoint import Checkpoint, open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import Request, SamplingParams, StoppingParams

Rows = list[tuple[int, list[int]]]
"""(slot, new ids to compute)"""


@cache
def kernel_folder() -> Path:
    """Return the folder of compiled kernels: the user's, as of servers that tests start. Compiling takes seconds."""
    return Path(default_cache_dir()) / "kernels"


class CpuDriver(CpuBackend):
    """A CPU backend with access to the logits of its last step. Its blocks are scattered over the cache.

    The last token of each row samples.
    """

    def __init__(
        self,
        source: Checkpoint,
        *,
        read: Reader | None = None,
        program: Program | None = None,
        num_blocks: int = 64,
        limits: StepLimits | None = None,
        **options: Any,
    ) -> None:
        options = {"cpu_threads": 2, "kernel_cache": str(kernel_folder())} | options
        limits = limits or StepLimits(256, 4, 256, 16)
        program = program or program_of(source.config)
        super().__init__(job_of(program, source, limits, read=read, **options))
        self.allocate(num_blocks)
        self.free = np.random.default_rng(3).permutation(num_blocks).tolist()
        self.known: dict[int, list[int]] = {}  # by slot: ids that are computed
        self.blocks: dict[tuple[int, int], list[int]] = {}  # by slot and table

    @classmethod
    def of(cls, path: str | Path, **options: Any) -> CpuDriver:
        """Return a driver for a model on disk."""
        return cls(open_checkpoint(local_source(path)), **options)

    def forget(self, slot: int, keep: int = 0) -> None:
        """Free a slot. Its first `keep` tokens stay in the cache."""
        self.known[slot] = self.known.get(slot, [])[:keep]
        used = -(-keep // self.limits.block_size)
        for which in range(len(self.windows)):
            table = self.blocks.get((slot, which), [])
            self.free += table[used:]
            self.blocks[slot, which] = table[:used]

    def inputs(self, rows: Rows, sampling: SamplingParams | None = None, **options: Any) -> StepInputs:
        """Return the step that computes these ids. Every slot is admitted anew with its known tokens."""
        admitted, blocks, starts = [], [], []
        for slot, ids in rows:
            known = self.known.setdefault(slot, [])
            starts.append(len(known))
            known += ids
            request = Request(slot, tuple(known), sampling or SamplingParams(), StoppingParams(1 << 20))
            admitted.append(Admitted(slot, request, np.array(known, np.int32)))
            for which in range(len(self.windows)):
                table = self.blocks.setdefault((slot, which), [])
                while len(table) * self.limits.block_size < len(known):
                    table.append(self.free.pop())
                blocks += [(which, slot, i, block) for i, block in enumerate(table)]
        slots, counts = [slot for slot, _ in rows], [len(ids) for _, ids in rows]
        return StepInputs(
            *(np.array(a, np.int32) for a in (slots, starts, counts, range(len(rows)))),
            tuple(admitted),
            np.array(blocks, np.int32).reshape(-1, 4),
            **options,
        )

    def feed(self, rows: Rows, sampling: SamplingParams | None = None, **options: Any) -> NDArray[np.float32]:
        """Run a step and return the logits of each row's last token, (rows, vocabulary)."""
        self.step(rows, sampling, **options)
        return self.logits(len(rows))

    def step(self, rows: Rows, sampling: SamplingParams | None = None, **options: Any) -> StepResult:
        """Run a step and return its result."""
        return self.run(self.inputs(rows, sampling, **options)).result()

    def logits(self, rows: int) -> NDArray[np.float32]:
        """Logits of the last step."""
        return self._memory.view(self.program.logits, rows).copy()
