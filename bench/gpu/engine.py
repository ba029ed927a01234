"""Build the engine for offline measurements: random weights in memory, the CUDA backend, the server's scheduler."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from bench.gpu.quantized import kind_of, reader
from bench.gpu.shapes import SHAPES
from bench.gpu.tell import tell
from bench.gpu.tensors import shapes_of
from tokenmill.backends.base import Backend, Step, StepInputs, StepLimits
from tokenmill.backends.kind import GPU_DEFAULTS, BackendOptions, Job
from tokenmill.models.base import program_of
from tokenmill.parallel.group import Group
from tokenmill.program.cost import state_layout
from tokenmill.program.encoded import encodes
from tokenmill.program.value import Program
from tokenmill.quant.base import reader_of
from tokenmill.runtime.assembly import Assembled, scheduler_of
from tokenmill.runtime.choice import choose, make_backend
from tokenmill.runtime.executor import Executor
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.weights.checkpoint import Stored
from tokenmill.wire.messages import EngineInfo

_LEFT_FREE = 6 << 30  # bytes of device memory that the cache leaves free


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Configuration of an engine. `options`: fields of `BackendOptions` that differ from its defaults.

    `quantize`: a kind of `quantized.kind_of`, for random codes, or a method of the server, which quantizes as it loads.
    """

    shape: str = "1b"
    layers: int = 0  # 0: those of the shape
    device: str = "cuda"  # "cpu": the torch backend, to try a measurement without a GPU
    max_batch_tokens: int = 8192
    max_batch_size: int = 256
    max_total_tokens: int = 4096
    block_size: int = 16
    beside: int | None = None  # prompt tokens of a step with decoding rows; None: as in the server
    quantize: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        return SHAPES[self.shape] | ({"num_hidden_layers": self.layers} if self.layers else {})


class RandomWeights:
    """Checkpoint of any size, whose tensors are slices of the same random numbers."""

    format = "safetensors"

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self._shapes = shapes_of(program_of(config))
        most = max(int(np.prod(shape)) for shape in self._shapes.values())
        drawn = torch.randn(min(most, 1 << 24), generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
        self._numbers = np.resize(drawn.view(torch.int16).numpy(), most + 4096)

    def names(self) -> Iterator[str]:
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes.get(name)

    def nbytes(self, name: str) -> int:
        return int(np.prod(self._shapes[name])) * 2

    def __getitem__(self, name: str) -> Stored:
        shape = self._shapes[name]
        first = zlib.crc32(name.encode()) % 4096
        data = self._numbers[first : first + int(np.prod(shape))]
        return Stored(name, "BF16", shape, data.view(np.uint8).reshape(shape[0], -1))


class Timed:
    """Backend wrapper that times launches."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.seconds, self.steps = backend, 0.0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def run(self, inputs: StepInputs) -> Step:
        start = time.perf_counter()
        step = self.backend.run(inputs)
        self.seconds, self.steps = self.seconds + time.perf_counter() - start, self.steps + 1
        return step

    def reset(self) -> None:
        """Reset the timings to zero."""
        self.seconds, self.steps = 0.0, 0


class Built:
    """Backend, scheduler and engine of a setup, after warm-up. `start_s`: seconds of loading and of warm-up."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.real = setup.device == "cuda"
        size, config, start = setup.block_size, setup.config(), time.perf_counter()
        weights, program = RandomWeights(config), program_of(config)
        limits = StepLimits(setup.max_batch_tokens, setup.max_batch_size, setup.max_total_tokens, size)
        drawn = time.perf_counter()
        self.backend: Any = _backend(setup, program, weights, limits)
        loaded = time.perf_counter()
        wanted = max(setup.max_batch_size * 4096, 2 * setup.max_total_tokens) // size
        blocks = min(wanted, self._room() // max(1, self.backend.block_bytes()))
        self.backend.allocate(blocks)
        self.backend.warm_up()
        ready = time.perf_counter()
        self.timed = Timed(self.backend)
        info = EngineInfo(
            "bench", "bfloat16", "cuda", "cuda", blocks, size, config["vocab_size"], setup.max_total_tokens - 1,
            setup.max_total_tokens, setup.max_batch_tokens, setup.max_batch_size,
            shares_prefixes=not (state_layout(program) or encodes(program)),
        )  # fmt: skip
        self.scheduler = scheduler_of(info, GPU_DEFAULTS, program, self.backend.windows)  # as in the server
        if setup.beside is not None:
            self.set_beside(setup.beside)
        parts = Assembled(self.scheduler, Executor(self.timed, setup.max_batch_size), info)  # type: ignore[arg-type]
        self.engine = OfflineEngine(parts)  # runs the deferred idle work, such as capture of further graphs
        rested = time.perf_counter()
        tell(bench="start", shape=setup.shape, drawn_s=round(drawn - start, 2), weights_s=round(loaded - drawn, 2),
             warm_up_s=round(ready - loaded, 2), put_off_s=round(rested - ready, 2), blocks=blocks,
             beside=self.beside, quantize=setup.quantize, options=setup.options)  # fmt: skip

    @property
    def beside(self) -> int:
        """Limit of prompt tokens in a step with decoding rows; 0: no limit."""
        return self.scheduler.limits.prefill_beside

    def set_beside(self, tokens: int) -> None:
        """Set `beside`. Call it only while no request runs."""
        self.scheduler.limits = replace(self.scheduler.limits, prefill_beside=tokens)

    def finish(self) -> None:
        """Wait for the device."""
        if self.real:
            torch.cuda.synchronize()

    def _room(self) -> int:
        return int(torch.cuda.mem_get_info()[0]) - _LEFT_FREE if self.real else 1 << 26


def _backend(setup: Setup, program: Program, weights: RandomWeights, limits: StepLimits) -> Backend:
    """Create the backend as the server does. Raises StartError for unsupported features."""
    name = "cuda" if setup.device == "cuda" else "torch"
    cores = os.cpu_count() or 1
    drawn = kind_of(setup.quantize) is not None
    options = BackendOptions(
        backend=name, device=setup.device, dtype="bfloat16", cpus=cores, quantize="" if drawn else setup.quantize,
        **setup.options,
    )  # fmt: skip
    choice = choose(program, options, setup.block_size, 1)
    read = reader(setup.quantize) if drawn else reader_of(weights, options.quantize)  # type: ignore[arg-type]
    job = Job(program, weights, read, limits, Group(), options, choice.placement, options.dtype, lambda progress: None)
    return make_backend(choice, job)
