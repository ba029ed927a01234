"""The interface of a folder of `backends/`: what it answers before anything is read, and how its backend is made.

A folder's `__init__.py` has a `KIND`. Importing it is cheap: libraries are imported by the methods that need them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tokenmill.backends.accounts import Use
from tokenmill.backends.base import Backend, StepLimits
from tokenmill.parallel.group import Group
from tokenmill.parallel.mesh import Mesh
from tokenmill.program.shard import shard
from tokenmill.program.value import Program
from tokenmill.quant.base import Reader
from tokenmill.quant.coded import Coded
from tokenmill.weights.checkpoint import Checkpoint
from tokenmill.wire.messages import Progress

Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """User options that select and configure a backend. "" and None: not given."""

    backend: str = "auto"  # or the name of a kind
    device: str = "auto"  # "cpu", "cuda"
    dtype: str = ""
    quantize: str = ""
    kv_cache_dtype: str = ""
    deterministic: bool = False
    expert_parallel: bool = False  # a rank has some of a layer's experts, instead of a part of each
    attention: str = ""  # the user's name, or TGI's
    cpu_isa: str = ""
    cpu_threads: int | None = None
    cpus: int = 1  # that the ranks of this engine may use
    kernel_cache: str = ""  # folder; "": in the user's cache
    cuda_graphs: tuple[int, ...] | None = None  # batch sizes
    cuda_memory_fraction: float = 1.0  # of the device's memory
    trust_remote_code: bool = False  # Python code of a model's folder may be run
    device_index: int = 0  # of this rank's device, among those that this process sees
    local_ranks: int = 1  # ranks of all engines on this machine
    device_sharers: int = 1  # ranks that compute on this rank's device, at most
    share_devices: bool = False  # ranks may share devices and CPUs, for tests
    engine: int = 0  # number of this engine
    engines: int = 1  # on this machine
    nodes: int = 1  # machines of the ranks of an engine
    rank_timeout_s: float = 600.0  # time for the ranks of an engine to meet


class Placement(NamedTuple):
    """Circumstances that a backend must fit."""

    device: str  # "cpu", "cuda"
    block_size: int  # tokens of a cache block
    ranks: int  # that share each operation
    stages: int = 1  # into which the model is cut


class Defaults(NamedTuple):
    """Numbers that suit a device, where the user gave none."""

    batch_tokens: int  # of a step
    batch_size: int  # sequences of a step
    prefill_beside: int  # prompt tokens of a step in which others decode; 0: no bound
    max_chunk: int  # prompt tokens of a piece of a long prompt; 0: no bound
    owns_memory: bool  # all free memory of the device may be taken


CPU_DEFAULTS = Defaults(
    batch_tokens=512,  # a longer step only makes the running sequences wait
    batch_size=128,
    prefill_beside=32,  # each lengthens the step that the others wait for
    max_chunk=128,  # a prompt that arrives meanwhile waits for two such steps; it costs nothing measurable
    owns_memory=False,
)
GPU_DEFAULTS = Defaults(
    batch_tokens=8192,  # on an H200 longer steps give nothing, and shorter ones down to 2,048 cost 2 %
    batch_size=256,
    # The step that others wait for may take three times as long as theirs alone, which is the time of reading the
    # weights. So many tokens take two of these: 2 x 650 TFLOP/s over 4.8 TB/s are 270 on an H200, 390 on an H100 of
    # 3.35 TB/s.
    prefill_beside=320,
    max_chunk=2048,  # likewise: the smallest that costs the long prompt little
    owns_memory=True,
)


class Job(NamedTuple):
    """All that a backend is made of."""

    program: Program  # of this rank's stage, at full size
    source: Checkpoint
    read: Reader
    limits: StepLimits
    group: Group  # the ranks of this stage
    options: BackendOptions
    placement: Placement
    dtype: str  # from `Kind.dtype`
    report: Report
    mesh: Mesh = Mesh()

    def of_rank(self) -> Program:
        """Return the program that a rank runs. Raises Unsupported if ranks cannot share the model."""
        return shard(self.program, self.group.size, whole_experts=self.options.expert_parallel)


class Description(NamedTuple):
    """A backend's account of how it would serve a model."""

    text: str
    details: tuple[str, ...] = ()
    state: str = ""  # of its kernels
    flaw: str = ""  # it serves, but not as it should


class Kind(Protocol):
    """A backend that can be chosen. One instance a folder, without state."""

    @property
    def name(self) -> str:
        """The folder's name, as users give it."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices that it computes on."""

    @property
    def preference(self) -> int:
        """Rank among the kinds of one device: the lowest that can run a program serves it."""

    def missing(self) -> str:
        """Return why this machine lacks the device of this kind; "" if it does not. Cheap."""

    def refusal(self, program: Program, options: BackendOptions, placement: Placement) -> str:
        """Return why this kind cannot run a recorded program; "" if it can. Reads no weight."""

    def check(self, options: BackendOptions, placement: Placement, reason: str) -> None:
        """Raise a StartError, with the cure, for an option or a package that this kind does not have.

        `reason`: why the device's own backend does not serve; "" if this one was asked for or is the device's own.
        """

    def defaults(self, device: str) -> Defaults:
        """Return the numbers that suit the device."""

    def dtype(self, stored: str, wanted: str) -> str:
        """Return the dtype to compute in. `stored`: the checkpoint's, or ""; `wanted`: the user's, or ""."""

    def weight_bytes(self, program: Program, source: Checkpoint, dtype: str, quantize: str = "") -> int:
        """Return the bytes of all weights over all ranks, in this kind's storage format.

        `quantize`: the user's option. May read a few rows of some matrices.

        Raise ModelError if the checkpoint lacks a weight or has one of another shape.
        """

    def num_devices(self, device: str) -> int | None:
        """Return the number of devices that this process sees, of which each rank takes one; None for the host."""

    def room(self, options: BackendOptions, device: str) -> int | None:
        """Return the bytes of the device's memory that may still be taken; None where that is the host's memory."""

    def instruction_set(self, options: BackendOptions) -> str:
        """Return the name of what kernels are made for: another may round differently."""

    def make(self, job: Job) -> Backend:
        """Read the weights and return the backend. Raise NotEnoughMemory or MemoryError if there is no room."""

    def form(self, parts: Sequence[Coded], use: Use, dtype: str) -> str:
        """Return the form in which products of this kind read a matrix, of these parts one below the other, for users.

        `parts`: all their columns, and some of their rows. `dtype`: of the computation.
        """

    def describe(
        self, program: Program, source: Checkpoint, options: BackendOptions, dtype: str, ranks: int = 1
    ) -> Description:
        """Return how a model would be served, kernel by kernel. `program`: at full size; `ranks`: that share it."""

    def compile(
        self, program: Program, source: Checkpoint, options: BackendOptions, report: Report, ranks: int = 1
    ) -> str | None:
        """Compile what a first start would, and return what was done; None if only a whole start does that."""
