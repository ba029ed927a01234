"""The CUDA backend: a program as a list of launches, captured as graphs for the sizes of decode steps.

The device's queue orders all work: `run` launches a step behind those before it and returns. The step's tokens are on
the device when the next step reads them, and in a pinned buffer when the host does. Not thread-safe.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tokenmill.backends.base import Masks, Step, StepInputs
from tokenmill.backends.cuda import flashinfer
from tokenmill.backends.cuda.account import Account, graph_bytes, library_bytes
from tokenmill.backends.cuda.attention import AttentionOptions, Scales, fewest_kv_heads
from tokenmill.backends.cuda.batch_one import BatchOneFusion
from tokenmill.backends.cuda.compile import Kernels
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.graphs import Graphs
from tokenmill.backends.cuda.launch import Launch
from tokenmill.backends.cuda.lower import Lowering
from tokenmill.backends.cuda.memory import Memory
from tokenmill.backends.cuda.pack import pack
from tokenmill.backends.cuda.prepare import DTYPES, fused, refusal
from tokenmill.backends.cuda.products.base import FEW
from tokenmill.backends.cuda.ranks import Ranks
from tokenmill.backends.cuda.sampler import Sampler
from tokenmill.backends.cuda.scales import advice, kv_scales
from tokenmill.backends.cuda.shapes import Contexts, library_sizes, variants
from tokenmill.backends.cuda.sizes import Sizes, StepArrays
from tokenmill.backends.cuda.slots import CudaSlots
from tokenmill.backends.cuda.states import CudaStates
from tokenmill.backends.cuda.step import CudaStep, Sampling
from tokenmill.backends.cuda.warm_up import warm_up_of
from tokenmill.backends.kind import Job
from tokenmill.backends.steps import PROMPT_ROWS, PromptPositions, prompt_payloads
from tokenmill.backends.torch.sampling import Logprobs, score
from tokenmill.errors import NotEnoughMemory, Unsupported
from tokenmill.program import ops
from tokenmill.program.cost import cache_layout, state_layout
from tokenmill.program.value import Program
from tokenmill.weights.checkpoint import Checkpoint
from tokenmill.wire.messages import Progress, TokenDetails

_DTYPES = {name: getattr(torch, name) for name in DTYPES}
_log = logging.getLogger(__name__)

CACHE_DTYPES = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


class CudaBackend:
    """Implements `backends.base.Backend` for one device.

    The constructor reads the weights and calls the job's `report` meanwhile. It raises Unsupported, with the reason,
    for a program that another backend has to run. Of the job's options it takes `cuda_graphs`, `kv_cache_dtype`,
    `deterministic`, `kernel_cache` ("": Triton's), `cpus` (processes that compile) and `attention` ("flashinfer": its
    kernels compute runs of tokens). Device "cpu": under Triton's interpreter, for tests.
    """

    def __init__(self, job: Job) -> None:
        options, limits = job.options, job.limits
        of_rank = job.of_rank()
        if why := refusal(of_rank, job.dtype, options.deterministic):
            raise Unsupported("CUDA backend", "cuda", (), f"Of this model, {why}. Use --backend torch.")
        self.limits, self.group, self.num_blocks = limits, job.group, 0
        self.program = fused(of_rank)
        self.vocab_size = self.program.logits.width
        self._device = Device(job.placement.device, options.device_index)
        dtype, self._report = _DTYPES[job.dtype], job.report
        about = (
            self.program, limits, job.dtype, options.cuda_graphs, options.kv_cache_dtype, options.deterministic,
            options.attention, self.group.size,
        )  # fmt: skip
        jobs = options.cpus if self.group.rank == 0 else 1  # the other ranks find what rank 0 compiled
        self._kernels = Kernels(options.kernel_cache, jobs, about)  # its helpers start while weights are read
        try:
            self._weights = pack(
                self.program, job.source, job.read, job.group, dtype, self._device, job.report, options.quantize
            )
            self._memory = Memory(
                self.program, limits, dtype, self._device, CACHE_DTYPES.get(options.kv_cache_dtype),
                windows=options.attention != "flashinfer",
            )  # fmt: skip
            self._ranks = Ranks(job.group, self._memory, options.deterministic)
            self._slots = CudaSlots(limits, self._device, len(self.windows))
            self._states = CudaStates(state_layout(self.program), self._slots.padding + 1, dtype, self._device)
            self.logits = self._memory.value(self.program.logits)
            own = Sampler(self.logits, self._slots, self._device, options.deterministic)
            self._sampler = self._ranks.sampler(own, self._slots, self._device)
            self._attention = self._attention_options(job)
            self._lowering = Lowering(
                self._memory, self._weights, self._slots, self._states, self._attention, self._ranks.collectives
            )
            kinds = self._lowering.tile_tokens, self._lowering.expands, fewest_kv_heads(self.program)
            self._arrays = StepArrays(limits, self._device, self._slots.padding, *kinds, self._memory.rows["inputs"])
        except torch.OutOfMemoryError as e:
            self._kernels.close()
            raise NotEnoughMemory(
                f"The device has no room for weights and the largest step ({e}). Serve a smaller model, or give a "
                "smaller --max-batch-prefill-tokens, --max-total-tokens or --max-batch-size."
            ) from e
        self._body: list[Launch] = []
        self._tail: list[Launch] = []
        self._batch_one: list[Launch] = []
        self._graphs = Graphs(self._device, limits.max_batch_size, options.cuda_graphs, self._memory.coded)
        self._free = 0
        self._account = self._count()
        torch.cuda.empty_cache()  # The free memory is then the memory that a cache can have.

    def _attention_options(self, job: Job) -> AttentionOptions:
        options = job.options
        scales = _cache_scales(job.source, self.program, options.kv_cache_dtype)
        flash = None
        if options.attention == "flashinfer" and any(spec.window for spec in cache_layout(self.program).values()):
            _log.info("Layers with a window keep the blocks of all tokens, because flashinfer may read those before.")
        if options.attention == "flashinfer" and not options.deterministic:
            flash = flashinfer.load(self._memory, self._slots, scales, job.report)
        return AttentionOptions(options.deterministic, scales, flash, self.group.rank)

    # ---- the Backend protocol ----

    @property
    def windows(self) -> tuple[int, ...]:
        """Windows by block table: see `Backend`."""
        return self._memory.cache_plan.windows

    def block_bytes(self) -> int:
        """Return the bytes of one cache block."""
        return self._memory.block_bytes()

    def step_bytes(self) -> int:
        """Return the bytes needed besides weights and cache: by a step, by graphs, by libraries."""
        return self.claimed_bytes() + self._account.to_come

    def claimed_bytes(self) -> int:
        """Return the bytes of `step_bytes` that are taken already."""
        return self._account.step + self._account.states + self._account.sampler

    def allocate(self, num_blocks: int) -> None:
        """Make the cache, once, before the first step. Raise NotEnoughMemory if it does not fit."""
        try:
            self._memory.allocate(num_blocks)
        except torch.OutOfMemoryError as e:
            wanted = num_blocks * self.block_bytes()
            raise NotEnoughMemory(f"A cache of {num_blocks} blocks needs {wanted} bytes: {e}") from e
        self.num_blocks = num_blocks
        self._slots.set_blocks(self._slots.padding, np.array([num_blocks], np.int32))
        self._free = self._device.free_bytes()
        launches = self._lowering.launches()
        first = next((i for i, line in enumerate(launches) if isinstance(line.op, ops.TakeRows)), len(launches))
        self._body, self._tail = launches[:first], launches[first:]
        if not self._attention.batch_invariant:
            self._batch_one = BatchOneFusion(self._lowering, self._memory).launches()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile every kernel that a step may need and capture the graphs; slots and cache are empty afterwards.

        Raise NotEnoughMemory if there is less memory than `step_bytes` counted on.
        """
        report = self._report
        try:
            with self._ranks.unlaunched():
                self._kernels.prepare(
                    self._launch_all, lambda done, total: report(Progress("compile", done, total, "kernels"))
                )
            self._ranks.agree(True)  # The other ranks load what rank 0 compiled.
            used = self._launch_all()
            for rows, contexts in self._graphs.missing(self._graphs.first):
                self._capture(rows, contexts)
        except torch.OutOfMemoryError as e:
            raise NotEnoughMemory(
                f"Beside weights and cache, the device has no room for a step ({e}). Give a smaller "
                "--cuda-memory-fraction, or end what else uses the device."
            ) from e
        self._slots.tables[0].zero_()
        self._slots.tokens.zero_()
        self._states.clear()
        self._memory.clear(-(-used // self.limits.block_size))
        self._device.finish()
        self._ranks.started()
        self._kernels.watch()
        if self._device.real:
            free, cache = self._device.free_bytes(), self.num_blocks * self.block_bytes()
            tokens, several = self.num_blocks * self.limits.block_size, len(self.windows) > 1
            capacity = f"{self.num_blocks:,} blocks" if several else f"{tokens:,} tokens"
            self._account.log(cache, capacity, self._free - free, free)

    def _launch_all(self) -> int:
        """Launch every kernel that a step may need, and return the number of cache places that were written to."""
        nothing = np.zeros(0, np.int32)
        work = warm_up_of(
            self.limits, self.num_blocks, self._slots.padding, self._graphs.first, len(self.windows), self._memory.coded
        )
        self._slots.apply(StepInputs(nothing, nothing, nothing, nothing, blocks=work.blocks))
        self._sampler.warm_up_some(self._arrays.buffer)  # First, because its kernels take longest to compile.
        for inputs in work.runs:
            self._forward(self._mixed(inputs))
        for inputs, contexts in work.mixed:
            self._forward(replace(self._mixed(inputs), contexts=contexts))
        for rows in work.decodes:
            for contexts in variants(rows, self._memory.coded):
                self._decode(self._padding_step(rows, contexts))
            self._sampler.warm_up(self._padding_step(rows, Contexts.ALIKE))
        if self._device.real:
            self._load_library([*self._body, *self._tail])
        return work.tokens

    def _load_library(self, launches: list[Launch]) -> None:
        """Load the kernels of cuBLAS by using each once: a first use takes some 10 ms."""
        seen = set()
        for launch in launches:
            if isinstance(launch.op, ops.Linear):
                rows = self._memory.rows[launch.op.out.spec.rows]
                matrix = launch.op.out.width, launch.op.x.width, launch.op.bias is None, rows
                for size in library_sizes(rows) if matrix not in seen else ():
                    launch.run(Sizes(size, size, self._arrays.buffer))
                seen.add(matrix)

    @torch.inference_mode()
    def idle_work(self) -> bool:
        """Capture one more graph, some tens of milliseconds; return True while more remain.

        Slots and cache may be in use: the captured step has padding rows only.
        """
        missing = self._graphs.missing(self._graphs.later)
        if not missing:
            return False
        self._device.finish()
        why: RuntimeError | None = None
        try:
            self._decode(self._padding_step(*missing[0]))
            self._capture(*missing[0])
        except RuntimeError as error:  # out of memory, or the error that a capture turns it into
            why = error
        if not self._ranks.agree(why is None):
            told = why or "it failed on another rank"
            _log.warning("%d more graphs of decode steps cannot be captured: %s", len(missing), told)
            self._graphs.give_up(missing[0][0])
        return bool(self._graphs.missing(self._graphs.later))

    def run(self, inputs: StepInputs) -> Step:
        """Launch a step behind those before it and return at once. Raise OutOfMemory: nothing of it counts."""
        return self._ranks.launch(lambda: self._run(inputs))

    @torch.inference_mode()
    def _run(self, inputs: StepInputs) -> Step:
        inputs = self._begin(inputs)
        rows = len(inputs.slots)
        decodes = 0 < rows == len(inputs.samples) and int(inputs.counts.max()) == 1
        if decodes:
            padded = self._graphs.padded(rows)
            sizes = self._arrays.decode(inputs.slots, inputs.starts, padded or rows)
            if padded:
                self._graphs.replay(padded, sizes.contexts)
                sizes = replace(sizes, tokens=rows, sampling=rows)
            else:
                self._decode(sizes)
        else:
            sizes = self._mixed(inputs)
            if rows:
                self._forward(sizes)
        step = CudaStep(lambda masks: self._ranks.launch(lambda: self._sample(inputs, sizes, decodes, masks)))
        if not inputs.deferred:
            step.sample(None)
        return step

    def _begin(self, inputs: StepInputs) -> StepInputs:
        """Apply the changes of slots, and return what is left to compute."""
        self._slots.apply(inputs)
        self._states.advance(inputs)
        return inputs

    @torch.inference_mode()
    def _sample(self, inputs: StepInputs, sizes: Sizes, decodes: bool, masks: Masks | None) -> Sampling:
        sampled: tuple[Tensor | None, Logprobs | None] = None, None
        if len(inputs.samples):
            sampled = self._sampler.sample(inputs, sizes, decodes, masks)
        prompt = prompt_payloads(inputs, self._slots.parameters.rows, lambda part: self._score(part, sizes))
        return Sampling(*sampled, prompt, self._ranks.checked(self._device.mark()))

    def close(self) -> None:
        """Drop the graphs and end the compiling processes. Idempotent."""
        self._device.finish()
        self._graphs.clear()
        self._kernels.close()
        self._ranks.close()

    def _count(self) -> Account:
        """Return the memory taken besides the cache."""
        held = [tensor for tensor in vars(self._slots).values() if isinstance(tensor, Tensor)]
        held += [self._arrays.buffer, *self._memory.rotations()]
        lowered = self._lowering.nbytes + self._ranks.nbytes
        return Account(
            weights=self._weights.nbytes,
            step=self._memory.step_bytes + lowered + sum(tensor.nbytes for tensor in held),
            sampler=self._sampler.nbytes,
            states=self._states.nbytes,
            # float32 logits of prompt positions, and two copies
            passing=max(self._sampler.step_bytes, 3 * PROMPT_ROWS * self.vocab_size * 4),
            graphs=graph_bytes(len(self._graphs), self._lowering.num_launches),
            libraries=library_bytes(self._device.real),
        )

    # ---- a step ----

    def _padding_step(self, rows: int, contexts: Contexts) -> Sizes:
        """Return a decode step of padding rows only."""
        slots = np.full(rows, self._slots.padding, np.int32)
        return replace(self._arrays.decode(slots, slots * 0, rows), contexts=contexts)

    def _capture(self, rows: int, contexts: Contexts) -> None:
        sizes = self._padding_step(rows, contexts)
        self._graphs.capture(rows, contexts, lambda: self._decode(sizes))

    def _decode(self, sizes: Sizes) -> None:
        """Launch one token a row, sampled by logits and temperature alone. `Sampler.sample` may replace the tokens."""
        sizes = replace(sizes, early=self._device.launches_ahead and sizes.tokens <= FEW)
        if sizes.tokens != 1 or not self._batch_one:
            self._forward(sizes)
        else:
            for launch in self._batch_one:
                launch.run(sizes)
        self._sampler.launch(sizes)

    def _forward(self, sizes: Sizes) -> None:
        for launch in self._body:
            launch.run(sizes)
        if sizes.sampling:
            for launch in self._tail:
                launch.run(sizes)

    def _mixed(self, inputs: StepInputs) -> Sizes:
        """Send a step of single tokens and runs of several, and plan flashinfer's part of it."""
        if self._attention.flash is not None and (inputs.counts > 1).any():
            self._attention.flash.plan(inputs.slots, inputs.starts, inputs.counts)
        return self._arrays.mixed(inputs)

    def _score(self, part: PromptPositions, sizes: Sizes) -> list[TokenDetails | None]:
        """Return the details of some positions' targets. Waits for the device."""
        send = self._device.send
        rows = send(part.tokens.astype(np.int32))
        again = replace(sizes, sampling=len(rows), samples=rows)
        for launch in self._tail:
            launch.run(again)
        if self.group.rank:
            return [None] * len(part.rows)
        targets = self._slots.tokens[send(part.slots.astype(np.int64)), send(part.targets.astype(np.int64))].long()
        return score(self.logits[: len(rows)], targets, part.top)


def _cache_scales(source: Checkpoint, program: Program, kv_cache_dtype: str) -> Scales:
    layers = list(cache_layout(program))
    if kv_cache_dtype:
        return kv_scales(source, layers, kv_cache_dtype)
    if about := advice(source, layers):
        _log.info("KV cache: %s.", about)
    return {}
