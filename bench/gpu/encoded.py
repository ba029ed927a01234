"""Measure decode steps of an encoder and decoder on a GPU, with the sizes of its attention and with others.

    python3 -m bench.gpu.encoded                 flan-t5-large, 1 and 32 sequences with inputs of 512 tokens
    python3 -m bench.gpu.encoded --variants      other sizes, too; the best are copied by hand into `shapes.py`

A figure is the time of a whole captured step 64 tokens behind the inputs, random weights; beside it that of the step
without one kind of attention, and the floor: weights and cache at 4 TB/s.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bench.gpu.engine import RandomWeights
from bench.gpu.floor import decode_ms
from bench.gpu.shapes import SHAPES
from bench.gpu.tell import figure
from bench.gpu.timing import graph_us
from tokenmill.backends.base import Admitted, StepInputs, StepLimits
from tokenmill.backends.cuda import encoded_attention
from tokenmill.backends.cuda.encoded import EncoderDecoderBackend
from tokenmill.backends.cuda.shapes import DecodeShape, span_shape
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.backends.kind import BackendOptions, Job, Placement
from tokenmill.models.base import program_of
from tokenmill.parallel.group import Group
from tokenmill.program.encoded import CrossAttention, DecoderAttention
from tokenmill.quant.base import reader_of
from tokenmill.wire.messages import Request, SamplingParams, StoppingParams

_SHAPE, _INPUT, _BEHIND = "flan-t5-large", 512, 64
_VARIANTS = {
    1: [(32, 16, 32, 2, 2), (64, 8, 64, 1, 4), (128, 4, 128, 1, 8), (32, 16, 32, 1, 1)],
    32: [(64, 1, 64, 3, 4), (32, 4, 32, 3, 2), (64, 2, 64, 3, 4), (64, 8, 64, 1, 4), (32, 2, 32, 3, 1)],
}


def backend_of(rows: int, layers: int = 0, device: str = "cuda") -> EncoderDecoderBackend:
    """Return a backend in which `rows` sequences have had their inputs, with a cache of zeros."""
    config = SHAPES[_SHAPE] | ({"num_layers": layers, "num_decoder_layers": layers} if layers else {})
    weights: Any = RandomWeights(config)
    limits = StepLimits(1024, 256, 1024, 16)
    options = BackendOptions(device=device, dtype="bfloat16", cuda_graphs=(), cpus=os.cpu_count() or 1)
    job = Job(
        program_of(config), weights, reader_of(weights), limits, Group(), options, Placement(device, 16, 1),
        "bfloat16", lambda progress: None,
    )  # fmt: skip
    backend = EncoderDecoderBackend(job)
    each = -(-(_INPUT + _BEHIND + 1) // limits.block_size)
    backend.allocate(rows * each)
    prompt, nothing = tuple(range(2, _INPUT + 2)), np.zeros(0, np.int32)
    admitted = [
        Admitted(i, Request(i, (*prompt, 0), SamplingParams(), StoppingParams(99)), np.array([*prompt, 0], np.int32))
        for i in range(rows)
    ]
    blocks = np.array([(0, i, j, i * each + j) for i in range(rows) for j in range(each)], np.int32)
    backend._slots.apply(StepInputs(nothing, nothing, nothing, nothing, tuple(admitted), blocks))
    return backend


class Steps:
    """Decode steps of so many sequences."""

    def __init__(self, backend: EncoderDecoderBackend, rows: int) -> None:
        self._backend, self.rows = backend, rows
        slots = np.arange(rows, dtype=np.int32)
        self._sizes: Sizes = backend._arrays.decode(slots, slots * 0 + _INPUT + _BEHIND, rows)

    def ms(self, without: type | None = None) -> float:
        """Return the milliseconds of a step. `without`: a kind of operation that is left out."""
        backend, few = self._backend, self.rows <= 64
        body = backend._batch_one if self.rows == 1 else [*backend._body, *backend._tail]
        launches = [launch for launch in body if without is None or not isinstance(launch.op, without)]
        sizes = replace(self._sizes, early=backend._device.launches_ahead and few)

        def run(i: int) -> None:
            for launch in launches:
                launch.run(sizes)
            backend._sampler.launch(sizes)

        return round(graph_us(run, repeats=4) / 1e3, 3)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.gpu.encoded", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--variants", action="store_true")
    args = parser.parse_args()
    batches = [int(rows) for rows in args.batches.split(",")]
    backend = backend_of(max(batches))
    with torch.inference_mode():
        for rows in batches:
            steps = Steps(backend, rows)
            floor = decode_ms(backend.program, rows, _INPUT + _BEHIND)
            figure(_SHAPE, f"decode step, batch {rows}", ms := steps.ms(), "ms", floor_ms=round(floor, 3),
                   of_floor=round(ms / floor, 2), without_cross=steps.ms(CrossAttention),
                   without_own=steps.ms(DecoderAttention))  # fmt: skip
            for variant in _VARIANTS.get(rows, []) if args.variants else []:
                shape = DecodeShape(*variant)
                encoded_attention.span_shape = lambda *_, shape=shape: shape  # type: ignore[assignment,misc]
                figure(_SHAPE, f"decode step, batch {rows}, {variant}", steps.ms(), "ms")
            encoded_attention.span_shape = span_shape


if __name__ == "__main__":
    main()
