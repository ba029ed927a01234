"""The CPU backend: lower a program to a table of compiled kernels and execute the table once a step.

It needs no torch, and numba only if a kernel is missing from the kernel cache.

One thread plays the part of a device queue: `run` submits a step and returns, so the engine plans the next step
meanwhile. Invariant: only this thread writes per-slot state. Invariant: results are batch-invariant. A sequence gets
the same tokens alone, in a batch, in prompt chunks, behind a cached prefix and after a preemption.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.backends.base import Masks, Step, StepInputs, StepResult
from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.cache import Code, KernelCache, cache_folder
from tokenmill.backends.cpu.isa import detect
from tokenmill.backends.cpu.lower import Line, Lowering, meeting
from tokenmill.backends.cpu.lower_states import row_bytes
from tokenmill.backends.cpu.memory import AttentionOp, AttentionShape, Memory, Sizes
from tokenmill.backends.cpu.peers import Peers
from tokenmill.backends.cpu.pinning import tie
from tokenmill.backends.cpu.prepare import prepare, refusal
from tokenmill.backends.cpu.sampler import Sampler
from tokenmill.backends.cpu.scratch import zeros
from tokenmill.backends.cpu.slots import Slots
from tokenmill.backends.cpu.threads import WorkerThreads, default_threads
from tokenmill.backends.deferred import AwaitedMasks
from tokenmill.backends.kind import Job
from tokenmill.backends.rings import RingProgress
from tokenmill.backends.steps import (
    PromptPositions,
    StepTokens,
    most_rows,
    prompt_payloads,
    step_tokens,
    warm_up_steps,
    warm_up_tokens,
)
from tokenmill.errors import NotEnoughMemory, Unsupported
from tokenmill.program import ops
from tokenmill.program.cost import state_layout
from tokenmill.program.ops import Weight
from tokenmill.quant.base import load
from tokenmill.weights.mapped import Reading
from tokenmill.wire.messages import Progress, TokenDetails

KV_DTYPES = {"": "f16", "float16": "f16", "int8": "int8"}


class CpuStep:
    """A step submitted to the backend's thread."""

    def __init__(self, future: Future[StepResult], masks: AwaitedMasks) -> None:
        self._future, self.masks = future, masks

    def sample(self, masks: Masks) -> None:
        """See `backends.base.Step`."""
        self.masks.give(masks)

    def result(self) -> StepResult:
        """See `backends.base.Step`."""
        self.masks.give_up()
        return self._future.result()


class CpuBackend:
    """Implements `backends.base.Backend`, for one rank or as one of several.

    The constructor reads and packs the weights, compiles the kernels that the cache lacks, and calls the job's `report`
    meanwhile. It raises Unsupported, with the reason, for a program that this backend cannot run. Of the job's options
    it takes `cpu_threads` (compute threads, including the backend's own; None: `default_threads`), `cpus`, `cpu_isa`
    ("": the best instruction set of this machine), `kv_cache_dtype` (a key of KV_DTYPES) and `kernel_cache` ("": the
    user's).
    """

    def __init__(self, job: Job) -> None:
        options, limits, group = job.options, job.limits, job.group
        program = job.of_rank()
        if why := refusal(program, limits.block_size):
            raise Unsupported("CPU backend", "cpu", (), f"Of this model, {why}. Use --backend torch.")
        tie(options.engine * group.size + group.rank, options.engines * group.size)
        threads = options.cpu_threads or default_threads(options.cpus, group.size)
        self.limits, self.isa, self.threads = limits, detect(options.cpu_isa), threads
        self.num_blocks = 0
        prepared = prepare(program, job.source, job.read, self.isa, threads, job.report, group)
        self.program = prepared.program
        self.vocab_size = self.program.model.logits.width
        rows, kv_dtype = most_rows(limits), KV_DTYPES[options.kv_cache_dtype]
        sizes = Sizes(
            rows["tokens"], rows["samples"], limits.max_total_tokens, threads, kv_dtype, limits.max_batch_size
        )
        self._memory = Memory(
            self.program,
            sizes,
            prepared.panels,
            lambda w: _vector(w, job),
            prepared.private,
            prepared.division,
            None if group.size == 1 else lambda nbytes: Peers(group, nbytes, sizes.samples),
        )
        self._peers = self._memory.peers
        self._slots = Slots(limits, len(self.windows))
        self._progress = RingProgress(limits.max_batch_size) if state_layout(self.program) else None
        self._sampler = Sampler(self._slots.tokens, self._slots.parameters, self.vocab_size, threads)
        self._ending = self._ending_lines()
        self._lines = [*Lowering(self.program, self._memory).lines(), *self._ending]
        self._memory.close_source()
        self._code = self._load_kernels(job)
        self._scratch = Scratch(self._memory, self._slots, self._sampler, self._lines)
        self._table = np.zeros((0, layout.COLUMNS), np.int64)
        self._samples = self.program.samples and (self._peers is None or self._peers.rank == 0)
        self._sampling = len(self._lines) - len(self._ending)  # row of the table where sampling begins
        self._first, self._body = 0, _body(self._lines, self._sampling)  # where a step begins, and before TakeRows
        if self._peers is not None:
            self._peers.join(self._scratch.context, threads, options.rank_timeout_s)
        self._workers = WorkerThreads(self._code, self._scratch.context, threads)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cpu-backend")
        self._last: CpuStep | None = None

    def _load_kernels(self, job: Job) -> Code:
        """Load the kernels, after compiling those that are missing. Rank 0 compiles them for the others."""
        cache = KernelCache(cache_folder(job.options.kernel_cache), self.isa, jobs=self.threads)
        names = ["walk", "serve", *(line.kernel for line in self._lines)]
        if job.group.rank:
            job.group.exchange(b"")
        code = cache.load(names, lambda done, total: job.report(Progress("compile", done, total, "kernels")))
        if job.group.size > 1 and not job.group.rank:
            job.group.exchange(b"")
        return code

    def _ending_lines(self) -> list[Line]:
        """Return the rows that end a step with logits: rank 0 samples, and the others wait for its ids."""
        if not self.program.samples:
            return []
        if self._peers is None:
            return [self._sample_line()]
        return [meeting(None)] if self._peers.rank else [self._sample_line(), meeting(None)]

    def _sample_line(self) -> Line:
        at = self._memory.place(self.program.logits)
        row = np.zeros(layout.COLUMNS, np.int64)
        row[[layout.ROWS, layout.X, layout.X_STRIDE, layout.WIDTH]] = 1, at.address, at.stride, self.vocab_size
        return Line(None, "sample", row)

    # ---- the Backend protocol ----

    @property
    def windows(self) -> tuple[int, ...]:
        """Windows by block table: see `Backend`."""
        return self._memory.cache_plan.windows

    def block_bytes(self) -> int:
        """Return the bytes of one cache block."""
        return self._memory.block_bytes(self.limits.block_size)

    def step_bytes(self) -> int:
        """Return the bytes that the largest step needs besides weights and KV cache, with the states of all slots."""
        memory = self._memory
        scratch = memory.plan.size + memory.items.nbytes + memory.rooms.nbytes + self._scratch.nbytes
        shared = 0 if self._peers is None else -(-self._peers.nbytes // self._peers.size)
        return scratch + shared + memory.states.nbytes

    def claimed_bytes(self) -> int:
        """Return 0: the system commits memory when it is first written to, not when it is allocated."""
        return 0

    def allocate(self, num_blocks: int) -> None:
        """Allocate the KV cache. Call once, before the first step. Raises NotEnoughMemory if it does not fit."""
        try:
            self._memory.allocate(num_blocks * (self.limits.block_size // layout.BLOCK))
        except (MemoryError, OSError, ValueError, OverflowError) as e:
            wanted = num_blocks * self.block_bytes()
            raise NotEnoughMemory(
                f"A cache of {num_blocks} blocks needs {wanted} bytes: {e}. Lower --memory-limit or --max-total-tokens."
            ) from e
        self.num_blocks = num_blocks
        rows = [line.row for line in self._lines]
        for line in self._lines:
            line.row[layout.KERNEL] = self._code[line.kernel]
            if line.op is not None:
                columns = self._memory.kept(line.op, line.kernel, self._slots.table_bytes)
                line.row[list(columns)] = list(columns.values())
        self._table = zeros((len(rows), layout.COLUMNS), np.int64)
        self._table[:] = rows

    def warm_up(self) -> None:
        """Run a short prompt and a decode step in the first blocks, then clear these blocks."""
        self._thread.submit(self._warm_up).result()

    def run(self, inputs: StepInputs) -> Step:
        """Submit a step behind the ones before it and return immediately.

        The plan of a step needs no result of earlier steps, so it is built here while they run.
        """
        masks, plan = AwaitedMasks(inputs.deferred), self._scratch.plan(step_tokens(inputs))
        self._last = CpuStep(self._thread.submit(self._step, inputs, plan, masks), masks)
        return self._last

    def idle_work(self) -> bool:
        """Return False: this backend defers no work."""
        return False

    def close(self) -> None:
        """Stop the threads once the current step ends. Idempotent."""
        if self._last is not None:
            self._last.masks.give_up()
        if self._peers is not None:
            self._peers.close()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._workers.close()

    # ---- a step, on the backend's thread ----

    def _step(self, inputs: StepInputs, plan: StepPlan, masks: AwaitedMasks) -> StepResult:
        with contextlib.ExitStack() as on_failure:
            if self._peers is not None:
                on_failure.callback(self._peers.close)
            inputs, plan = self._begin(inputs, plan)
            token_ids = self._compute(inputs, plan, masks if inputs.deferred else None)
            details = self._sampler.details() if token_ids and self._samples else None
            prompt = prompt_payloads(inputs, self._slots.parameters.rows, self._score)
            on_failure.pop_all()
        return StepResult(token_ids, details, prompt)

    def _begin(self, inputs: StepInputs, plan: StepPlan) -> tuple[StepInputs, StepPlan]:
        """Apply the changes since the previous step. Return the step to compute, and its plan.

        Raises RuntimeError if a row continues from a lost state.
        """
        if self._progress is not None:
            self._progress.advance(inputs)
        self._slots.apply(inputs)
        return inputs, plan

    def _compute(self, inputs: StepInputs, plan: StepPlan, masks: AwaitedMasks | None = None) -> list[int]:
        """Execute the table and return the sampled ids, one for each sampling row.

        A step without sampling rows stops before TakeRows. The last row samples: it waits for deferred masks, and the
        rows before it run meanwhile.
        """
        if not len(inputs.slots):
            return []
        self._scratch.begin(plan)
        if not len(plan.chosen):
            self._walk(self._first, self._body)
            return []
        first, end = self._first, len(self._table)
        if masks is not None:
            self._walk(first, self._sampling)
            first = self._sampling
        if self._samples:
            self._sampler.begin(inputs, masks.wait() if masks else None)
        self._walk(first, end)
        ids: list[int] = plan.chosen.tolist()
        if not self._samples:
            self._slots.record(inputs, ids)
        return ids

    def _score(self, part: PromptPositions) -> list[TokenDetails | None]:
        """Return the details of some positions' targets: run the rows of the table from TakeRows on again."""
        self._scratch.sample(part.tokens)
        if not self._samples:
            self._walk(self._body, self._sampling)
            return [None] * len(part.rows)
        self._sampler.begin_prompt(self._slots.tokens[part.slots, part.targets].astype(np.int64), part.top)
        self._walk(self._body, self._sampling + 1)
        return self._sampler.details() or []

    def _walk(self, first: int, last: int) -> None:
        base = self._table.ctypes.data
        self._scratch.counters[:] = 0
        self._workers.run(base + first * layout.ROW_BYTES, base + last * layout.ROW_BYTES)
        if self._peers is not None:
            self._peers.check()

    def _warm_up(self) -> None:
        for inputs in warm_up_steps(self.limits, self.num_blocks, len(self.windows)):
            self._compute(*self._begin(inputs, self._scratch.plan(step_tokens(inputs))))
        size = warm_up_tokens(self.limits, self.num_blocks)
        self._slots.tables[0], self._slots.tokens[0, : size + 1] = 0, 0
        self._memory.clear_pages(slice(0, -(-size // layout.BLOCK)))
        self._memory.states.clear(0)
        if self._progress is not None:
            self._progress.clear(0)


class StepPlan(NamedTuple):
    """The context words of one step and the arrays that they point to.

    `words`: values of `layout.STEP_WORDS`. `referenced`: arrays that must stay alive while the step runs. `chosen`: the
    one of them that receives the sampled ids.
    """

    words: NDArray[np.int64]
    referenced: tuple[NDArray[np.int64], ...]
    chosen: NDArray[np.int64]


class Scratch:
    """The context of a step and the scratch memory that its words point to."""

    def __init__(self, memory: Memory, slots: Slots, sampler: Sampler, lines: list[Line]) -> None:
        sizes, n = memory.sizes, memory.sizes.threads
        program, self._peers = memory.program, memory.peers
        heads = [AttentionShape.of(op, sizes.kv_dtype) for op in program.ops if isinstance(op, AttentionOp)]
        most = max(sizes.rows(v.spec) for op in program.ops for v in op.results().values())
        self._item_rows = min((h.item_rows for h in heads), default=1)
        widest = max(v.width for op in program.ops for v in op.results().values() if v.spec.rows != "samples")
        tile = max([most * 256, *(h.pairs * h.dim * 4 for h in heads)])
        row = max([widest * 4, *((h.pairs + 2) * 128 for h in heads), *map(row_bytes, program.ops)])
        scores = (sizes.context + 32) // layout.BLOCK * 64
        self.counters = zeros((len(lines), 8), np.int64)
        self.context = zeros((layout.CONTEXT,), np.int64)
        self._arrays = {
            layout.COUNTERS: self.counters,
            layout.TILE: zeros((n, -(-tile // 64) * 64)),
            layout.SCORES: zeros((n, layout.SCORE_ROWS * scores)),
            layout.ROW: zeros((n, -(-row // 64) * 64)),
            layout.ZEROS: zeros((4096,)),
            layout.TABLES: slots.tables,
            layout.TOKEN_IDS: slots.tokens,
        }
        if narrow := max((line.row[layout.OUT_STRIDE] for line in lines if line.kernel == "narrow"), default=0):
            self._arrays[layout.NARROW] = zeros((most, narrow))
            self.context[layout.NARROW_SIZE] = layout.FEW * narrow
        for word, array in self._arrays.items():
            self.context[word] = array.ctypes.data
        self.context[[layout.TABLE_STRIDE, layout.TOKEN_IDS_STRIDE]] = slots.tables.strides[0], slots.tokens.strides[0]
        self.context[layout.SAMPLING] = sampler.address
        self.context[[layout.TILE_SIZE, layout.SCORES_SIZE, layout.ROW_SIZE]] = (
            self._arrays[layout.TILE].strides[0], scores, self._arrays[layout.ROW].strides[0],
        )  # fmt: skip
        self.nbytes = sum(array.nbytes for array in self._arrays.values()) + sampler.nbytes
        self._referenced: tuple[NDArray[np.int64], ...] = ()  # keeps the arrays of the current step alive

    def plan(self, step_tokens: StepTokens) -> StepPlan:
        """Build the words of a step. Reads no state that a step writes, so any thread may call it at any time."""
        first, count = self._items(step_tokens)
        count_samples = len(step_tokens.samples)
        chosen = np.zeros(count_samples, np.int64) if self._peers is None else self._peers.ids(count_samples)
        referenced = (
            step_tokens.positions,
            step_tokens.slots,
            step_tokens.samples,
            first,
            count,
            chosen,
            step_tokens.sampled_slots,
            step_tokens.sampled_positions,
            np.append(step_tokens.firsts, len(step_tokens.positions)),
        )
        numbers = len(step_tokens.positions), len(step_tokens.samples), len(first), int(step_tokens.single_token)
        *addresses, runs = (array.ctypes.data for array in referenced)
        words = np.array([*numbers, *addresses, len(step_tokens.firsts), runs], np.int64)
        return StepPlan(words, referenced, chosen)

    def begin(self, plan: StepPlan) -> None:
        """Write the words of the next step into the context."""
        self.context[layout.STEP_WORDS], self._referenced = plan.words, plan.referenced

    def sample(self, where: NDArray[np.int64]) -> None:
        """Make other tokens of the current step the sampling rows. `where`: indices of these tokens."""
        self._referenced = (*self._referenced, np.ascontiguousarray(where))
        self.context[layout.SAMPLES], self.context[layout.SAMPLED] = len(where), self._referenced[-1].ctypes.data

    def _items(self, step_tokens: StepTokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Cut the step into attention items, runs of rows of one sequence. Returns first rows and lengths."""
        if step_tokens.single_token:
            return step_tokens.firsts, np.ones(len(step_tokens.firsts), np.int64)
        n = self._item_rows
        stops = np.append(step_tokens.firsts[1:], len(step_tokens.positions))
        pieces = -(-(stops - step_tokens.firsts) // n)
        item = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        first = np.repeat(step_tokens.firsts, pieces) + item * n
        return first, np.minimum(n, np.repeat(stops, pieces) - first)


def _vector(weight: Weight, job: Job) -> NDArray[np.float32]:
    """Read a vector. All its pages in the file are given up again."""
    with Reading(job.source) as reading:
        return load(weight, reading, job.read, job.group.rank).floats()


def _body(lines: list[Line], sampling: int) -> int:
    """Return the number of table rows before TakeRows, or before its meeting of ranks, or at most `sampling`.

    A step without sampling rows runs only these.
    """
    takes = (i for i, line in enumerate(lines) if isinstance(line.op, ops.TakeRows))
    return next(takes, sampling)
