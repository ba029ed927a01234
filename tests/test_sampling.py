"""Sampling against a plain numpy reference, written row by row from the rules in backends/sampling.py."""

import numpy as np
import pytest
import torch
from support_sampling import (
    MASK,
    a_request,
    assert_the_rules,
    chi_square,
    log_softmax,
    make_step,
    random_masks,
    random_request,
    reference_green,
    reference_noise,
    reference_scores,
    softmax,
)

from tokenmill.backends import sampling as rules
from tokenmill.backends import steps
from tokenmill.backends.base import Admitted, Masks, StepInputs, StepLimits
from tokenmill.backends.torch import sampling
from tokenmill.backends.torch.slots import Slots
from tokenmill.wire.messages import Request, SamplingParams, StoppingParams, TokenDetails

torch.set_num_threads(1)
VOCAB, SLOTS, MAX_TOTAL = 61, 12, 64


# Set-up of rows for the code under test.


def tail_of(requests) -> str:
    return rules.tail_of(np.concatenate([rules.row_of(r) for r in requests]))


def prepared(requests, outputs=None, slots=None, tail=None):
    """Return slots with prompt and output of each request, and the step that samples the next token of each."""
    state = Slots(StepLimits(64, max(SLOTS, len(requests)), MAX_TOTAL, 4))
    inputs = make_step(requests, outputs, slots, tail or tail_of(requests))
    state.apply(inputs)
    return state, inputs


def run(logits, requests, outputs=None, masks=None, **how):
    state, inputs = prepared(requests, outputs, **how)
    return sampling.sample(torch.tensor(logits), state, inputs, masks)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_a_batch_of_unlike_rows_chooses_what_the_reference_chooses_row_by_row(seed, masked):
    rng = np.random.default_rng(seed)
    requests = [random_request(rng, VOCAB) for _ in range(rng.integers(1, SLOTS))]
    outputs = [[int(i) for i in rng.integers(0, VOCAB, rng.integers(0, 20))] for _ in requests]
    slots = rng.permutation(SLOTS)[: len(requests)]
    logits = (rng.normal(size=(len(requests), VOCAB)) * 4).astype(np.float32)
    masks, allowed = random_masks(rng, len(requests), VOCAB) if masked else (None, None)
    sampled = run(logits, requests, outputs, masks, slots=slots)
    details = sampled.logprobs.details() if sampled.logprobs else None
    assert_the_rules(logits, requests, outputs, (sampled.token_ids.tolist(), details), allowed)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
def test_a_mask_hides_no_broken_number_and_one_that_allows_nothing_breaks_its_row_alone(params):
    logits = np.random.default_rng(1).normal(size=(4, VOCAB)).astype(np.float32)
    logits[1, 7] = np.nan
    requests = [a_request(seed=i, logprobs=2, raw_logprobs=i == 3, **params) for i in range(4)]
    bits = np.array([[1 << 5, 0], [1 << 5, 0], [0, 0]], np.uint32)
    sampled = run(logits, requests, masks=Masks(np.array([1, 2, 3], np.int32), bits))
    assert sampled.token_ids.tolist()[1:] == [-1, 5, -1]
    first, _, masked, _ = sampled.logprobs.details()
    assert first is not None
    assert masked == TokenDetails(0.0, (5,), (0.0,))


def test_the_noise_is_the_published_function_of_seed_position_and_id():
    seeds = [0, 1, 2**63 - 1, 2**64 - 1, 123456789012345]
    positions = np.array([0, 1, 77, 2**20, 5])
    low = np.array([s & MASK for s in seeds], np.uint32)
    high = np.array([s >> 32 for s in seeds], np.uint32)
    keys = rules.noise_keys(low, high, positions)
    expected = [[reference_noise(s, int(p), t) for t in range(300)] for s, p in zip(seeds, positions, strict=True)]
    assert sampling.gumbel(keys, 300, torch.device("cpu")).numpy() == pytest.approx(np.array(expected), abs=2e-5)
    assert rules.noise(keys[:, None], np.arange(300)) == pytest.approx(np.array(expected), abs=2e-5)


@pytest.mark.parametrize(("vocab", "gamma"), [(61, 0.5), (61, 1.0), (1000, 0.25), (1000, 0.001), (49_152, 0.5)])
def test_green_ids_are_the_head_of_the_permutation_that_torch_seeds_with_the_token_before(vocab, gamma):
    for previous_id in (0, 1, 17, 278, 49_151, 151_935):  # seeds beyond 32 bits too
        generator = torch.Generator().manual_seed(15_485_863 * previous_id)
        expected = torch.randperm(vocab, generator=generator)[: int(gamma * vocab)].tolist()
        assert rules.green_ids(previous_id, gamma, vocab).tolist() == expected
        assert reference_green(previous_id, gamma, vocab) == expected
        assert sampling.green_ids(previous_id, gamma, vocab).tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_detector_finds_the_watermark_and_raw_log_probabilities_do_not_show_it(temperature):
    rng, rows, gamma = np.random.default_rng(9), 200, 0.25
    logits = rng.normal(size=(rows, VOCAB)).astype(np.float32)
    prompts = [(1, int(i)) for i in rng.integers(0, VOCAB, rows)]
    greens = [set(reference_green(prompt[-1], gamma, VOCAB)) for prompt in prompts]

    def z_score(**params) -> float:
        requests = [a_request(p, temperature=temperature, seed=i, **params) for i, p in enumerate(prompts)]
        ids = run(logits, requests).token_ids.tolist()
        hits = sum(token_id in green for token_id, green in zip(ids, greens, strict=True))
        return (hits - gamma * rows) / (rows * gamma * (1 - gamma)) ** 0.5

    assert abs(z_score()) < 3
    assert z_score(watermark_gamma=gamma, watermark_delta=2.0) > 8
    marked = a_request(prompts[0], watermark_gamma=gamma, watermark_delta=50.0, logprobs=0, raw_logprobs=True)
    sampled = run(logits[:1], [marked])
    chosen = int(sampled.token_ids[0])
    assert chosen in greens[0]
    assert sampled.logprobs.details()[0].logprob == pytest.approx(log_softmax(logits[0])[chosen], abs=1e-4)


def test_a_seed_gives_the_same_tokens_in_any_company_and_any_slot():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, VOCAB)).astype(np.float32)
    requests = [a_request(temperature=1.0, seed=i, top_p=(1.0, 0.9)[i % 2]) for i in range(8)]
    together = run(logits, requests, slots=rng.permutation(8)).token_ids.tolist()
    alone = [run(logits[i : i + 1], [requests[i]], slots=[3]).token_ids.tolist()[0] for i in range(8)]
    assert together == alone


@pytest.mark.parametrize("varies", ["seed", "position"])
def test_sampled_ids_follow_the_softmax_whether_seeds_or_positions_vary(varies):
    rng = np.random.default_rng(1)
    logits, draws = (rng.normal(size=VOCAB) * 2).astype(np.float32), 20_000
    numbers = np.arange(draws)
    zeros = np.zeros(draws, np.uint32)
    keys = rules.noise_keys(numbers.astype(np.uint32), zeros, zeros) if varies == "seed" else rules.noise_keys(
        zeros + np.uint32(42), zeros, numbers
    )  # fmt: skip
    chosen = (sampling.gumbel(keys, VOCAB, torch.device("cpu")) + torch.tensor(logits)).argmax(-1).numpy()
    counts = np.bincount(chosen, minlength=VOCAB)
    assert chi_square(counts, softmax(logits.astype(np.float64))) < 1.8  # 60 degrees: beyond 1.8 once in 10,000
    pairs = np.bincount((chosen[:-1] % 4) * 4 + chosen[1:] % 4, minlength=16)
    marginal = np.bincount(chosen % 4, minlength=4) / draws
    assert chi_square(pairs, np.outer(marginal, marginal).ravel()) < 3  # neighbours are independent


def test_filters_leave_the_distribution_of_what_they_keep():
    rng = np.random.default_rng(2)
    logits, rows = (rng.normal(size=VOCAB) * 2).astype(np.float32), 4000
    params = SamplingParams(temperature=0.8, top_k=20, top_p=0.9)
    request = [Request(1, (1, 2), SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=i), StoppingParams(5))
               for i in range(rows)]  # fmt: skip
    chosen = run(np.tile(logits, (rows, 1)), request).token_ids.numpy()
    probabilities = softmax(reference_scores(logits, [1, 2], [], params, StoppingParams(5)))
    assert set(chosen) <= set(np.flatnonzero(probabilities))
    assert chi_square(np.bincount(chosen, minlength=VOCAB), probabilities) < 2.5


@pytest.mark.parametrize("tail", ["greedy", "plain", "full"])
def test_a_greedy_row_takes_the_likeliest_under_every_tail(tail):
    logits = np.random.default_rng(3).normal(size=(5, VOCAB)).astype(np.float32)
    sampled = run(logits, [a_request(top_k=3, top_p=0.5) for _ in range(5)], tail=tail)
    assert sampled.token_ids.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5, "typical_p": 0.5}])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_row_that_is_not_finite_gives_minus_one_and_harms_no_other(params, poison):
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(3, VOCAB)).astype(np.float32)
    requests = [a_request(seed=i, logprobs=2, **params) for i in range(3)]
    clean = run(logits, requests).token_ids.tolist()
    logits[1, 17] = poison
    state, inputs = prepared(requests)
    sampled = sampling.sample(torch.tensor(logits), state, inputs)
    assert sampled.token_ids.tolist() == [clean[0], -1, clean[2]]
    assert [d is None for d in sampled.logprobs.details()] == [False, True, False]
    state.record(inputs, sampled.token_ids)
    assert state.tokens[:3, 3].tolist() == [clean[0], 0, clean[2]]  # a valid id, for a step that is launched already


def test_top_k_keeps_ties_and_may_exceed_the_vocabulary():
    logits = np.array([[3.0, 3.0, 3.0, 1.0, 0.0]], np.float32)
    for top_k in (1, 2, 3):
        seen = {run(logits, [a_request(temperature=1.0, top_k=top_k, seed=s)]).token_ids.item() for s in range(60)}
        assert seen == {0, 1, 2}
    seen = {run(logits, [a_request(temperature=2.0, top_k=10**6, seed=s)]).token_ids.item() for s in range(200)}
    assert seen == {0, 1, 2, 3, 4}


def test_top_p_of_a_flat_distribution_wider_than_the_first_look_is_exact():
    vocab = 4 * sampling._LIKELY
    logits = (np.random.default_rng(5).normal(size=(1, vocab)) * 0.05).astype(np.float32)
    state, inputs = prepared([a_request(temperature=1.0, top_p=0.8, logprobs=vocab)])
    kept = sampling.sample(torch.tensor(logits), state, inputs).logprobs.details()[0].top_ids
    expected = reference_scores(logits[0], [1], [], SamplingParams(temperature=1.0, top_p=0.8), StoppingParams(1))
    assert abs(len(kept) - np.isfinite(expected).sum()) <= 1  # float32 against float64 on the last one
    assert len(set(kept) ^ set(np.flatnonzero(np.isfinite(expected)))) <= 1


def test_stop_ids_are_banned_until_enough_tokens_were_generated():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 7] = 50.0
    request = a_request(stopping=StoppingParams(10, 3, (7,)))
    chosen = [run(logits, [request], [[1] * n]).token_ids.item() for n in range(5)]
    assert [c == 7 for c in chosen] == [False, False, False, True, True]


def test_a_slot_taken_over_by_another_request_keeps_nothing_of_the_one_before():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 9] = 1.0
    state, inputs = prepared([a_request(logit_bias=((3, 50.0), (4, 60.0)), repetition_penalty=2.0)])
    assert sampling.sample(torch.tensor(logits), state, inputs).token_ids.item() == 4
    fresh = Admitted(0, a_request(prompt=(9, 9)), np.array([9, 9], np.int32))
    inputs = StepInputs(*(np.array(a, np.int32) for a in ([0], [1], [1], [0])), admitted=(fresh,), tail="full")
    state.apply(inputs)
    assert sampling.sample(torch.tensor(logits), state, inputs).token_ids.item() == 9


def test_prompt_logprobs_are_the_models_own_of_the_prompts_next_tokens_in_every_chunk():
    rng = np.random.default_rng(6)
    prompt = tuple(int(i) for i in rng.integers(0, VOCAB, 11))
    wants, silent = a_request(prompt, prompt_logprobs=3), a_request((5, 6, 7))
    logits = rng.normal(size=(11, VOCAB)).astype(np.float32)
    state = Slots(StepLimits(64, SLOTS, MAX_TOTAL, 4))
    found, admitted = [], (Admitted(2, silent, np.array([5, 6, 7])), Admitted(4, wants, np.array(prompt)))
    for start, count in ((0, 4), (4, 5), (9, 2)):
        rows = (np.array(a, np.int32) for a in ([2, 4], [0, start], [3, count], [0, 1]))
        inputs = StepInputs(*rows, admitted=admitted, prompt_logprobs=3)
        state.apply(inputs)
        seen = []

        def score(part: steps.PromptPositions, start=start, seen=seen):
            seen += part.tokens.tolist()
            chunk = torch.tensor(logits[[start + int(w) - 3 for w in part.tokens]])
            return sampling.score(chunk, state.tokens[part.slots, part.targets].long(), part.top)

        details = steps.prompt_payloads(inputs, state.parameters.rows, score)
        assert seen == [3 + i for i in range(count) if start + i + 1 < len(prompt)]
        assert set(details) == {1}
        found += details[1].details
        admitted = ()
    reference = [log_softmax(row) for row in logits]
    assert [d.logprob for d in found] == pytest.approx([reference[i][prompt[i + 1]] for i in range(10)], abs=1e-5)
    assert [list(d.top_ids) for d in found] == [np.argsort(-reference[i])[:3].tolist() for i in range(10)]
    assert all(len(d.top_logprobs) == 3 for d in found)


def test_block_tables_and_tokens_follow_the_differences():
    state, inputs = prepared([a_request()])
    blocks = np.array([[0, 0, 0, 5], [0, 0, 1, 9], [0, 3, 2, 7]], np.int32)
    state.apply(StepInputs(inputs.slots, inputs.starts, inputs.counts, inputs.samples, blocks=blocks))
    assert state.tables[0, :2].tolist() == [5, 9]
    assert state.tables[3, 2].item() == 7
    assert state.tokens[0, :3].tolist() == [1, 2, 3]


def test_of_entries_for_the_same_place_in_a_table_the_last_one_counts():
    """A plan may give a slot to one sequence, preempt it, and give the slot to another."""
    rng = np.random.default_rng(7)
    blocks = rng.integers(0, 5, (200, 3)).astype(np.int32)
    entries = np.insert(blocks, 0, 0, axis=1)
    state, inputs = prepared([a_request()])
    state.apply(StepInputs(inputs.slots, inputs.starts, inputs.counts, inputs.samples, blocks=entries))
    expected = {(s, i): b for s, i, b in blocks.tolist()}
    assert {place: int(state.tables[place]) for place in expected} == expected
    kept = steps.last_of_each(blocks)
    assert {(s, i): b for s, i, b in kept.tolist()} == expected
    assert len(kept) == len(expected)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.95}])
def test_ids_that_tie_with_the_last_of_the_likeliest_are_listed_too_unless_log_probabilities_are_raw(params):
    rng, rows = np.random.default_rng(10), 40
    logits = np.round(rng.normal(size=(rows, VOCAB)) * 2).astype(np.float32)
    requests = [a_request(logprobs=i % 5, raw_logprobs=i % 7 == 0, seed=i, **params) for i in range(rows)]
    longer = 0
    for i, detail in enumerate(run(logits, requests).logprobs.details()):
        own, n = requests[i].sampling, i % 5
        scores = logits[i] if i % 7 == 0 else reference_scores(logits[i], [1, 2, 3], [], own, StoppingParams(9))
        best = [int(j) for j in np.argsort(-scores, kind="stable") if scores[j] > -np.inf]
        least = scores[best[min(n, len(best)) - 1]] if n else np.inf
        expected = best[:n] if i % 7 == 0 else [j for j in best if scores[j] >= least][: n + rules.MOST_TIES]
        longer += len(expected) > n
        assert list(detail.top_ids) == expected
        assert detail.top_logprobs == pytest.approx(log_softmax(scores)[expected], abs=1e-4)
    assert longer > 5


@pytest.mark.parametrize("seed", range(8))
def test_penalty_and_filters_are_those_of_transformers_in_the_order_of_tgi(seed):
    from transformers.generation import logits_process as theirs

    rng = np.random.default_rng(seed)
    logits, ids = (rng.normal(size=(1, VOCAB)) * 3).astype(np.float32), [int(i) for i in rng.integers(0, VOCAB, 12)]
    r, t, k, p, typical = (float(rng.uniform(*bounds)) for bounds in ((0.6, 2), (0.4, 2), (20, 60), (0.6, 1), (0.3, 1)))
    expected = torch.tensor(logits)
    for step in (
        theirs.RepetitionPenaltyLogitsProcessor(r),
        theirs.TemperatureLogitsWarper(t),
        theirs.TopKLogitsWarper(int(k)),
        theirs.TopPLogitsWarper(p),
        theirs.TypicalLogitsWarper(typical),
    ):
        expected = step(torch.tensor([ids]), expected)
    params = {"temperature": t, "repetition_penalty": r, "top_k": int(k), "top_p": p, "typical_p": typical}
    [detail] = run(logits, [a_request(ids[:5], logprobs=VOCAB, **params)], [ids[5:]]).logprobs.details()
    probabilities = expected.log_softmax(-1)[0]
    best = [int(i) for i in probabilities.argsort(descending=True) if probabilities[i] > -torch.inf]
    assert list(detail.top_ids) == best
    assert detail.top_logprobs == pytest.approx(probabilities[best].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("params", "tail", "active"),
    [
        ({}, "greedy", []),
        ({"temperature": 0.7}, "plain", []),
        ({"top_k": 3, "top_p": 0.5, "typical_p": 0.5, "min_p": 0.1}, "greedy", []),
        ({"temperature": 0.7, "top_p": 0.9, "min_p": 0.1}, "full", ["min_p", "top_p"]),
        ({"temperature": 0.7, "top_k": 3, "typical_p": 0.9}, "full", ["top_k", "typical_p"]),
        ({"temperature": 0.7, "top_k": 1000}, "full", []),
        ({"repetition_penalty": 1.1}, "full", ["penalties"]),
        ({"frequency_penalty": -0.1, "watermark_gamma": 0.5}, "full", ["watermark", "penalties"]),
        ({"presence_penalty": 0.1, "logit_bias": ((1, 2.0),)}, "full", ["biases", "penalties"]),
    ],
)
def test_a_step_does_the_work_that_a_row_needs_in_the_order_of_the_rules(params, tail, active):
    row = rules.row_of(a_request(**params))
    assert rules.tail_of(row) == tail
    found = rules.active_steps(row, VOCAB)
    assert tuple(found) == rules.STEPS
    assert [name for name, needed in found.items() if needed[0]] == active


def test_the_tail_of_a_step_is_that_of_its_row_with_the_most_work():
    plain, full = a_request(temperature=0.5), a_request(stopping=StoppingParams(9, 2, (7,)))
    rows = [rules.row_of(request) for request in (a_request(), plain, full)]
    assert [rules.tail_of(np.concatenate(rows[:n])) for n in (1, 2, 3)] == ["greedy", "plain", "full"]
    assert rules.tail_of(np.zeros(0, rules.PARAMETERS)) == "greedy"


def test_a_device_gets_the_parameters_that_its_kernels_read_by_their_columns():
    row = rules.row_of(a_request(prompt=(1, 2, 3), temperature=0.5, seed=-1, top_k=9, top_p=0.25, raw_logprobs=True))
    made = rules.device_rows(row)
    assert made.shape == (1, rules.COLUMNS)
    columns = {name: made[0, rules.column(name)] for name in ("top_k", "num_prompt", "raw_logprobs", "seed_high")}
    assert columns == {"top_k": 9, "num_prompt": 3, "raw_logprobs": 1, "seed_high": -1}
    floats = made.view(np.float32)[0, [rules.column("temperature"), rules.column("top_p"), rules.column("repetition")]]
    assert floats.tolist() == [0.5, 0.25, 1.0]
    made[:] = 0
    assert row["top_k"][0] == 9, "it is a copy"
