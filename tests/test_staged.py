"""The engine over several stages, each on a thread, on layers whose values are hashes of everything before."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch
from support_constraints import VOCAB, Ready
from support_ranks import Meeting, Rank
from support_stages import Threads, told

from tokenmill.backends.base import StepInputs, StepLimits, StepResult
from tokenmill.backends.deferred import AwaitedMasks
from tokenmill.backends.steps import PromptPositions, prompt_payloads
from tokenmill.backends.torch.sampling import sample, score
from tokenmill.backends.torch.slots import Slots
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.limits import SchedulerLimits
from tokenmill.engine.scheduler import Scheduler
from tokenmill.errors import OutOfMemory
from tokenmill.parallel.mesh import Mesh
from tokenmill.runtime.assembly import Assembled
from tokenmill.runtime.constraints import Constraints
from tokenmill.runtime.executor import Executor
from tokenmill.runtime.staged import StagedExecutor
from tokenmill.wire.messages import Abort, GrammarSpec, Output, Request, SamplingParams, StoppingParams, ToEngine

LAYERS, NUM_BLOCKS = 6, 14
LIMITS = StepLimits(max_batch_tokens=13, max_batch_size=6, max_total_tokens=48, block_size=4)


class _Step:
    def __init__(self, masks: AwaitedMasks, future: Any) -> None:
        self.masks, self.future, self.sample = masks, future, masks.give

    def result(self) -> StepResult:
        return self.future.result(20)


class Layers:
    """Backend of some layers. A cache entry is the hash of a layer's input and of its entry before."""

    def __init__(self, layers: range, take: Queue[Any] | None = None, give: Queue[Any] | None = None) -> None:
        self.layers, self.take, self.give = layers, take, give
        self.slots, self.thread = Slots(LIMITS), ThreadPoolExecutor(1)
        self.cache = {layer: [b"?"] * (NUM_BLOCKS * LIMITS.block_size) for layer in layers}
        self.launched: list[StepInputs] = []
        self.begin: Any = lambda number: None  # called by the thread at the begin of each step, from 0
        self.poisoned = -1  # slot whose logits are not finite

    def run(self, inputs: StepInputs) -> _Step:
        self.launched.append(inputs)
        masks = AwaitedMasks(inputs.deferred)
        return _Step(masks, self.thread.submit(self.compute, len(self.launched) - 1, inputs, masks))

    def idle_work(self) -> bool:
        return False

    def compute(self, number: int, inputs: StepInputs, masks: AwaitedMasks) -> StepResult:
        self.begin(number)
        self.slots.apply(inputs)
        places, values = [], []
        rows = zip(inputs.slots.tolist(), inputs.starts.tolist(), inputs.counts.tolist(), strict=True)
        for slot, start, count in rows:
            for position in range(start, start + count):
                before = [] if not position else [self.place(slot, position - 1)]
                places.append((self.place(slot, position), before))
                values.append(int(self.slots.tokens[slot, position]).to_bytes(4, "little"))
        if self.take is not None:
            values = self.take.get(timeout=20)
        for layer, cache in self.cache.items():
            for i, (place, before) in enumerate(places):
                values[i] = cache[place] = hashed(layer, values[i], *(cache[p] for p in before))
        if self.give is not None:
            self.give.put(values)
            return StepResult([])
        return self.sampled(inputs, values, masks)

    def sampled(self, inputs: StepInputs, values: list[bytes], masks: AwaitedMasks) -> StepResult:
        def logits(some: list[bytes]) -> torch.Tensor:
            rows = [np.random.default_rng(int.from_bytes(value, "little")).normal(size=VOCAB) * 3 for value in some]
            return torch.tensor(np.array(rows, np.float32).reshape(-1, VOCAB))

        found = logits([values[end] for end in (np.cumsum(inputs.counts) - 1)[inputs.samples]])
        found[inputs.slots[inputs.samples] == self.poisoned] = torch.nan
        sampled = sample(found, self.slots, inputs, masks.wait())
        self.slots.record(inputs, sampled.token_ids)

        def score_part(part: PromptPositions) -> Any:
            return score(logits([values[i] for i in part.tokens]), self.slots.tokens[part.slots, part.targets].long(),
                         part.top)  # fmt: skip

        payloads = prompt_payloads(inputs, self.slots.parameters.rows, score_part)
        return StepResult(sampled.token_ids.tolist(), sampled.logprobs and sampled.logprobs.details(), payloads)

    def place(self, slot: int, position: int) -> int:
        size = LIMITS.block_size
        return int(self.slots.tables[slot, position // size]) * size + position % size


def hashed(layer: int, *parts: bytes) -> bytes:
    return blake2b(bytes([layer]) + b"|".join(parts), digest_size=8).digest()


class Pipeline:
    """An engine of so many stages. One stage: an ordinary engine."""

    def __init__(self, num_stages: int, script: list[list[ToEngine]]) -> None:
        cuts = [LAYERS * i // num_stages for i in range(num_stages + 1)]
        pipes = [None, *(Queue() for _ in range(num_stages - 1)), None]
        self.backends = [Layers(range(cuts[i], cuts[i + 1]), pipes[i], pipes[i + 1]) for i in range(num_stages)]
        self.script, meeting = script, Meeting(num_stages)
        self.parts = [self.part(Mesh.of(Rank(rank, meeting), num_stages)) for rank in range(num_stages)]
        self.engines = Threads(self.parts, script)

    def part(self, mesh: Mesh) -> Assembled:
        limits = SchedulerLimits(*(getattr(LIMITS, name) for name in LIMITS.__slots__), stride=mesh.num_stages)
        backend: Any = self.backends[mesh.stage]
        constraints = Constraints(VOCAB, Ready(random.Random(0))) if mesh.stage == 0 else None
        executor: Any = Executor(backend, LIMITS.max_batch_size, constraints)
        if mesh.num_stages > 1:
            executor = StagedExecutor(backend, LIMITS.max_batch_size, mesh, Constraints.constrains, constraints)
        scheduler = Scheduler(BlockPool(NUM_BLOCKS, LIMITS.block_size), limits)
        info: Any = None
        return Assembled(scheduler, executor, info, constraints)

    def run(self) -> dict[int, list[Output]]:
        """Run until every request has ended, and return the outputs by request."""
        try:
            return self.engines.run()
        finally:
            for backend in self.backends:
                if backend.give is not None:
                    backend.give.put(None)  # for a step that the stage did not finish
                backend.thread.shutdown()


def history(seed: int, constrained: bool = True) -> list[list[ToEngine]]:
    """Return requests of all kinds a few at a time, and aborts."""
    rng = np.random.default_rng(seed)
    heads = [rng.integers(2, VOCAB, 12).tolist() for _ in range(2)]
    script: list[list[ToEngine]] = []
    for i in range(14):
        prompt = heads[rng.integers(2)][: rng.integers(0, 13)] + rng.integers(2, VOCAB, rng.integers(1, 8)).tolist()
        sampling = SamplingParams(
            temperature=(0.0, 0.8, 1.0)[i % 3], top_p=(1.0, 0.9)[i % 2], repetition_penalty=(1.0, 1.2)[i % 2], seed=i,
            logprobs=(-1, 2)[i % 4 == 0], prompt_logprobs=(-1, 1)[i % 5 == 0],
        )  # fmt: skip
        forced = {"force_after": 3, "forced_ids": (3, 4, 5)} if i % 3 == 1 else {}
        stopping = StoppingParams(int(rng.integers(1, 20)), 0, (int(rng.integers(VOCAB)), 0), **forced)
        grammar = GrammarSpec("fake", str(int(rng.integers(1000)))) if constrained and i % 3 == 2 else None
        made = Request(i, tuple(prompt), sampling, stopping, grammar=grammar)
        script += [[made], *([] for _ in range(rng.integers(0, 3)))]
        if i % 6 == 5:
            script.append([Abort(i)])
    return script


@pytest.mark.parametrize("num_stages", [2, 3])
def test_several_stages_give_each_request_what_one_stage_gives_it(num_stages: int) -> None:
    preempted = forced = 0
    for seed in range(2):
        script = history(seed)
        aborted = {m.id for messages in script for m in messages if isinstance(m, Abort)}
        wanted = Pipeline(1, [list(messages) for messages in script]).run()
        pipeline = Pipeline(num_stages, script)
        found = pipeline.run()
        for i, outputs in wanted.items():
            if i not in aborted:
                assert told(found[i]) == told(outputs)
        preempted += pipeline.engines.link.stats.preemptions
        forced += pipeline.engines.link.stats.forced_tokens
        assert not any(pipeline.parts[-1].scheduler.pool.refs)
    assert preempted > 2
    assert forced > 10


def test_stages_compute_different_steps_at_the_same_time() -> None:
    requests = [Request(i, (2 + i, 9), SamplingParams(), StoppingParams(12)) for i in range(4)]
    pipeline = Pipeline(2, [list(requests)])
    meeting, met = threading.Barrier(2), []

    def begin(stage: int, number: int) -> None:
        """Let stage 1 begin step n only when stage 0 begins step n + 1."""
        if 2 <= number - (stage == 0) < 12:
            meeting.wait(10)
            met.append(number)

    for stage, backend in enumerate(pipeline.backends):
        backend.begin = lambda number, stage=stage: begin(stage, number)
    pipeline.run()
    assert len(met) == 20
    assert {len(inputs.slots) for inputs in pipeline.backends[0].launched[3:12]} == {2}, "two sequences in each"


def test_a_row_that_is_not_finite_ends_alone() -> None:
    requests = [Request(i, (2 + i, 9), SamplingParams(), StoppingParams(6)) for i in range(4)]
    pipeline = Pipeline(2, [list(requests)])
    pipeline.backends[1].poisoned = 1
    outputs = pipeline.run()
    reasons = [outputs[i][-1].finish_reason for i in range(4)]
    assert sorted(reasons) == ["error", "length", "length", "length"]


def test_a_stage_without_memory_ends_the_rank_with_the_cause() -> None:
    pipeline = Pipeline(2, [[Request(0, (2, 9), SamplingParams(), StoppingParams(6))]])

    def begin(number: int) -> None:
        raise OutOfMemory("of 1 GiB")

    pipeline.backends[0].begin = begin
    with pytest.raises(RuntimeError, match="of 1 GiB"):
        pipeline.run()
