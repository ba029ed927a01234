"""The reference backend: run any program on any torch device, on one thread.

The thread plays the part of a device's stream: `run` submits a step and returns, so the host plans the next one
meanwhile (torch releases the interpreter's lock while it computes). Invariant: only this thread writes per-slot state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenmill.backends.base import Masks, Step, StepInputs, StepResult
from tokenmill.backends.deferred import AwaitedMasks
from tokenmill.backends.kind import Job
from tokenmill.backends.steps import (
    PromptPositions,
    block_bytes,
    cache_plan,
    most_rows,
    prompt_payloads,
    rows_of_tokens,
    state_bytes,
    step_tokens,
    warm_up_steps,
    warm_up_tokens,
)
from tokenmill.backends.torch import attention
from tokenmill.backends.torch.interpreter import Env, Interpreter
from tokenmill.backends.torch.pack import pack
from tokenmill.backends.torch.sampling import Sampled, sample, score
from tokenmill.backends.torch.slots import Slots
from tokenmill.backends.torch.states import States, zeros
from tokenmill.backends.torch.step_state import StepState
from tokenmill.errors import ArgumentError, NotEnoughMemory, OutOfMemory
from tokenmill.parallel.gloo import Collectives, OneRank, join
from tokenmill.parallel.pipes import Pipes
from tokenmill.program import ops
from tokenmill.program.buffers import plan_buffers
from tokenmill.program.cost import cache_layout, state_layout
from tokenmill.program.keeps import CacheSpec
from tokenmill.program.ops import Op, Weight
from tokenmill.program.passes import take_rows_early
from tokenmill.program.value import Buffer, Program
from tokenmill.wire.messages import TokenDetails

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchStep:
    """A step on the backend's thread. `before`: the step launched before it, if its result was not read yet."""

    def __init__(
        self,
        run: Callable[[AwaitedMasks], StepResult],
        thread: ThreadPoolExecutor,
        before: TorchStep | None,
        deferred: bool,
    ) -> None:
        self._run, self._before, self.was_read = run, before, False
        self.masks = AwaitedMasks(deferred)
        self._future: Future[StepResult] = thread.submit(self._start)

    def sample(self, masks: Masks) -> None:
        """See `backends.base.Step`."""
        self.masks.give(masks)

    def result(self) -> StepResult:
        """See `backends.base.Step`."""
        self.was_read = True
        self.masks.give_up()
        return self._future.result()

    def _start(self) -> StepResult:
        before, self._before = self._before, None
        if before is not None and isinstance(before._future.exception(), OutOfMemory):
            raise OutOfMemory("The step before found no memory.")  # This step would read what that one did not write.
        return self._run(self.masks)


class TorchBackend:
    """Implements `backends.base.Backend`.

    The constructor shards the program, reads this rank's weights and calls the job's `report` meanwhile. All ranks of
    the job's group make the same calls. It takes none of the job's options.
    """

    def __init__(self, job: Job) -> None:
        if job.dtype not in DTYPES:
            raise ArgumentError(f"dtype {job.dtype!r} is not known. Allowed: {', '.join(DTYPES)}.")
        self.limits = limits = job.limits
        self.dtype, self.device = DTYPES[job.dtype], _device(job)
        self.program = self.rewritten(job.of_rank())
        self.vocab_size = job.program.model.logits.width
        self.num_blocks = 0
        self._interpreter = Interpreter(self.program, self.more_kernels())
        layout, model = cache_layout(self.program), cache_layout(job.program.model)
        self._cache_plan = cache_plan(layout, limits.max_total_tokens, model)
        self._weights = self.read_weights(job)
        self._group, self._mesh, self._has_peers = job.group, job.mesh, job.group.size * job.mesh.num_stages > 1
        self.group: Collectives = OneRank()  # of more ranks from `allocate` on
        self._stages: Pipes | None = None  # likewise
        self._cache: dict[int, Tensor] = {}
        self._scratch = attention.Scratch()
        self._slots = Slots(limits, self.device, len(self.windows))
        self._states = States(state_layout(self.program), limits.max_batch_size, self.dtype, self.device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="torch-backend")
        self._last: TorchStep | None = None
        self._masks = AwaitedMasks(deferred=False)  # of the step that runs

    def rewritten(self, program: Program) -> Program:
        """Return the program to execute."""
        return take_rows_early(program)

    def read_weights(self, job: Job) -> dict[Weight, Tensor]:
        """Return the weights of the program."""
        return pack(self.program, job.source, job.read, job.group, self.dtype, self.device, job.report)

    @property
    def windows(self) -> tuple[int, ...]:
        """Windows by block table: see `Backend`."""
        return self._cache_plan.windows

    def block_bytes(self) -> int:
        """Bytes of one cache block of this rank."""
        return block_bytes(self._cache_plan, self.dtype.itemsize, self.limits.block_size)

    def step_bytes(self) -> int:
        """Bytes that the largest step needs besides weights and cache: values, states, scratch of attention, logits."""
        rows = most_rows(self.limits)

        def size(buffer: Buffer) -> int:
            return rows[buffer.rows] * buffer.width * self.dtype.itemsize

        widest = max((-(-spec.width // 2) for spec in self._cache_plan.parts), default=0)
        layers = [op for op in self.program.ops if isinstance(op, ops.Attention) and attention.holds_scores(op)]
        heads = max((op.q.width // op.head_dim for op in layers), default=0)
        gathered = attention.scratch_bytes(
            self.limits.max_total_tokens, self.limits.max_batch_tokens, widest, self.dtype.itemsize, heads
        )
        sampled = 4 * rows["samples"] * self.vocab_size * 4  # float32 copies of logits in a full tail
        states = state_bytes(state_layout(self.program), self.dtype.itemsize) * self.limits.max_batch_size
        return plan_buffers(self.program, size).size + states + gathered + sampled + self.more_bytes()

    def more_kernels(self) -> Mapping[type[Op], Callable[..., Any]]:
        """Return kernels of operations that only a derived backend has."""
        return {}

    def more_bytes(self) -> int:
        """Return the bytes of the largest step's queries and results in the compressed space."""
        found = (op for op in self.program.ops if isinstance(op, ops.LatentAttention))
        widths = (op.q.width // op.head_dim * (2 * op.latent.width + op.key.width) for op in found)
        return 2 * self.limits.max_batch_tokens * max(widths, default=0) * self.dtype.itemsize

    def claimed_bytes(self) -> int:
        """Return 0: memory is taken when it is first written to."""
        return 0

    def allocate(self, num_blocks: int) -> None:
        """Make the cache, once, before the first step, and meet the other ranks.

        Raise NotEnoughMemory if it does not fit.
        """
        self.group, self._stages = join(self._group), Pipes(self._mesh) if self._mesh.num_stages > 1 else None
        places = num_blocks * self.limits.block_size
        try:
            parts = [zeros(_shape(spec, places), self.dtype, self.device) for spec in self._cache_plan.parts]
            self._states.allocate()
        except (RuntimeError, MemoryError) as e:  # torch has no narrower error on every device.
            wanted = num_blocks * self.block_bytes()
            raise NotEnoughMemory(
                f"A cache of {num_blocks} blocks needs {wanted} bytes: {e}. Lower --memory-limit or --max-total-tokens."
            ) from e
        self._cache = {layer: parts[part] for layer, (_, part) in self._cache_plan.places.items()}
        self.num_blocks = num_blocks

    def warm_up(self) -> None:
        """Run a short prompt and a decode step in the first blocks, then clear these blocks."""
        self._thread.submit(self._warm_up).result()

    def run(self, inputs: StepInputs) -> Step:
        """Launch a step behind those before it and return at once."""
        before = None if self._last is None or self._last.was_read else self._last
        self._last = TorchStep(
            lambda masks: self._step_or_out_of_memory(inputs, masks), self._thread, before, inputs.deferred
        )
        return self._last

    def idle_work(self) -> bool:
        """Return False: no work is postponed."""
        return False

    def close(self) -> None:
        """End the thread after its current step. Idempotent."""
        if self._last is not None:
            self._last.masks.give_up()
        if self._stages is not None:
            self._stages.close()  # a step that waits for another stage ends
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.group.close()

    def _step_or_out_of_memory(self, inputs: StepInputs, masks: AwaitedMasks) -> StepResult:
        self._masks = masks
        try:
            return self._step(inputs)
        except torch.OutOfMemoryError as error:
            if self._has_peers:  # The other ranks may have had memory: their plans would differ.
                raise
            why = str(error)
        torch.cuda.empty_cache()  # Here no frame of the error holds a tensor any more.
        raise OutOfMemory(why)

    @torch.inference_mode()
    def _step(self, inputs: StepInputs) -> StepResult:
        inputs = self.begin(inputs)
        if not len(inputs.slots):
            return StepResult([])
        state, ids = self._state(inputs)
        env = self._interpreter.body(state, ids)
        token_ids, sampled = self._sample(inputs, state, env)
        prompt = None
        if self.program.samples:
            prompt = prompt_payloads(inputs, self._slots.parameters.rows, lambda part: self._score(part, state, env))
        details = sampled.logprobs.details() if sampled and sampled.logprobs else None
        return StepResult(token_ids, details, prompt)

    def begin(self, inputs: StepInputs) -> StepInputs:
        """Apply a step's changes to the slots, and return the step to compute."""
        self._slots.apply(inputs)
        return inputs

    def _state(self, inputs: StepInputs) -> tuple[StepState, Tensor]:
        """Return the step on the device, and its token ids (T,)."""
        tokens = step_tokens(inputs)
        rows, positions = self._to_device(rows_of_tokens(inputs.counts)), self._to_device(tokens.positions)
        tables = self._slots.tables[self._to_device(inputs.slots)].view(len(inputs.slots), len(self.windows), -1)
        plans = [
            attention.plan(inputs, tables[:, table], self.limits.block_size, positions, rows, window)
            for table, window in enumerate(self.windows)
        ]
        by_layer = {layer: plans[table] for layer, (table, _) in self._cache_plan.places.items()}
        samples = self._to_device(tokens.samples)
        states = self._states.plan(inputs)
        state = StepState(self._weights, self._cache, self.group, positions, by_layer, samples, self._scratch, states,
                          self.dtype, self._stages)  # fmt: skip
        return state, self._slots.tokens[self._to_device(tokens.slots), positions].long()

    def _sample(self, inputs: StepInputs, state: StepState, env: Env) -> tuple[list[int], Sampled | None]:
        """Return the sampled tokens, after writing them to their slots. Rank 0 chooses; all ranks get the ids."""
        if not len(inputs.samples) or not self.program.samples:
            return [], None
        logits = self._interpreter.tail(state, env)
        if self.group.rank == 0:
            sampled = sample(logits, self._slots, inputs, self._masks.wait())
            token_ids = sampled.token_ids.contiguous()
        else:
            sampled, token_ids = None, torch.empty(len(inputs.samples), dtype=torch.int64, device=self.device)
        token_ids = self.group.broadcast(token_ids)
        self._slots.record(inputs, token_ids)
        return token_ids.tolist(), sampled

    def _score(self, part: PromptPositions, state: StepState, env: Env) -> list[TokenDetails | None]:
        """Return the details of some positions' targets, on rank 0. All ranks compute the logits."""
        logits = self._interpreter.tail(replace(state, samples=self._to_device(part.tokens)), env)
        if self.group.rank:
            return [None] * len(part.rows)
        targets = self._slots.tokens[self._to_device(part.slots), self._to_device(part.targets)].long()
        return score(logits, targets, part.top)

    @torch.inference_mode()
    def _warm_up(self) -> None:
        for inputs in warm_up_steps(self.limits, self.num_blocks, len(self.windows)):
            state, ids = self._state(self.begin(inputs))
            env = self._interpreter.body(state, ids)
            if self.program.samples:
                self._interpreter.tail(state, env)
        self._slots.tables.zero_()
        self._states.clear()
        for cache in self._cache.values():
            cache[:, : warm_up_tokens(self.limits, self.num_blocks)].zero_()

    def _to_device(self, array: np.ndarray[tuple[int, ...], np.dtype[np.integer]]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self.device)


def _device(job: Job) -> torch.device:
    """Return the device of a job's rank."""
    kind = job.placement.device
    return torch.device(kind, job.options.device_index) if kind == "cuda" else torch.device(kind)


def _shape(spec: CacheSpec, places: int) -> tuple[int, int, int]:
    """Return the shape of a layer's cache: keys apart from values, where both have the same width."""
    halves = 1 if spec.parts[0].name == "latent" else 2
    return halves, places, spec.width // halves
