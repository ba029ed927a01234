"""Translation of a batch to `StepInputs`: its arrays, and the tail of the program that its rows need."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.base import Admitted, StepInputs, Tail
from tokenmill.backends.sampling import needs_full
from tokenmill.engine.sequence import Batch

_NEEDS = np.dtype(
    [
        ("full", np.bool_),
        ("random", np.bool_),
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
            _tail(sampling["full"], sampling["random"]),
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
            self._needs[slot] = (
                needs_full(p, request.stopping.min_new_tokens),
                not p.greedy,
                p.logprobs,
                p.prompt_logprobs,
                len(request.prompt_ids),
            )
            admitted.append(Admitted(slot, request, np.array(seq.token_ids, np.int32)))
        return admitted


def _tail(full: NDArray[np.bool_], random: NDArray[np.bool_]) -> Tail:
    if full.any():
        return "full"
    return "plain" if random.any() else "greedy"


def _max_logprobs(wanted: NDArray[np.int32]) -> int:
    return int(wanted.max(initial=-1))
