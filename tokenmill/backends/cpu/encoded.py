"""The CPU backend for a program with an encoder.

The table of such a program begins with the encoder's rows. A step that computes the last token of an input runs these
rows over the whole input; the other rows then compute the step without the tokens of inputs.
"""

from __future__ import annotations

import numpy as np

from tokenmill.backends.base import StepInputs
from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.backend import CpuBackend, StepPlan
from tokenmill.backends.encoded import completed_inputs, input_lengths, of_decoder
from tokenmill.backends.kind import Job
from tokenmill.backends.steps import step_tokens
from tokenmill.program.encoded import StoreInput


class EncoderDecoderBackend(CpuBackend):
    """Implements `backends.base.Backend` for a program with an encoder."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        stores = [row for row, line in enumerate(self._lines) if isinstance(line.op, StoreInput)]
        self._first = stores[-1] + 1
        self._sampler.skip_inputs()
        lengths = self._slots.parameters.rows["num_prompt"]
        self._scratch.context[[layout.NUM_PROMPT, layout.NUM_PROMPT_STRIDE]] = lengths.ctypes.data, lengths.strides[0]

    def _begin(self, inputs: StepInputs, plan: StepPlan) -> tuple[StepInputs, StepPlan]:
        """Apply the changes of slots, run the encoder where an input is complete, and return the decoder's step."""
        super()._begin(inputs, plan)
        lengths = input_lengths(inputs.slots, self._slots.parameters.rows)
        for slot, length in completed_inputs(inputs, lengths):
            self._encode(slot, length)
        inputs = of_decoder(inputs, lengths)
        return inputs, self._scratch.plan(step_tokens(inputs))

    def _encode(self, slot: int, length: int) -> None:
        of_slot, start, count = (np.array([number], np.int32) for number in (slot, 0, length))
        whole = StepInputs(of_slot, start, count, samples=np.zeros(0, np.int32))
        self._scratch.begin(self._scratch.plan(step_tokens(whole)))
        self._walk(0, self._first)
