"""The sampling kernel against the rules written a second time (support_sampling.py): rows of a batch, one by one."""

import threading

import numpy as np
import pytest
from support_sampling import log_softmax, reference_choice, reference_noise, reference_scores, softmax

from tokenmill.backends.base import Admitted, StepInputs, StepLimits
from tokenmill.backends.cpu import isa, layout
from tokenmill.backends.cpu.cache import KernelCache
from tokenmill.backends.cpu.sampler import Sampler
from tokenmill.backends.cpu.slots import Slots
from tokenmill.wire.messages import Request, SamplingParams, StoppingParams

VOCAB, SLOTS, MAX_TOTAL, THREADS = 61, 12, 64, 2


@pytest.fixture(scope="module", params=[i.name for i in isa.available()])
def kernel(request, tmp_path_factory):
    code = KernelCache(tmp_path_factory.mktemp("kernels"), isa.detect(request.param)).load(["sample"])
    yield code.function("sample")  # the code must outlive its callers
    del code


class Bench:
    """Slots, a sampler, and a step's words, as the backend has them."""

    def __init__(self, kernel, vocab=VOCAB, slots=SLOTS, max_total=MAX_TOTAL):
        self.kernel, self.vocab = kernel, vocab
        self.slots = Slots(StepLimits(64, slots, max_total, 16))
        self.sampler = Sampler(self.slots.tokens, self.slots.parameters, vocab, THREADS)

    def _walk(self, logits, slots=None, positions=None):
        rows, stride = len(logits), -(-self.vocab // 16) * 16
        padded = np.full((rows, stride), 1e9, np.float32)  # what lies behind a row must not count
        padded[:, : self.vocab] = logits
        result = np.full(rows, -7, np.int64)
        row, context, counter = (np.zeros(n, np.int64) for n in (layout.COLUMNS, layout.CONTEXT, 8))
        row[[layout.ROWS, layout.X, layout.X_STRIDE, layout.WIDTH]] = 1, padded.ctypes.data, stride * 4, self.vocab
        context[[layout.THREADS, layout.SAMPLES]] = THREADS, rows
        context[layout.SAMPLING], context[layout.RESULT] = self.sampler.address, result.ctypes.data
        held = [np.ascontiguousarray(a, np.int64) for a in (slots, positions) if a is not None]
        if held:
            context[[layout.SAMPLED_SLOTS, layout.SAMPLED_POSITIONS]] = [a.ctypes.data for a in held]
        args = [a.ctypes.data for a in (row, context, counter)]
        walkers = [threading.Thread(target=self.kernel, args=(tid, *args)) for tid in range(THREADS)]
        for walker in walkers:
            walker.start()
        for walker in walkers:
            walker.join()
        assert counter[0] == rows + THREADS
        return result.tolist()

    def sample(self, logits, inputs):
        self.slots.apply(inputs)
        self.sampler.begin(inputs)
        places = self.slots.places(inputs)
        ids = self._walk(logits, places.sampled_slots, places.sampled_positions)
        return ids, self.sampler.details()

    def score(self, logits, targets, wanted):
        self.sampler.begin_prompt(np.array(targets), np.array(wanted))
        self._walk(logits)
        return self.sampler.details()


def a_request(prompt=(1, 2, 3), stopping=None, **params) -> Request:
    return Request(1, tuple(prompt), SamplingParams(**params), stopping or StoppingParams(10))


def make_step(requests, outputs=None, slots=None) -> StepInputs:
    """A step that samples each request's next token."""
    outputs = outputs or [[] for _ in requests]
    number = np.array(slots if slots is not None else range(len(requests)), np.int32)
    ids = [np.array([*r.prompt_ids, *o], np.int32) for r, o in zip(requests, outputs, strict=True)]
    return StepInputs(
        number,
        np.array([len(i) for i in ids], np.int32) - 1,
        np.ones(len(ids), np.int32),
        np.arange(len(ids), dtype=np.int32),
        tuple(Admitted(int(s), r, i) for s, r, i in zip(number, requests, ids, strict=True)),
        tail="full",
        logprobs=max(r.sampling.logprobs for r in requests),
    )


def run(kernel, logits, requests, outputs=None, slots=None):
    bench = Bench(kernel, logits.shape[1], max(SLOTS, len(requests)))
    return bench.sample(logits, make_step(requests, outputs, slots))


def random_request(rng, vocab=VOCAB) -> Request:
    def maybe(value, off, p=0.35):
        return value if rng.random() < p else off

    prompt = tuple(int(i) for i in rng.integers(0, vocab, rng.integers(1, 20)))
    params = SamplingParams(
        temperature=float(rng.choice([0.0, 0.5, 1.0, 1.7])),
        top_k=maybe(int(rng.integers(1, vocab + 20)), 0),
        top_p=maybe(float(rng.uniform(0.05, 0.99)), 1.0),
        typical_p=maybe(float(rng.uniform(0.05, 0.99)), 1.0),
        min_p=maybe(float(rng.uniform(0.01, 0.9)), 0.0),
        repetition_penalty=maybe(float(rng.uniform(0.5, 2.0)), 1.0),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        seed=int(rng.integers(0, 2**63)),
        logit_bias=tuple((int(i), float(rng.normal())) for i in rng.integers(0, vocab, maybe(4, 0))),
        logprobs=maybe(int(rng.integers(0, 5)), -1),
        raw_logprobs=bool(rng.random() < 0.5),
    )
    stop_ids = tuple(int(i) for i in rng.choice(vocab, 3, replace=False))
    return Request(
        1, prompt, params, StoppingParams(50, int(rng.integers(0, 6)) if rng.random() < 0.3 else 0, stop_ids)
    )


@pytest.mark.parametrize(("vocab", "batches"), [(VOCAB, 150), (700, 25), (4096, 3)])
def test_a_batch_of_unlike_rows_chooses_what_the_reference_chooses_row_by_row(kernel, vocab, batches):
    rng = np.random.default_rng(vocab)
    for _ in range(batches):
        requests = [random_request(rng, vocab) for _ in range(rng.integers(1, SLOTS))]
        outputs = [[int(i) for i in rng.integers(0, vocab, rng.integers(0, 20))] for _ in requests]
        logits = (rng.normal(size=(len(requests), vocab)) * 4).astype(np.float32)
        slots = rng.permutation(SLOTS)[: len(requests)]
        ids, details = run(kernel, logits, requests, outputs, slots)
        details = details or [None] * len(requests)
        for i, request in enumerate(requests):
            params, prompt, output = request.sampling, list(request.prompt_ids), outputs[i]
            scores = reference_scores(logits[i], prompt, output, params, request.stopping)
            assert ids[i] == reference_choice(scores, params, len(prompt) + len(output)), (params, request.stopping)
            if params.logprobs < 0:
                assert details[i] is None
                continue
            expected = log_softmax(logits[i] if params.raw_logprobs else scores)
            best = np.argsort(-expected, kind="stable")[: params.logprobs]
            best = [int(j) for j in best if expected[j] > -np.inf]
            assert details[i].logprob == pytest.approx(expected[ids[i]], abs=1e-4)
            assert list(details[i].top_ids) == best
            assert details[i].top_logprobs == pytest.approx(expected[best], abs=1e-4)
