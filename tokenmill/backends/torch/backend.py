"""The reference backend: runs any program on any torch device, on a thread of its own.

The thread is what the device's stream is elsewhere: `run` hands a step over and returns, so the host plans the next one
meanwhile (torch lets go of the interpreter while it computes). Everything by slot belongs to that thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tokenmill.backends.base import Masks, Step, StepInputs, StepLimits, StepResult, prompt_payloads
from tokenmill.backends.deferred import AwaitedMasks
from tokenmill.backends.torch import attention
from tokenmill.backends.torch.interpreter import Env, Interpreter
from tokenmill.backends.torch.kinds import StepState
from tokenmill.backends.torch.pack import Report, pack
from tokenmill.backends.torch.sampling import Sampled, prompt_details, sample
from tokenmill.backends.torch.slots import PromptPositions, Slots
from tokenmill.errors import ArgumentError, NotEnoughMemory, OutOfMemory
from tokenmill.parallel.group import Group
from tokenmill.program.buffers import plan_buffers
from tokenmill.program.cost import cache_layout
from tokenmill.program.passes import take_rows_early
from tokenmill.program.shard import shard
from tokenmill.program.value import Buffer, Program
from tokenmill.quant.base import Reader
from tokenmill.weights.checkpoint import Checkpoint
from tokenmill.wire.messages import Payload, TokenDetails

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROMPT_ROWS = 128  # prompt positions whose logits are held at a time


class TorchStep:
    """A step on the backend's thread. `before`: the one launched before it, if nobody has been told of its end."""

    def __init__(
        self,
        run: Callable[[AwaitedMasks], StepResult],
        thread: ThreadPoolExecutor,
        before: TorchStep | None,
        deferred: bool,
    ) -> None:
        self._run, self._before, self.told = run, before, False
        self.masks = AwaitedMasks(deferred)
        self._future: Future[StepResult] = thread.submit(self._start)

    def sample(self, masks: Masks) -> None:
        """See `backends.base.Step`."""
        self.masks.give(masks)

    def result(self) -> StepResult:
        """See `backends.base.Step`."""
        self.told = True
        self.masks.give_up()
        return self._future.result()

    def _start(self) -> StepResult:
        before, self._before = self._before, None
        if before is not None and isinstance(before._future.exception(), OutOfMemory):
            raise OutOfMemory("The step before found no memory.")  # this one would read what that one should have left
        return self._run(self.masks)


class TorchBackend:
    """Implements `backends.base.Backend`.

    `program` at full size: it is sharded here. The constructor reads this rank's weights and calls `report` meanwhile.
    All ranks of `group` make the same calls.
    """

    def __init__(
        self,
        program: Program,
        source: Checkpoint,
        read: Reader,
        limits: StepLimits,
        group: Group,
        *,
        dtype: str,
        device: str = "cpu",
        report: Report | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ArgumentError(f"dtype {dtype!r} is not known. Allowed: {', '.join(DTYPES)}.")
        self.limits, self.group = limits, group
        self.dtype, self.device = DTYPES[dtype], torch.device(device)
        self.program = take_rows_early(shard(program, group.size))
        self.vocab_size = program.logits.width
        self.num_blocks = 0
        self._interpreter = Interpreter(self.program)
        self._layout = cache_layout(self.program)
        self._weights = pack(self.program, source, read, group, self.dtype, self.device, report)
        self._cache: dict[int, Tensor] = {}
        self._scratch = attention.Scratch()
        self._slots = Slots(limits, self.vocab_size, device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="torch-backend")
        self._last: TorchStep | None = None
        self._masks = AwaitedMasks(deferred=False)  # of the step that runs

    def block_bytes(self) -> int:
        """Bytes of one cache block over all layers of this rank."""
        per_token = sum(spec.width for spec in self._layout.values())
        return per_token * self.dtype.itemsize * self.limits.block_size

    def step_bytes(self) -> int:
        """Bytes that the largest step needs besides weights and cache: values, what attention gathers, logits."""
        rows = {"tokens": self.limits.max_batch_tokens, "samples": max(self.limits.max_batch_size, _PROMPT_ROWS)}

        def size(buffer: Buffer) -> int:
            return rows[buffer.rows] * buffer.width * self.dtype.itemsize

        widest = max((spec.width // 2 for spec in self._layout.values()), default=0)
        gathered = attention.scratch_bytes(
            self.limits.max_total_tokens, self.limits.max_batch_tokens, widest, self.dtype.itemsize
        )
        sampled = 4 * rows["samples"] * self.vocab_size * 4  # float32 copies that a full tail makes
        return plan_buffers(self.program, size).size + gathered + sampled

    def claimed_bytes(self) -> int:
        """None of them: memory is taken as it is first written to."""
        return 0

    def allocate(self, num_blocks: int) -> None:
        """Make the cache, once, before the first step. NotEnoughMemory if there is no room."""
        places = num_blocks * self.limits.block_size
        try:
            for layer, spec in self._layout.items():
                shape = 2, places, spec.width // 2
                self._cache[layer] = _zeros(shape, self.dtype, self.device)
        except (RuntimeError, MemoryError) as e:  # torch has no narrower one on every device
            wanted = num_blocks * self.block_bytes()
            raise NotEnoughMemory(
                f"A cache of {num_blocks} blocks needs {wanted} bytes: {e}. Lower --memory-limit or --max-total-tokens."
            ) from e
        self.num_blocks = num_blocks

    def warm_up(self) -> None:
        """Run a small prompt and a decode step on the first blocks, which are empty again afterwards."""
        self._thread.submit(self._warm_up).result()

    def run(self, inputs: StepInputs) -> Step:
        """Launch a step behind those before it and return at once."""
        before = None if self._last is None or self._last.told else self._last
        self._last = TorchStep(
            lambda masks: self._step_or_out_of_memory(inputs, masks), self._thread, before, inputs.deferred
        )
        return self._last

    def idle_work(self) -> bool:
        """Nothing is put off."""
        return False

    def close(self) -> None:
        """End the thread after the step that it runs. Idempotent."""
        if self._last is not None:
            self._last.masks.give_up()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _step_or_out_of_memory(self, inputs: StepInputs, masks: AwaitedMasks) -> StepResult:
        self._masks = masks
        try:
            return self._step(inputs)
        except torch.OutOfMemoryError as error:
            if self.group.size > 1:  # the other ranks may have had room: no plan that all agree on follows
                raise
            why = str(error)
        torch.cuda.empty_cache()  # here, where no frame of the error holds a tensor any more
        raise OutOfMemory(why)

    @torch.inference_mode()
    def _step(self, inputs: StepInputs) -> StepResult:
        self._slots.apply(inputs)
        state, ids = self._state(inputs)
        env = self._interpreter.body(state, ids)
        token_ids, sampled = self._sample(inputs, state, env)
        prompt = self._prompt_details(inputs, state, env) if inputs.prompt_logprobs >= 0 else None
        details = sampled.logprobs.details() if sampled and sampled.logprobs else None
        return StepResult(token_ids, details, prompt)

    def _state(self, inputs: StepInputs) -> tuple[StepState, Tensor]:
        """The step on the device, and its tokens (T,)."""
        counts = inputs.counts.astype(np.int64)
        ends = np.cumsum(counts)
        rows = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(rows)) - np.repeat(ends - counts, counts)
        slots = self._to_device(inputs.slots)
        row, positions = self._to_device(rows), self._to_device(inputs.starts.astype(np.int64)[rows] + within)
        tables = self._slots.tables[slots]
        plan = attention.plan(inputs, tables, self.limits.block_size, positions, row)
        samples = self._to_device((ends - 1)[inputs.samples])
        state = StepState(self._weights, self._cache, self.group, positions, plan, samples, self._scratch)
        return state, self._slots.tokens[slots[row], positions].long()

    def _sample(self, inputs: StepInputs, state: StepState, env: Env) -> tuple[list[int], Sampled | None]:
        """The tokens of the rows that sample: chosen by rank 0, known to all, written to their slots."""
        if not len(inputs.samples):
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

    def _prompt_details(
        self, inputs: StepInputs, state: StepState, env: Env
    ) -> dict[int, Payload] | None:
        """How likely the prompt's tokens were, some positions at a time for the sake of the logits' size."""
        wanted = self._slots.prompt_positions(inputs)
        found: dict[int, tuple[TokenDetails, ...]] = {}
        for start in range(0, len(wanted.rows), _PROMPT_ROWS):
            some = slice(start, start + _PROMPT_ROWS)
            part = PromptPositions(wanted.rows[some], wanted.where[some], wanted.targets[some])
            logits = self._interpreter.tail(replace(state, samples=self._to_device(part.where)), env)
            if self.group.rank == 0:
                for row, details in prompt_details(logits, part, self._slots, inputs).items():
                    found[row] = found.get(row, ()) + details
        return prompt_payloads(found, inputs)

    @torch.inference_mode()
    def _warm_up(self) -> None:
        size = min(self.limits.max_batch_tokens, self.limits.max_total_tokens, self.num_blocks * self.limits.block_size)
        slots = np.zeros(1, np.int32)
        first = np.zeros(self._slots.tables.shape[1], np.int32)
        first[: self.num_blocks] = np.arange(min(self.num_blocks, len(first)))
        self._slots.tables[0] = torch.from_numpy(first).to(self.device)
        for start, count in ((0, min(size, 32)), (min(size, 32) - 1, 1)):
            if count < 1:
                return
            inputs = StepInputs(slots, np.array([start], np.int32), np.array([count], np.int32), slots)
            state, ids = self._state(inputs)
            self._interpreter.tail(state, self._interpreter.body(state, ids))
        self._slots.tables.zero_()
        for cache in self._cache.values():
            cache[:, : self.limits.block_size * (1 + 32 // self.limits.block_size)].zero_()

    def _to_device(self, array: np.ndarray[tuple[int, ...], np.dtype[np.integer]]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self.device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.zeros`, but a CPU makes the pages when they are first written to: a large cache costs no start."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
