"""Steps of a program with an encoder, independently of the device.

The last token of a prompt begins the answer; those before are the encoder's input. A step that computes the last token
of an input runs the encoder over the whole input, which the slot holds, and stores keys and values at its positions.
All other tokens of inputs cost nothing: the decoder gets a step without them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.base import StepInputs


def input_lengths(slots: NDArray[np.int32], parameters: NDArray[np.void]) -> NDArray[np.int32]:
    """Return the number of tokens of the input of each of `slots`. A slot without a request, in a warm-up, has one.

    `parameters`: `sampling.Parameters.rows`.
    """
    lengths: NDArray[np.int32] = np.maximum(parameters["num_prompt"][slots] - 1, 1)
    return lengths


def completed_inputs(inputs: StepInputs, lengths: NDArray[np.int32]) -> list[tuple[int, int]]:
    """Return slot and length of each input whose last token a step computes. `lengths`: of each row's input."""
    last = lengths - 1
    complete = (inputs.starts <= last) & (last < inputs.starts + inputs.counts)
    return list(zip(inputs.slots[complete].tolist(), lengths[complete].tolist(), strict=True))


def of_decoder(inputs: StepInputs, lengths: NDArray[np.int32]) -> StepInputs:
    """Return a step without the tokens of inputs, and without rows that have no others.

    `lengths`: of each row's input, in tokens.
    """
    starts = np.maximum(inputs.starts, lengths)
    counts = inputs.starts + inputs.counts - starts
    kept = np.flatnonzero(counts > 0)
    samples = np.searchsorted(kept, inputs.samples).astype(np.int32)
    return replace(inputs, slots=inputs.slots[kept], starts=starts[kept], counts=counts[kept], samples=samples)
