"""Counters of an engine's work. They never decrease."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.engine.sequence import Batch
from tokenmill.wire.messages import Stats


@dataclass(slots=True)
class Counts:
    """Counters of a scheduler, named as in `wire.messages.Stats`."""

    steps: int = 0
    retracted: int = 0  # steps
    preemptions: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    forced_tokens: int = 0

    def record(self, batch: Batch) -> None:
        """Count a step that has run."""
        num_decode = len(batch.sequences) - batch.num_prefill_rows
        self.steps += 1
        self.decode_tokens += num_decode
        self.prefill_tokens += batch.num_tokens - num_decode

    def stats(self, now: tuple[int, int, int, int], batch: Batch | None, step_s: float) -> Stats:
        """Return the statistics after a step.

        `now`: waiting sequences, running sequences, used blocks, all blocks. `batch`, `step_s`: the step that has just
        ended and its duration in seconds; None and 0 if there was none.
        """
        return Stats(
            *now,
            self.steps,
            self.prefill_tokens,
            self.decode_tokens,
            self.cached_tokens,
            self.preemptions,
            batch_size=len(batch.sequences) if batch else 0,
            batch_tokens=batch.num_tokens if batch else 0,
            step_s=step_s,
            prefill_rows=batch.num_prefill_rows if batch else 0,
            admitted=len(batch.admitted) if batch else 0,
            retracted=self.retracted,
            forced_tokens=self.forced_tokens,
        )
