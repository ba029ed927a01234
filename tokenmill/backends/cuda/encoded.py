"""The CUDA backend for a program with an encoder.

The launches of such a program begin with the encoder's. A step that computes the last token of an input runs these over
all inputs that it completes, one behind the other; then the step goes on without the tokens of inputs, so that most
steps are decode steps and captured.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tokenmill.backends.base import StepInputs
from tokenmill.backends.cuda.backend import CudaBackend
from tokenmill.backends.cuda.launch import Launch
from tokenmill.backends.cuda.shapes import CLASSES
from tokenmill.backends.encoded import completed_inputs, input_lengths, of_decoder
from tokenmill.backends.kind import Job


class EncoderDecoderBackend(CudaBackend):
    """Implements `backends.base.Backend` for a program with an encoder."""

    def __init__(self, job: Job) -> None:
        self._encoder: list[Launch] = []
        super().__init__(job)
        self._slots.skips_inputs = True

    def allocate(self, num_blocks: int) -> None:
        """See `CudaBackend`."""
        super().allocate(num_blocks)
        self._encoder = [launch for launch in self._body if _encodes(launch)]
        self._body = [launch for launch in self._body if not _encodes(launch)]
        self._batch_one = [launch for launch in self._batch_one if not _encodes(launch)]

    def _launch_all(self) -> int:
        used = super()._launch_all()
        longest = min(used, self.limits.max_total_tokens - 1) or 1
        most = self._memory.rows["inputs"]
        for tokens in sorted({1, *(min(rows, most) for rows in (*CLASSES, *(4 << i for i in range(16))))}):
            self._encode([(0, min(longest, tokens - done)) for done in range(0, tokens, longest)])
        if self._device.real:
            self._load_library(self._encoder)
        return used

    def _begin(self, inputs: StepInputs) -> StepInputs:
        """Apply the changes of slots, run the encoder where inputs are complete, and return the decoder's step."""
        inputs = super()._begin(inputs)
        lengths = input_lengths(inputs.slots, self._slots.parameters.rows)
        for some in together(completed_inputs(inputs, lengths), self._memory.rows["inputs"]):
            self._encode(some)
        return of_decoder(inputs, lengths)

    def _encode(self, some: list[tuple[int, int]]) -> None:
        """Run the encoder over whole inputs, given by slot and length."""
        slots, lengths = np.array(some, np.int32).T
        sizes = self._arrays.mixed(StepInputs(slots, slots * 0, lengths, slots[:0]), as_runs=True)
        for launch in self._encoder:
            launch.run(sizes)


def together(complete: list[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Divide inputs, given by slot and length, among runs of at most `most` tokens, in order."""
    some: list[tuple[int, int]] = []
    for slot, length in complete:
        if some and sum(n for _, n in some) + length > most:
            yield some
            some = []
        some.append((slot, length))
    if some:
        yield some


def _encodes(launch: Launch) -> bool:
    return launch.op.out.spec.rows == "inputs"
