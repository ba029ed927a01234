"""Executor, slots and sampling under the real scheduler, on a backend whose logits are hashes of everything before.

A wrong block, a stale slot, a token one step late or another request's parameter changes the hash, and with it every
later token. The reference runs each request alone, without slots, blocks or batches.
"""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from oracle import prompt_details_of
from support_sampling import log_softmax, reference_choice, reference_scores
from support_slow import mostly_slow

from tokenmill.backends.base import StepInputs, StepLimits, StepResult
from tokenmill.backends.steps import PromptPositions, prompt_payloads
from tokenmill.backends.torch.sampling import sample, score
from tokenmill.backends.torch.slots import Slots
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.scheduler import Scheduler, SchedulerLimits
from tokenmill.errors import GenerationError
from tokenmill.runtime.assembly import Assembled
from tokenmill.runtime.executor import Executor
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.wire.messages import EngineInfo, SamplingParams, StoppingParams, TokenDetails

torch.set_num_threads(1)
VOCAB = 40


def chain(state: bytes, token_id: int) -> bytes:
    return hashlib.blake2b(state + token_id.to_bytes(4, "little"), digest_size=8).digest()


def logits_of(state: bytes) -> np.ndarray:
    rng = np.random.default_rng(int.from_bytes(state, "little"))
    return (rng.normal(size=VOCAB) * 3).astype(np.float32)


class HashStep:
    def __init__(self, future: Future[StepResult]) -> None:
        self.future = future

    def result(self) -> StepResult:
        return self.future.result()


class HashBackend:
    """Backend whose cache entry is the hash of a token and of the previous entry, read through the block table."""

    def __init__(self, limits: StepLimits, poison: int = -1, delay_s: float = 0.0) -> None:
        self.limits, self.poison, self.delay_s = limits, poison, delay_s
        self.slots = Slots(limits)
        self.num_blocks = 0
        self.thread = ThreadPoolExecutor(1)
        self.inputs: list[StepInputs] = []

    def block_bytes(self) -> int:
        return 8 * self.limits.block_size

    def step_bytes(self) -> int:
        return 0

    def allocate(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.cache = [b"?"] * (num_blocks * self.limits.block_size)

    def warm_up(self) -> None:
        pass

    def idle_work(self) -> bool:
        return False

    def close(self) -> None:
        self.thread.shutdown()

    def run(self, inputs: StepInputs) -> HashStep:
        self.inputs.append(inputs)
        return HashStep(self.thread.submit(self.compute, inputs))

    def place(self, slot: int, position: int) -> int:
        size = self.limits.block_size
        return int(self.slots.tables[slot, position // size]) * size + position % size

    def compute(self, inputs: StepInputs) -> StepResult:
        time.sleep(self.delay_s)
        self.slots.apply(inputs)
        states: list[bytes] = []  # of the tokens of the step
        for slot, start, count in zip(
            inputs.slots.tolist(), inputs.starts.tolist(), inputs.counts.tolist(), strict=True
        ):
            for position in range(start, start + count):
                before = self.cache[self.place(slot, position - 1)] if position else b""
                state = chain(before, int(self.slots.tokens[slot, position]))
                self.cache[self.place(slot, position)] = state
                states.append(state)
        ends = np.cumsum(inputs.counts) - 1
        logits = np.array([logits_of(states[end]) for end in ends[inputs.samples]], np.float32).reshape(-1, VOCAB)
        logits[np.argwhere(inputs.slots[inputs.samples] == self.poison)] = np.nan
        sampled = sample(torch.tensor(logits), self.slots, inputs)
        self.slots.record(inputs, sampled.token_ids)

        def score_part(part: PromptPositions) -> list[TokenDetails | None]:
            rows = np.array([logits_of(states[i]) for i in part.tokens], np.float32).reshape(-1, VOCAB)
            return score(torch.tensor(rows), self.slots.tokens[part.slots, part.targets].long(), part.top)

        prompts = prompt_payloads(inputs, self.slots.parameters.rows, score_part)
        details = sampled.logprobs.details() if sampled.logprobs else None
        return StepResult(sampled.token_ids.tolist(), details, prompts)


def make_engine(num_blocks=64, block_size=4, max_batch_tokens=16, max_batch_size=6, max_total=64, **how):
    limits = StepLimits(max_batch_tokens, max_batch_size, max_total, block_size)
    backend = HashBackend(limits, **how)
    backend.allocate(num_blocks)
    scheduler = Scheduler(
        BlockPool(num_blocks, block_size), SchedulerLimits(max_batch_tokens, max_batch_size, max_total, block_size)
    )
    info = EngineInfo(
        "hash", "float32", "cpu", "torch", num_blocks, block_size, VOCAB, max_total - 1, max_total, max_batch_tokens, 6
    )
    engine = OfflineEngine(Assembled(scheduler, Executor(backend, max_batch_size), info))
    return engine, backend


def alone(prompt, params: SamplingParams, stopping: StoppingParams):
    """Return the answer to one request, and the log-probabilities of its tokens and prompt, without an engine."""
    state, states = b"", []
    for token_id in prompt:
        state = chain(state, token_id)
        states.append(state)
    output, logprobs = [], []
    while len(output) < stopping.max_new_tokens:
        raw = logits_of(state)
        scores = reference_scores(raw, list(prompt), output, params, stopping)
        token_id = reference_choice(scores, params, len(prompt) + len(output))
        output.append(token_id)
        logprobs.append(log_softmax(raw if params.raw_logprobs else scores)[token_id])
        if token_id in stopping.stop_ids:
            break
        state = chain(state, token_id)
    prompt_logprobs = [log_softmax(logits_of(s))[t] for s, t in zip(states, prompt[1:], strict=False)]
    return output, logprobs, prompt_logprobs


def random_params(rng) -> SamplingParams:
    def maybe(value, off):
        return value if rng.random() < 0.25 else off

    return SamplingParams(
        temperature=float(rng.choice([0.0, 0.7, 1.0])),
        top_k=maybe(int(rng.integers(1, 20)), 0),
        top_p=maybe(float(rng.uniform(0.3, 0.95)), 1.0),
        repetition_penalty=maybe(1.3, 1.0),
        presence_penalty=maybe(0.7, 0.0),
        frequency_penalty=maybe(0.4, 0.0),
        seed=int(rng.integers(2**63)),
        logit_bias=maybe(((3, 2.0), (5, -4.0)), ()),
        logprobs=maybe(2, -1),
        raw_logprobs=bool(rng.integers(2)),
        prompt_logprobs=maybe(1, -1),
        watermark_gamma=maybe(0.25, 0.0),
        watermark_delta=3.0,
    )


@pytest.mark.parametrize("seed", mostly_slow(range(30), range(12)))
def test_any_crowd_in_any_limits_gets_what_each_gets_alone(seed):
    rng = np.random.default_rng(seed)
    engine, _ = make_engine(
        num_blocks=int(rng.integers(12, 40)), block_size=int(rng.choice([1, 2, 4, 8])) if seed % 3 else 4,
        max_batch_tokens=int(rng.integers(3, 40)), max_batch_size=int(rng.integers(1, 7)), max_total=40,
    )  # fmt: skip
    capacity = engine.info.capacity
    heads = [
        tuple(int(t) for t in rng.integers(0, VOCAB, 12)) for _ in range(2)
    ]  # shared, for hits of the prefix cache
    wanted, got = {}, {}
    with engine:
        for turn in range(14):
            head = heads[rng.integers(2)][: rng.integers(0, 13)]
            prompt = head + tuple(int(t) for t in rng.integers(0, VOCAB, rng.integers(1, 8)))
            room = min(40, capacity) - len(prompt)
            if room < 1:
                continue
            params = random_params(rng)
            stop_ids = tuple(int(t) for t in rng.integers(0, VOCAB, 2)) if rng.random() < 0.5 else ()
            stopping = StoppingParams(int(rng.integers(1, min(room, 20) + 1)), int(rng.integers(0, 2)), stop_ids)
            request_id = engine.submit(prompt, params, stopping)
            wanted[request_id] = prompt, params, stopping
            if turn % 4 == 3:  # cancelled before its end
                engine.abort(engine.submit(prompt, params, stopping))
            for _ in range(rng.integers(0, 4)):
                engine.step()
        for request_id in wanted:
            got[request_id] = list(engine.outputs(request_id))
        while engine.step():  # the step launched before the last token was known
            pass
        assert engine.stats.running == engine.stats.blocks_used == 0
    for request_id, (prompt, params, stopping) in wanted.items():
        output, logprobs, prompt_logprobs = alone(prompt, params, stopping)
        outputs = got[request_id]
        assert [t for o in outputs for t in o.token_ids] == output
        assert outputs[-1].finish_reason == ("stop" if output[-1] in stopping.stop_ids else "length")
        details: list[TokenDetails] = [d for o in outputs for d in o.details]
        assert [d.logprob for d in details] == pytest.approx(logprobs if params.logprobs >= 0 else [], abs=1e-4)
        found = [d.logprob for d in prompt_details_of(outputs)]
        assert found == pytest.approx(prompt_logprobs if params.prompt_logprobs >= 0 else [], abs=1e-4)


def test_the_crowds_meet_preemption_cache_hits_and_chunks():
    """Otherwise the test above covers less than it claims."""
    preemptions = cached = chunks = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        engine, backend = make_engine(num_blocks=14, max_batch_tokens=9, max_total=40)
        with engine:
            prompts = [[1, 2, 3, 4, 5, 6, 7, 8, int(rng.integers(VOCAB))] for _ in range(8)]
            engine.generate(prompts, None, StoppingParams(20))
            preemptions += engine.stats.preemptions
            cached += engine.stats.cached_tokens
            chunks += sum(len(i.samples) < len(i.slots) for i in backend.inputs)
    assert preemptions > 5
    assert cached > 50
    assert chunks > 5


def test_the_device_computes_a_step_while_the_host_handles_the_one_before():
    engine, backend = make_engine(delay_s=0.02)
    with engine:
        request_id = engine.submit([1, 2, 3], None, StoppingParams(6))
        launched = []
        for output in engine.outputs(request_id):
            if output.token_ids:
                launched.append(len(backend.inputs))
    assert launched == [2, 3, 4, 5, 6, 6]  # when token n is sent, step n + 1 runs


@pytest.mark.parametrize(
    "params,tail",
    [
        ({}, "greedy"),
        ({"logprobs": 3}, "greedy"),
        ({"top_p": 0.5}, "greedy"),  # filters have no effect on greedy sampling
        ({"temperature": 1.0}, "plain"),
        ({"temperature": 1.0, "top_k": 5}, "full"),
        ({"repetition_penalty": 1.1}, "full"),
        ({"logit_bias": ((1, 1.0),)}, "full"),
    ],
)
def test_a_step_runs_the_shortest_tail_that_its_rows_allow(params, tail):
    engine, backend = make_engine()
    with engine:
        list(engine.outputs(engine.submit([1, 2], SamplingParams(**params), StoppingParams(3))))
    assert {i.tail for i in backend.inputs} == {tail}
    assert {i.logprobs for i in backend.inputs} == {params.get("logprobs", -1)}


def test_the_tail_is_chosen_by_the_rows_that_sample_only():
    engine, backend = make_engine(max_batch_tokens=6)
    with engine:
        greedy = engine.submit([1, 2], None, StoppingParams(12))
        long = engine.submit(list(range(20)), SamplingParams(temperature=1.0, top_k=3), StoppingParams(2))
        list(engine.outputs(greedy))
        list(engine.outputs(long))
    tails = [i.tail for i in backend.inputs]
    assert tails[0] == "greedy"  # the long prompt is being computed
    assert "full" in tails


def test_numbers_that_are_not_finite_end_their_request_alone():
    engine, _ = make_engine(poison=1)
    with engine:
        first, second, third = (engine.submit([i, 7], None, StoppingParams(5)) for i in (1, 2, 3))
        tokens = [t for o in engine.outputs(first) for t in o.token_ids]
        with pytest.raises(GenerationError, match="finite"):
            list(engine.outputs(second))
        list(engine.outputs(third))
    assert tokens == alone((1, 7), SamplingParams(), StoppingParams(5))[0]


def test_closing_the_reader_aborts_its_request_and_frees_its_blocks():
    engine, _ = make_engine()
    with engine:
        outputs = engine.outputs(engine.submit([1, 2, 3], None, StoppingParams(50)))
        next(outputs), next(outputs)
        outputs.close()
        assert engine.step()  # processes the abort, and the launched step
        assert not engine.step()
        assert engine.stats.blocks_used == engine.stats.running == 0


def test_readers_may_take_turns():
    engine, _ = make_engine()
    with engine:
        a = engine.outputs(engine.submit([1], None, StoppingParams(5)))
        b = engine.outputs(engine.submit([2], None, StoppingParams(5)))
        mixed = [next(reader) for _ in range(6) for reader in (a, b)]
        assert [len(o.token_ids) for o in mixed] == [0, 0] + [1] * 10


def test_a_request_that_can_never_run_is_an_error_of_its_own():
    engine, _ = make_engine(max_total=10)
    with engine, pytest.raises(GenerationError, match=r"12 tokens.*may have 10"):
        list(engine.outputs(engine.submit([1] * 8, None, StoppingParams(4))))
