"""The sampling kernel against the oracle of support_sampling.py, row by row."""

import threading

import numpy as np
import pytest
from support_kernels import ISAS, load
from support_sampling import (
    a_request,
    assert_the_rules,
    chi_square,
    log_softmax,
    make_step,
    random_masks,
    random_request,
    reference_noise,
    reference_scores,
    softmax,
)
from support_slow import mostly_slow

from tokenmill.backends.base import Masks, StepInputs, StepLimits
from tokenmill.backends.cpu import layout
from tokenmill.backends.cpu.sampler import Sampler
from tokenmill.backends.cpu.slots import Slots
from tokenmill.backends.sampling import MOST_TIES
from tokenmill.backends.steps import step_tokens
from tokenmill.wire.messages import SamplingParams, StoppingParams, TokenDetails

VOCAB, SLOTS, MAX_TOTAL, THREADS = 61, 12, 64, 2


@pytest.fixture(scope="module", params=mostly_slow(ISAS, ISAS[:1]))
def kernel(request):
    code = load(request.param, ["sample"])
    yield code.function("sample")  # the code must outlive its callers
    del code


class Bench:
    """Slots, a sampler, and the words of a step, as in the backend."""

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

    def sample(self, logits, inputs, masks=None):
        self.slots.apply(inputs)
        self.sampler.begin(inputs, masks)
        tokens = step_tokens(inputs)
        ids = self._walk(logits, tokens.sampled_slots, tokens.sampled_positions)
        return ids, self.sampler.details()

    def score(self, logits, targets, wanted):
        self.sampler.begin_prompt(np.array(targets), np.array(wanted))
        self._walk(logits)
        return self.sampler.details()


def run(kernel, logits, requests, outputs=None, slots=None, masks=None):
    bench = Bench(kernel, logits.shape[1], max(SLOTS, len(requests)))
    return bench.sample(logits, make_step(requests, outputs, slots), masks)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("vocab", "batches"), mostly_slow([(VOCAB, 150), (700, 25), (4096, 3)], [(VOCAB, 150)]))
def test_a_batch_of_unlike_rows_chooses_what_the_reference_chooses_row_by_row(kernel, vocab, batches, masked):
    rng = np.random.default_rng(vocab)
    for _ in range(batches):
        requests = [random_request(rng, vocab) for _ in range(rng.integers(1, SLOTS))]
        outputs = [[int(i) for i in rng.integers(0, vocab, rng.integers(0, 20))] for _ in requests]
        logits = (rng.normal(size=(len(requests), vocab)) * 4).astype(np.float32)
        slots = rng.permutation(SLOTS)[: len(requests)]
        masks, allowed = random_masks(rng, len(requests), vocab) if masked else (None, None)
        assert_the_rules(logits, requests, outputs, run(kernel, logits, requests, outputs, slots, masks), allowed)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
def test_a_mask_hides_no_broken_number_and_one_that_allows_nothing_breaks_its_row_alone(kernel, params):
    logits = np.random.default_rng(1).normal(size=(4, VOCAB)).astype(np.float32)
    logits[1, 7] = np.nan
    requests = [a_request(seed=i, logprobs=2, raw_logprobs=i == 3, **params) for i in range(4)]
    bits = np.array([[1 << 5, 0], [1 << 5, 0], [0, 0]], np.uint32)
    ids, details = run(kernel, logits, requests, masks=Masks(np.array([1, 2, 3], np.int32), bits))
    assert ids[1:] == [-1, 5, -1]
    assert details[1] is details[3] is None
    assert details[2] == TokenDetails(0.0, (5,), (0.0,))


def test_bits_of_the_noise_are_the_published_function_of_seed_position_and_id(kernel):
    """Two ids are equally likely, so the noise decides."""
    logits = np.zeros((200, 2), np.float32)
    seeds = [0, 1, 2**63 - 1, 2**62 + 12345, *range(1000, 1196)]
    requests = [a_request(prompt=[1] * (1 + i % 30), temperature=1.0, seed=s) for i, s in enumerate(seeds)]
    places = [(r.sampling.seed, len(r.prompt_ids)) for r in requests]
    expected = [int(reference_noise(*place, 1) > reference_noise(*place, 0)) for place in places]
    assert run(kernel, logits, requests)[0] == expected
    filtered = [a_request(r.prompt_ids, temperature=1.0, seed=r.sampling.seed, min_p=0.1) for r in requests]
    assert run(kernel, logits, filtered)[0] == expected
    assert 60 < sum(expected) < 140


def test_a_seed_gives_the_same_tokens_and_log_probabilities_in_any_company_and_any_slot(kernel):
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(33, 500)) * 3).astype(np.float32)
    kinds = ({}, {"top_p": 0.9}, {"top_k": 7}, {"typical_p": 0.8}, {"repetition_penalty": 1.3, "min_p": 0.01})
    requests = [a_request(temperature=1.0, seed=i, logprobs=3, **kinds[i % 5]) for i in range(33)]
    alone = [run(kernel, logits[i : i + 1], [requests[i]], slots=[3]) for i in range(33)]
    for batch in (2, 5, 16, 33):
        ids, details = run(kernel, logits[:batch], requests[:batch], slots=rng.permutation(max(batch, SLOTS))[:batch])
        assert ids == [a[0][0] for a in alone[:batch]]
        assert details == [a[1][0] for a in alone[:batch]]  # to the bit


@pytest.mark.parametrize(
    "params", [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.02}, {"typical_p": 0.8}, {"top_k": 30, "top_p": 0.8}]
)
def test_sampled_ids_follow_the_softmax_of_what_the_filters_keep(kernel, params):
    rng = np.random.default_rng(2)
    logits, rows = (rng.normal(size=VOCAB) * 2).astype(np.float32), 4000
    requests = [a_request(prompt=(1, 2), temperature=0.8, seed=i, **params) for i in range(rows)]
    chosen = np.array(run(kernel, np.tile(logits, (rows, 1)), requests)[0])
    scores = reference_scores(logits, [1, 2], [], SamplingParams(temperature=0.8, **params), StoppingParams(5))
    probabilities = softmax(scores)
    assert set(chosen) <= set(np.flatnonzero(probabilities))
    assert chi_square(np.bincount(chosen, minlength=VOCAB), probabilities) < 2.5


@pytest.mark.parametrize("spread", [0.0, 0.02, 1.0, 6.0])
@pytest.mark.parametrize(
    "params", [{"top_p": 0.8}, {"top_p": 0.999}, {"top_k": 3000}, {"top_k": 40}, {"min_p": 0.3}, {"typical_p": 0.7}]
)
def test_filters_of_flat_and_steep_distributions_over_many_ids_keep_what_a_sort_says(kernel, spread, params):
    vocab = 9001
    logits = (np.random.default_rng(5).normal(size=(1, vocab)) * spread).astype(np.float32)
    logits[0, 77] = -np.inf  # masked already
    request = a_request(temperature=0.7, logprobs=vocab, **params)
    detail = run(kernel, logits, [request])[1][0]
    expected = set(np.flatnonzero(np.isfinite(sorted_scores(logits[0], **params))))
    assert len(set(detail.top_ids) ^ expected) <= 2  # float32 against float64 on the last one
    assert np.exp(detail.top_logprobs).sum() == pytest.approx(1, abs=1e-4)
    assert detail.logprob in detail.top_logprobs


def sorted_scores(logits, temperature=0.7, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0):
    """Return the same as `reference_scores` in n log n, for a single filter."""
    x = logits.astype(np.float64) / temperature
    p = softmax(x)
    if min_p:
        return np.where(p < min_p * p.max(), -np.inf, x)
    if top_k:
        return np.where(x < np.sort(x)[-top_k], -np.inf, x)
    mean = -(p[p > 0] * np.log(p[p > 0])).sum()
    key = -p if top_p < 1 else np.where(p > 0, np.abs(-np.log(np.where(p > 0, p, 1)) - mean), np.inf)
    order = np.argsort(key, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    least = key[order][(before < (top_p if top_p < 1 else typical_p)).sum() - 1]
    return np.where(key <= least + 1e-12, x, -np.inf)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5, "typical_p": 0.5}])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("raw", [False, True])
def test_a_row_that_is_not_finite_gives_minus_one_and_harms_no_other(kernel, params, poison, raw):
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(3, VOCAB)).astype(np.float32)
    requests = [a_request(seed=i, logprobs=2, raw_logprobs=raw, **params) for i in range(3)]
    clean = run(kernel, logits, requests)[0]
    logits[1, 17] = poison
    bench, inputs = Bench(kernel), make_step(requests)
    ids, details = bench.sample(logits, inputs)
    assert ids == [clean[0], -1, clean[2]]
    assert [d is None for d in details] == [False, True, False]
    assert bench.slots.tokens[:3, 3].tolist() == [clean[0], 0, clean[2]]  # a valid id, for a step launched already
    logits[:] = -np.inf
    assert bench.sample(logits, inputs)[0] == [-1, -1, -1]


def test_top_k_keeps_ties_and_may_exceed_the_vocabulary(kernel):
    logits = np.array([[3.0, 3.0, 3.0, 1.0, 0.0]], np.float32)
    for top_k in (1, 2, 3):
        requests = [a_request(temperature=1.0, top_k=top_k, seed=s) for s in range(60)]
        assert set(run(kernel, np.tile(logits, (60, 1)), requests)[0]) == {0, 1, 2}
    requests = [a_request(temperature=2.0, top_k=10**6, seed=s) for s in range(200)]
    assert set(run(kernel, np.tile(logits, (200, 1)), requests)[0]) == {0, 1, 2, 3, 4}


def test_of_the_likeliest_that_tie_the_first_is_taken(kernel):
    logits = np.zeros((4, 300), np.float32)
    logits[1, [299, 70]], logits[2, [64, 63]], logits[3, 299] = 5, 5, 1
    assert run(kernel, logits, [a_request() for _ in range(4)])[0] == [0, 70, 63, 299]


def test_stop_ids_are_banned_until_enough_tokens_were_generated(kernel):
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 7] = 50.0
    request = a_request(stopping=StoppingParams(10, 3, (7,)))
    chosen = [run(kernel, logits, [request], [[1] * n])[0][0] for n in range(5)]
    assert [c == 7 for c in chosen] == [False, False, False, True, True]


def test_a_slot_taken_over_by_another_request_keeps_nothing_of_the_one_before(kernel):
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 9] = 1.0
    bench = Bench(kernel)
    biased = a_request(logit_bias=((3, 50.0), (4, 60.0)), repetition_penalty=2.0)
    assert bench.sample(logits, make_step([biased]))[0] == [4]
    assert bench.sample(logits, make_step([a_request(prompt=(9, 9))]))[0] == [9]


def test_a_chosen_token_is_seen_by_the_penalties_of_the_next_step(kernel):
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [5, 6, 7]] = 9.0, 8.0, 7.0
    bench = Bench(kernel)
    inputs = make_step([a_request(presence_penalty=5.0)])
    chosen = []
    for _ in range(4):
        chosen += bench.sample(logits, inputs)[0]
        inputs = StepInputs(inputs.slots, inputs.starts + 1, inputs.counts, inputs.samples, tail="full")
    assert chosen == [5, 6, 7, 5]


def test_prompt_log_probabilities_are_the_models_own(kernel):
    rng = np.random.default_rng(6)
    logits = (rng.normal(size=(20, 1000)) * 3).astype(np.float32)
    targets, wanted = rng.integers(0, 1000, 20), rng.integers(-1, 6, 20)
    found = Bench(kernel, 1000).score(logits, targets, wanted)
    for row, target, most, detail in zip(logits, targets, wanted, found, strict=True):
        if most < 0:
            assert detail is None
            continue
        expected = log_softmax(row)
        best = np.argsort(-expected)[:most]
        assert detail.logprob == pytest.approx(expected[target], abs=1e-5)
        assert list(detail.top_ids) == best.tolist()
        assert detail.top_logprobs == pytest.approx(expected[best], abs=1e-5)


def test_over_a_real_vocabulary_tokens_and_log_probabilities_are_the_torch_backends(kernel):
    torch = pytest.importorskip("torch")
    from tokenmill.backends.torch import sampling
    from tokenmill.backends.torch.slots import Slots as TorchSlots

    rng, vocab = np.random.default_rng(8), 49_152
    for _ in range(2):
        requests = [random_request(rng, vocab) for _ in range(SLOTS)]
        outputs = [[int(i) for i in rng.integers(0, vocab, rng.integers(0, 20))] for _ in requests]
        spread = rng.uniform(0.5, 4, (SLOTS, 1))
        logits = (rng.normal(size=(SLOTS, vocab)) * spread).astype(np.float32)
        inputs = make_step(requests, outputs)
        state = TorchSlots(StepLimits(64, SLOTS, MAX_TOTAL, 4))
        state.apply(inputs)
        expected = sampling.sample(torch.tensor(logits), state, inputs)
        ids, details = Bench(kernel, vocab).sample(logits, inputs)
        assert ids == expected.token_ids.tolist()
        for found, wanted in zip(details, expected.logprobs.details(), strict=True):
            assert (found is None) == (wanted is None)
            if found:
                assert found.logprob == pytest.approx(wanted.logprob, abs=1e-4)
                assert found.top_ids == wanted.top_ids
                assert found.top_logprobs == pytest.approx(wanted.top_logprobs, abs=1e-4)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.95}])
def test_ids_that_tie_with_the_last_of_the_likeliest_are_listed_too_unless_log_probabilities_are_raw(kernel, params):
    rng, rows = np.random.default_rng(10), 40
    logits = np.round(rng.normal(size=(rows, VOCAB)) * 2).astype(np.float32)
    requests = [a_request(logprobs=i % 5, raw_logprobs=i % 7 == 0, seed=i, **params) for i in range(rows)]
    longer = 0
    for i, detail in enumerate(run(kernel, logits, requests)[1]):
        own, n = requests[i].sampling, i % 5
        scores = logits[i] if i % 7 == 0 else reference_scores(logits[i], [1, 2, 3], [], own, StoppingParams(9))
        best = [int(j) for j in np.argsort(-scores, kind="stable") if scores[j] > -np.inf]
        least = scores[best[min(n, len(best)) - 1]] if n else np.inf
        expected = best[:n] if i % 7 == 0 else [j for j in best if scores[j] >= least][: n + MOST_TIES]
        longer += len(expected) > n
        assert list(detail.top_ids) == expected
        assert detail.top_logprobs == pytest.approx(log_softmax(scores)[expected], abs=1e-4)
    assert longer > 5


@pytest.mark.parametrize("share", [0.999, 0.999_999, 0.999_999_9])
@pytest.mark.parametrize("which", ["top_p", "typical_p"])
def test_a_filter_that_keeps_all_but_what_rounding_decides_never_keeps_nothing(kernel, which, share):
    rng, vocab, rows = np.random.default_rng(11), 20_000, 24
    logits = (rng.normal(size=(rows, vocab)) * 10.0 ** rng.uniform(-7, 0, (rows, 1))).astype(np.float32)
    requests = [a_request(temperature=1.0, seed=i, logprobs=0, **{which: share}) for i in range(rows)]
    ids, details = run(kernel, logits, requests)
    plain = run(kernel, logits, [a_request(temperature=1.0, seed=i, logprobs=0) for i in range(rows)])[1]
    assert len(set(ids)) > rows / 2
    for detail, whole in zip(details, plain, strict=True):
        assert -20 < detail.logprob < 0
        assert abs(whole.logprob) < 20
