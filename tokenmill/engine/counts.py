"""What an engine has done so far, in numbers that only grow."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.engine.sequence import Batch
from tokenmill.wire.messages import Stats


@dataclass(slots=True)
class Counts:
    """Counters of a scheduler. Their names are those of `wire.messages.Stats`."""

    steps: int = 0
    retracted: int = 0  # steps
    preemptions: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    forced_tokens: int = 0

    def passed(self, batch: Batch) -> None:
        """A step has run."""
        num_decode = len(batch.sequences) - batch.num_prefill_rows
        self.steps += 1
        self.decode_tokens += num_decode
        self.prefill_tokens += batch.num_tokens - num_decode

    def stats(self, now: tuple[int, int, int, int], batch: Batch | None, step_s: float) -> Stats:
        """All of them; what waits, runs, is used of so many blocks `now`; and the step that has just ended."""
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
