"""The CUDA backend: a program as a list of launches, captured as graphs for the sizes of decode steps.

The device's queue is the order of everything: `run` launches a step behind those before it and returns; its tokens are
on the device when the next step needs them, and in a pinned buffer when the host asks. One thread at a time.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.backends.base import Masks, Step, StepInputs, StepLimits, prompt_payloads
from tokenmill.backends.cuda import flashinfer
from tokenmill.backends.cuda.account import Account, graph_bytes, library_bytes
from tokenmill.backends.cuda.attention import Manner, tiles_of
from tokenmill.backends.cuda.compile import Kernels
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.graphs import Graphs, variants
from tokenmill.backends.cuda.lower import Launch, Lowering, Sizes
from tokenmill.backends.cuda.memory import PROMPT_ROWS, Memory
from tokenmill.backends.cuda.pack import pack
from tokenmill.backends.cuda.prepare import DTYPES, fused, refusal
from tokenmill.backends.cuda.products import FEW
from tokenmill.backends.cuda.sampler import Sampler
from tokenmill.backends.cuda.scales import kv_scales
from tokenmill.backends.cuda.shapes import CLASSES, LONG, library_sizes
from tokenmill.backends.cuda.single import Single
from tokenmill.backends.cuda.slots import CudaSlots
from tokenmill.backends.cuda.step import CudaStep, Sampling, or_out_of_memory
from tokenmill.backends.torch.pack import Report
from tokenmill.backends.torch.sampling import Logprobs, prompt_details
from tokenmill.backends.torch.slots import PromptPositions
from tokenmill.errors import NotEnoughMemory, Unsupported
from tokenmill.parallel.group import Group
from tokenmill.program import ops
from tokenmill.program.cost import cache_layout
from tokenmill.program.value import Program
from tokenmill.quant.base import Reader
from tokenmill.weights.checkpoint import Checkpoint
from tokenmill.wire.messages import Payload, Progress, TokenDetails

_DTYPES = {name: getattr(torch, name) for name in DTYPES}
_log = logging.getLogger(__name__)

CACHE_DTYPES = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


class CudaBackend:
    """Implements `backends.base.Backend` for one device.

    The constructor reads the weights and calls `report` meanwhile. `graphs`: batch sizes to capture, None: a choice of
    its own. `attention`: "flashinfer" for its kernels where a step has runs of tokens. `kv_cache_dtype`: "fp8_e4m3fn",
    "fp8_e5m2", "": the computation's. `deterministic`: the same tokens whatever shares a step, however a prompt is cut
    and whatever of it was cached. `kernel_cache`: folder, "": Triton's; `jobs`: processes that compile. `device` "cpu":
    under Triton's interpreter, for tests. Unsupported, with the reason, for a program that another backend has to run.
    """

    def __init__(
        self,
        program: Program,
        source: Checkpoint,
        read: Reader,
        limits: StepLimits,
        group: Group,
        *,
        dtype: str = "bfloat16",
        device: str = "cuda",
        graphs: tuple[int, ...] | None = None,
        kv_cache_dtype: str = "",
        deterministic: bool = False,
        attention: str = "",
        kernel_cache: str = "",
        jobs: int = 1,
        report: Report | None = None,
    ) -> None:
        if why := refusal(program, dtype, group.size, deterministic):
            raise Unsupported("CUDA backend", "cuda", (), f"Of this model, {why}. Use --backend torch.")
        self.limits, self.group, self.num_blocks = limits, group, 0
        self.program = fused(program)
        self.vocab_size = self.program.logits.width
        self._device, self._dtype, self._report = Device(device), _DTYPES[dtype], report
        about = (self.program, limits, dtype, graphs, kv_cache_dtype, deterministic, attention)
        self._kernels = Kernels(kernel_cache, jobs, about)  # its helpers start while weights are read
        try:
            self._weights = pack(self.program, source, read, group, self._dtype, self._device, report)
            cache_dtype = CACHE_DTYPES[kv_cache_dtype] if kv_cache_dtype else None
            self._memory = Memory(self.program, limits, self._dtype, self._device, cache_dtype)
            self._slots = CudaSlots(limits, self.vocab_size, self._device)
            self.logits = self._memory.value(self.program.logits)
            self._sampler = Sampler(self.logits, self._slots, self._device, deterministic)
            self._manner = self._manner_of(source, kv_cache_dtype, deterministic, attention)
            self._lowering = Lowering(self._memory, self._weights, self._slots, self._manner)
            most = limits.max_batch_tokens + limits.max_batch_size + 64
            self._step = torch.zeros(2 * most + most + 4 * most, dtype=torch.int32, device=self._device.torch)
        except torch.OutOfMemoryError as e:
            self._kernels.close()
            raise NotEnoughMemory(
                f"The device has no room for weights and the largest step ({e}). Serve a smaller model, or give a "
                "smaller --max-batch-prefill-tokens, --max-total-tokens or --max-batch-size."
            ) from e
        self._body: list[Launch] = []
        self._tail: list[Launch] = []
        self._single: list[Launch] = []
        self._graphs, self._free = Graphs(self._device, limits.max_batch_size, graphs), 0
        self._account = self._count()
        torch.cuda.empty_cache()  # so that what is free now is what a cache can have

    def _manner_of(self, source: Checkpoint, kv_cache_dtype: str, deterministic: bool, attention: str) -> Manner:
        """How attention is computed and its keys and values kept."""
        layers = list(cache_layout(self.program))
        scales = kv_scales(source, layers, kv_cache_dtype) if kv_cache_dtype else {}
        flash = None
        if attention == "flashinfer" and not deterministic:
            flash = flashinfer.load(self._memory, self._slots, scales, self._report)
        return Manner(deterministic, scales, flash)

    # ---- what Backend promises ----

    def block_bytes(self) -> int:
        """Bytes of one cache block over all layers."""
        return self._memory.block_bytes()

    def step_bytes(self) -> int:
        """Bytes that are needed besides weights and cache: by a step, by graphs, by libraries."""
        return self.claimed_bytes() + self._account.to_come

    def claimed_bytes(self) -> int:
        """How many of them are taken already."""
        return self._account.step + self._account.sampler

    def allocate(self, num_blocks: int) -> None:
        """Make the cache, once, before the first step. NotEnoughMemory if there is no room."""
        try:
            self._memory.allocate(num_blocks)
        except torch.OutOfMemoryError as e:
            wanted = num_blocks * self.block_bytes()
            raise NotEnoughMemory(f"A cache of {num_blocks} blocks needs {wanted} bytes: {e}") from e
        self.num_blocks = num_blocks
        self._slots.set_blocks(self._slots.spare, np.array([num_blocks], np.int32))
        self._free = self._device.free_bytes()
        launches = self._lowering.launches()
        first = next((i for i, line in enumerate(launches) if isinstance(line.op, ops.TakeRows)), len(launches))
        self._body, self._tail = launches[:first], launches[first:]
        if not self._manner.alike:
            self._single = Single(self._lowering, self._memory).launches()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile every kernel that a step may need and capture the graphs; slots and cache are empty afterwards.

        NotEnoughMemory if there is less than was counted on.
        """
        report = self._report
        try:
            self._kernels.prepare(
                self._touch, report and (lambda done, total: report(Progress("compile", done, total, "kernels")))
            )
            room = self._touch()
            for rows, long in self._graphs.missing(self._graphs.first):
                self._capture(rows, long)
        except torch.OutOfMemoryError as e:
            raise NotEnoughMemory(
                f"Beside weights and cache, the device has no room for a step ({e}). Give a smaller "
                "--cuda-memory-fraction, or end what else uses the device."
            ) from e
        self._slots.tables[0].zero_()
        self._slots.tokens.zero_()
        self._memory.clear(-(-room // self.limits.block_size))
        self._device.finish()
        self._kernels.watch()
        if self._device.real:
            free, cache = self._device.free_bytes(), self.num_blocks * self.block_bytes()
            self._account.tell(cache, self.num_blocks * self.limits.block_size, self._free - free, free)

    def _touch(self) -> int:
        """Launch every kernel that a step may need, on the first slots and places of the cache; how many of these."""
        size = self.limits.block_size
        room = min(self.num_blocks * size, self.limits.max_total_tokens, self.limits.max_batch_tokens)
        blocks = np.array([(0, block, block) for block in range(-(-room // size))], np.int32)
        nothing = np.zeros(0, np.int32)
        self._slots.apply(StepInputs(nothing, nothing, nothing, nothing, blocks=blocks))
        spare = np.full(max(self.limits.max_batch_size, 1), self._slots.spare, np.int32)
        self._sampler.warm_up_some(self._step)  # first: the compiler needs longest for its kernels
        most = self.limits.max_batch_tokens // room * room
        for tokens in sorted({min(4 << i, most) for i in range(16)}):
            counts = np.full(-(-tokens // room), min(tokens, room), np.int32)
            self._forward(self._sizes(counts * 0, counts * 0, counts, np.zeros(1, np.int32)))
        for rows in sorted({min(rows, len(spare), self.limits.max_batch_tokens - 2) for rows in CLASSES if room > 2}):
            for long in variants(rows) if rows > 0 else ():  # singles beside a run, which is the end of a prompt
                slots = np.concatenate([spare[:rows], [0]]).astype(np.int32)
                counts = np.concatenate([np.ones(rows), [2]]).astype(np.int32)
                starts = counts // 2 * (self.limits.max_total_tokens - 2)
                sizes = self._sizes(slots, starts, counts, np.arange(rows + 1, dtype=np.int32))
                self._forward(replace(sizes, long=long))
        for rows in sorted({min(rows, len(spare)) for rows in CLASSES}.union(self._graphs.first), reverse=True):
            for long in variants(rows):
                self._decode(self._nobodys(rows, long))
            self._sampler.warm_up(self._nobodys(rows, False))
        if self._device.real:
            self._load_library()
        return room

    def _load_library(self) -> None:
        """Let cuBLAS load its kernels: each that a step is the first to use holds it up by some 10 ms."""
        seen = set()
        for launch in (*self._body, *self._tail):
            if isinstance(launch.op, ops.Linear):
                rows = self.limits.max_batch_tokens if launch.op.out.spec.rows == "tokens" else len(self.logits)
                matrix = launch.op.out.width, launch.op.x.width, launch.op.bias is None, rows
                for size in library_sizes(rows) if matrix not in seen else ():
                    launch.run(Sizes(size, size, self._step))
                seen.add(matrix)

    @torch.inference_mode()
    def idle_work(self) -> bool:
        """Capture one more graph, some tens of milliseconds; True while more remain.

        Slots and cache may be in use: what it runs are rows of nobody's.
        """
        missing = self._graphs.missing(self._graphs.later)
        if not missing:
            return False
        self._device.finish()
        try:
            self._decode(self._nobodys(*missing[0]))
            self._capture(*missing[0])
        except RuntimeError as error:  # of memory, or whatever a capture makes of it
            _log.warning("%d more graphs of decode steps cannot be captured: %s", len(missing), error)
            self._graphs.later.clear()
        return len(missing) > 1 and bool(self._graphs.later)

    def run(self, inputs: StepInputs) -> Step:
        """Launch a step behind those before it and return at once. OutOfMemory: nothing of it counts."""
        return or_out_of_memory(lambda: self._run(inputs))

    @torch.inference_mode()
    def _run(self, inputs: StepInputs) -> Step:
        self._slots.apply(inputs)
        rows = len(inputs.slots)
        decodes = len(inputs.samples) == rows and int(inputs.counts.max()) == 1
        if decodes:
            padded = self._graphs.padded(rows)
            sizes = self._sizes_of_decode(inputs.slots, inputs.starts, padded or rows)
            if padded:
                self._graphs.replay(padded, sizes.long)
                sizes = replace(sizes, tokens=rows, sampling=rows)
            else:
                self._decode(sizes)
        else:
            sizes = self._sizes(inputs.slots, inputs.starts, inputs.counts, inputs.samples)
            self._forward(sizes)
        step = CudaStep(lambda masks: or_out_of_memory(lambda: self._sample(inputs, sizes, decodes, masks)))
        if not inputs.deferred:
            step.sample(None)
        return step

    @torch.inference_mode()
    def _sample(self, inputs: StepInputs, sizes: Sizes, decodes: bool, masks: Masks | None) -> Sampling:
        sampled: tuple[Tensor | None, Logprobs | None] = None, None
        if len(inputs.samples):
            sampled = self._sampler.sample(inputs, sizes, decodes, masks)
        prompt = self._prompt_details(inputs, sizes) if inputs.prompt_logprobs >= 0 else None
        return Sampling(*sampled, prompt, self._device.mark())

    def close(self) -> None:
        """Forget graphs and cache. Idempotent."""
        self._device.finish()
        self._graphs.clear()
        self._kernels.close()

    def _count(self) -> Account:
        """Where memory goes besides the cache."""
        held = [tensor for tensor in vars(self._slots).values() if isinstance(tensor, Tensor)]
        tables = {op.rope for op in self.program.ops if isinstance(op, ops.Attention) and op.rope is not None}
        held += [self._step, *(turns for table in tables for turns in self._memory.turns(table))]
        return Account(
            weights=sum(weight.nbytes for weight in self._weights.values()),
            step=self._memory.step_bytes + self._lowering.nbytes + sum(tensor.nbytes for tensor in held),
            sampler=self._sampler.nbytes,
            # float32 logits of prompt positions and what is made of them
            passing=max(self._sampler.step_bytes, 3 * PROMPT_ROWS * self.vocab_size * 4),
            graphs=graph_bytes(len(self._graphs), len(self.program.ops)),
            libraries=library_bytes(self._device.real),
        )

    # ---- a step ----

    def _nobodys(self, rows: int, long: bool) -> Sizes:
        """A decode step of rows that only pad."""
        slots = np.full(rows, self._slots.spare, np.int32)
        return replace(self._sizes_of_decode(slots, slots * 0, rows), long=long)

    def _capture(self, rows: int, long: bool) -> None:
        sizes = self._nobodys(rows, long)
        self._graphs.capture(rows, long, lambda: self._decode(sizes))

    def _decode(self, sizes: Sizes) -> None:
        """One token a row, all sampling: by logits and temperature alone, until `Sampler.sample` knows better."""
        sizes = replace(sizes, early=self._device.launches_ahead and sizes.tokens <= FEW)
        if sizes.tokens != 1 or not self._single:
            self._forward(sizes)
        else:
            for launch in self._single:
                launch.run(sizes)
        self._sampler.launch(sizes)

    def _forward(self, sizes: Sizes) -> None:
        for launch in self._body:
            launch.run(sizes)
        if sizes.sampling:
            for launch in self._tail:
                launch.run(sizes)

    def _sizes_of_decode(self, slots: NDArray[np.int32], starts: NDArray[np.int32], padded: int) -> Sizes:
        """One token a row, all sampling; rows beyond are nobody's."""
        pairs = np.zeros((padded, 2), np.int32)
        pairs[:, 0] = self._slots.spare
        pairs[: len(slots), 0], pairs[: len(slots), 1] = slots, starts
        (sent,) = self._device.send_into(self._step, [pairs.reshape(-1)])
        return Sizes(padded, padded, sent, long=len(starts) > 0 and int(starts.max()) >= LONG)

    def _sizes(
        self,
        slots: NDArray[np.int32],
        starts: NDArray[np.int32],
        counts: NDArray[np.int32],
        samples: NDArray[np.int32],
    ) -> Sizes:
        """Any mix of runs and single tokens."""
        ends = np.cumsum(counts.astype(np.int64))
        firsts = ends - counts
        tokens = int(ends[-1])
        pairs = np.empty((tokens, 2), np.int32)
        pairs[:, 0] = np.repeat(slots, counts)
        pairs[:, 1] = np.arange(tokens) - np.repeat(firsts - starts, counts)
        runs = np.flatnonzero(counts > 1)
        kinds = sorted(self._lowering.tile_tokens) if len(runs) else []
        if len(runs) and self._manner.flash is not None:
            self._manner.flash.plan(slots, starts, counts)
        tiles = [tiles_of(firsts[runs], starts[runs], counts[runs], slots[runs], most) for most in kinds]
        sections = [
            pairs.reshape(-1), (ends - 1)[samples].astype(np.int32), firsts[counts == 1].astype(np.int32),
            *(tile.reshape(-1) for tile in tiles),
        ]  # fmt: skip
        sent = self._device.send_into(self._step, sections)
        held = {most: made.view(-1, 4) for most, made in zip(kinds, sent[3:], strict=True)}
        alone = starts[counts == 1]
        long = len(alone) > 0 and int(alone.max()) >= LONG
        context = int((starts + counts)[runs].max(initial=0))
        return Sizes(tokens, len(samples), sent[0], sent[1], sent[2], held, context, long)

    def _prompt_details(self, inputs: StepInputs, sizes: Sizes) -> dict[int, Payload] | None:
        """How likely the prompt's tokens were, some positions at a time for the sake of the logits' size."""
        wanted = self._slots.prompt_positions(inputs)
        found: dict[int, tuple[TokenDetails, ...]] = {}
        for start in range(0, len(wanted.rows), PROMPT_ROWS):
            some = slice(start, start + PROMPT_ROWS)
            part = PromptPositions(wanted.rows[some], wanted.where[some], wanted.targets[some])
            rows = self._device.send(part.where.astype(np.int32))
            again = replace(sizes, sampling=len(rows), samples=rows)
            for launch in self._tail:
                launch.run(again)
            for row, details in prompt_details(self.logits[: len(rows)], part, self._slots, inputs).items():
                found[row] = found.get(row, ()) + details
        return prompt_payloads(found, inputs)
