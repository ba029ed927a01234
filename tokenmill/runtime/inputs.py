"""Translation of a batch to `StepInputs`: its arrays, and the tail of the program that its rows need."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.base import Admitted, StepInputs
from tokenmill.backends.sampling import TAILS, row_of, tail_of
from tokenmill.engine.sequence import Batch

_NEEDS = np.dtype(
    [
        ("tail", np.int32),  # place in TAILS
        ("logprobs", np.int32),
        ("prompt_logprobs", np.int32),
        ("num_prompt", np.int32),
    ]
)


class StepBuilder:
    """Builder of step inputs, called in the order of the launches. Keeps the needs of each slot's request."""

    def __init__(self, max_batch_size: int) -> None:
        self._needs = np.zeros(max_batch_size, _NEEDS)

    def build(self, batch: Batch, deferred: bool = False) -> StepInputs:
        """Return the inputs of `batch`. Without admissions, this costs a few array operations.

        `deferred`: as in `StepInputs`.
        """
        slots = batch.slots
        admitted = tuple(self._admit(batch)) if batch.admitted else ()
        needs = self._needs[slots]
        sampling = needs[batch.samples]
        prompts = needs["prompt_logprobs"][batch.starts < needs["num_prompt"] - 1]
        return StepInputs(
            slots,
            batch.starts,
            batch.counts,
            batch.samples,
            admitted,
            batch.blocks,
            batch.host_tokens,
            TAILS[sampling["tail"].max(initial=0)],
            _max_logprobs(sampling["logprobs"]),
            _max_logprobs(prompts),
            deferred,
        )

    def _admit(self, batch: Batch) -> list[Admitted]:
        """Record the needs of the admitted rows, which are the last of the batch, and return them."""
        admitted = []
        slots = batch.slots[len(batch.slots) - len(batch.admitted) :].tolist()
        for slot, seq in zip(slots, batch.admitted, strict=True):
            request, p = seq.request, seq.request.sampling
            tail = TAILS.index(tail_of(row_of(request)))
            self._needs[slot] = tail, p.logprobs, p.prompt_logprobs, len(request.prompt_ids)
            admitted.append(Admitted(slot, request, np.array(seq.token_ids, np.int32)))
        return admitted


def _max_logprobs(wanted: NDArray[np.int32]) -> int:
    return int(wanted.max(initial=-1))
