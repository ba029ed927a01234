"""Sampled tokens on their way from the last stage to the first one, which computes them in a later step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from tokenmill.backends.base import Step, StepInputs


@dataclass(slots=True)
class _Token:
    """A token that a step samples."""

    slot: int
    position: int
    token_id: int | None = None  # None: it has not arrived


@dataclass(slots=True, eq=False)
class FedStep:
    """A step that was launched, or is held until the tokens that it computes have arrived."""

    inputs: StepInputs
    sampled: list[_Token]  # by entry of `StepInputs.samples`
    missing: list[_Token] = field(default_factory=list)
    step: Step | None = None


class TokenFeed:
    """Launcher of steps on a backend that does not sample.

    It adds the tokens that were sampled elsewhere to `StepInputs.host_tokens` of the first step that computes them. A
    step whose tokens have not arrived is held, and so are those behind it.
    """

    def __init__(self, run: Callable[[StepInputs], Step]) -> None:
        self._run = run
        self._newest: dict[int, _Token] = {}  # by slot, of those that no step has computed yet
        self._held: deque[FedStep] = deque()

    def launch(self, inputs: StepInputs) -> FedStep:
        """Launch a step, or hold it. Its tokens must be passed to `arrive`."""
        for admitted in inputs.admitted:
            self._newest.pop(admitted.slot, None)
        for slot, position, _ in inputs.host_tokens.tolist():
            token = self._newest.get(slot)
            if token is not None and token.position == position:  # replaced
                del self._newest[slot]
        slots, starts = inputs.slots.tolist(), inputs.starts.tolist()
        ends = (inputs.starts + inputs.counts).tolist()
        sampled = [_Token(slots[row], ends[row]) for row in inputs.samples.tolist()]
        fed = FedStep(inputs, sampled)
        for slot, start, end in zip(slots, starts, ends, strict=True):
            token = self._newest.get(slot)
            if token is not None and start <= token.position < end:
                fed.missing.append(self._newest.pop(slot))
        self._newest |= {token.slot: token for token in sampled}
        self._held.append(fed)
        self._release()
        return fed

    def arrive(self, fed: FedStep, token_ids: list[int]) -> None:
        """Record the tokens of a step, as in `StepResult`, and launch the steps that waited for them."""
        for token, token_id in zip(fed.sampled, token_ids, strict=True):
            token.token_id = max(token_id, 0)  # -1: its sequence is ending
        self._release()

    def _release(self) -> None:
        """Launch the held steps whose tokens have arrived, in order."""
        while self._held and all(token.token_id is not None for token in self._held[0].missing):
            fed = self._held.popleft()
            inputs = fed.inputs
            if fed.missing:
                new = np.array([(t.slot, t.position, t.token_id) for t in fed.missing], np.int32)
                inputs = replace(inputs, host_tokens=np.concatenate((inputs.host_tokens, new)))
            fed.step = self._run(inputs)
