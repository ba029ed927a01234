"""The CUDA backend's sampling against the oracle of support_sampling.py, and against the torch backend's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import prompt_details_of
from support_cuda import DEVICE, ON_GPU, CudaDriver, torch, write_random
from support_cuda_sampling import SLOTS, Bench, random_request, replaced, run, torch_run
from support_sampling import (
    a_request,
    assert_the_rules,
    make_step,
    random_masks,
    reference_choice,
    reference_scores,
    softmax,
)
from support_slow import mostly_slow
from test_cuda import engine_of

from tokenmill.backends.base import Admitted, Masks, StepInputs, StepLimits
from tokenmill.backends.cuda import sampler as sampler_module
from tokenmill.wire.messages import Request, SamplingParams, StoppingParams, TokenDetails

torch.set_num_threads(1)


@pytest.mark.parametrize(("vocab", "batches"), mostly_slow([(61, 5), (997, 2), (5003, 1)], [(997, 2), (5003, 1)]))
def test_a_batch_of_unlike_rows_chooses_what_the_rules_choose_row_by_row(vocab: int, batches: int) -> None:
    rng = np.random.default_rng(vocab)
    for _ in range(batches * (5 if ON_GPU else 1)):
        requests = [random_request(rng, vocab) for _ in range(rng.integers(1, SLOTS))]
        outputs = [[int(i) for i in rng.integers(0, vocab, rng.integers(0, 20))] for _ in requests]
        logits = (rng.normal(size=(len(requests), vocab)) * 4).astype(np.float32)
        slots = rng.permutation(SLOTS)[: len(requests)]
        found = run(logits, requests, outputs, slots, some=bool(rng.random() < 0.5))
        assert_the_rules(logits, requests, outputs, found)


@pytest.mark.parametrize("dtype", mostly_slow(["bfloat16", "float16"], ["float16"]))
def test_logits_of_half_precision_tie_and_ties_are_kept(dtype: str) -> None:
    """With three digits, many of a thousand logits are equal."""
    rng, vocab = np.random.default_rng(3), 997
    for _ in range(20 if ON_GPU else 2):
        requests = [random_request(rng, vocab) for _ in range(6)]
        outputs = [[int(i) for i in rng.integers(0, vocab, rng.integers(0, 20))] for _ in requests]
        exact = torch.tensor(rng.normal(size=(6, vocab)) * 4).to(getattr(torch, dtype))
        requests = [replaced(r, logprobs=-1) for r in requests]
        found = run(exact.float(), requests, outputs, dtype=exact.dtype)
        assert_the_rules(exact.double().numpy(), requests, outputs, found)


@pytest.mark.parametrize(("vocab", "batches"), mostly_slow([(61, 5), (997, 2), (5003, 1)], [(997, 2), (5003, 1)]))
def test_rows_with_masks_choose_what_the_rules_choose(vocab: int, batches: int) -> None:
    rng = np.random.default_rng(vocab + 1)
    for _ in range(batches * (5 if ON_GPU else 1)):
        requests = [random_request(rng, vocab) for _ in range(rng.integers(1, SLOTS))]
        outputs = [[int(i) for i in rng.integers(0, vocab, rng.integers(0, 20))] for _ in requests]
        logits = (rng.normal(size=(len(requests), vocab)) * 4).astype(np.float32)
        masks, allowed = random_masks(rng, len(requests), vocab)
        found = run(logits, requests, outputs, some=bool(rng.random() < 0.5), masks=masks)
        assert_the_rules(logits, requests, outputs, found, allowed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chosen", [False, True])
def test_a_mask_overwrites_what_a_graph_has_chosen(chosen: bool, dtype: str) -> None:
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(6, 61)) * 4).astype(np.float32)
    exact = torch.tensor(logits).to(getattr(torch, dtype))
    requests = [a_request(temperature=float(i % 2), seed=i, logprobs=-1) for i in range(6)]
    masks, allowed = random_masks(rng, 6, 61)
    found = run(exact.float(), requests, dtype=exact.dtype, masks=masks, chosen=chosen)
    assert_the_rules(exact.double().numpy(), requests, [[]] * 6, found, allowed)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5, "typical_p": 0.5}])
def test_a_mask_hides_no_broken_number_and_one_that_allows_nothing_breaks_its_row_alone(params: Any) -> None:
    logits = np.random.default_rng(1).normal(size=(4, 61)).astype(np.float32)
    logits[1, 7] = np.nan
    requests = [a_request(seed=i, logprobs=2, raw_logprobs=i == 3, **params) for i in range(4)]
    bits = np.array([[1 << 5, 0], [1 << 5, 0], [0, 0]], np.uint32)
    ids, details = run(logits, requests, masks=Masks(np.array([1, 2, 3], np.int32), bits))
    assert ids[1:] == [-1, 5, -1]
    assert details[1] is details[3] is None
    assert details[2] == TokenDetails(0.0, (5,), (0.0,))


FILTERS = [
    {"top_k": 1}, {"top_k": 40}, {"top_k": 700}, {"top_k": 10**6}, {"min_p": 0.2}, {"top_p": 1e-9}, {"top_p": 0.6},
    {"top_p": 0.999}, {"typical_p": 0.05}, {"typical_p": 0.7}, {"typical_p": 0.99}, {"top_k": 300, "top_p": 0.8},
    {"top_k": 300, "min_p": 0.01, "top_p": 0.9, "typical_p": 0.6}, {"temperature": 0.1, "top_p": 0.9999999},
    {"temperature": 3.0, "typical_p": 0.4, "top_p": 0.95}, {"typical_p": 0.97, "top_p": 0.5}, {},
    {"temperature": 0.0, "top_p": 0.2},
]  # fmt: skip


@pytest.mark.parametrize(
    "spread, dtype", mostly_slow([(0.05, "bfloat16"), (1.0, "float32"), (6.0, "bfloat16")], [(6.0, "bfloat16")])
)
def test_filters_of_flat_and_steep_rows_keep_what_a_sort_says(
    spread: float, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows have several tiles. Ids at the edge may differ by rounding: those of one logit, or of probability zero."""
    vocab = 20011 if ON_GPU else 701
    if not ON_GPU:
        for name, value in {"GROUPS": 60, "GROUP_LOGITS": (8, 32), "TILE_LOGITS": 256}.items():
            monkeypatch.setattr(sampler_module, name, value)
    requests = [a_request(seed=i, **({"temperature": 0.8} | params)) for i, params in enumerate(FILTERS)]
    rng = np.random.default_rng(int(spread * 100))
    exact = torch.tensor(rng.normal(size=(len(requests), vocab)) * spread).to(getattr(torch, dtype))
    bench = Bench(exact.float(), slots=len(requests), dtype=exact.dtype)
    ids, _ = bench.run(make_step(requests))
    logits, kept = exact.double().numpy(), bench.sampler._kept.cpu().numpy()
    keys = exact.float().add(0.0).numpy().view(np.int32)
    keys ^= (keys >> 31) & 0x7FFFFFFF
    for i, request in enumerate(requests):
        scores = reference_scores(logits[i], [1, 2, 3], [], request.sampling, request.stopping)
        assert ids[i] == reference_choice(scores, request.sampling, 3), request.sampling
        if request.sampling.temperature > 0:
            left = (keys[i] >= kept[i, 0]) & (keys[i] <= kept[i, 1])
            edge = np.flatnonzero(left ^ np.isfinite(scores))
            mass = softmax(logits[i] / request.sampling.temperature)[edge].sum()
            assert mass < 1e-6 or len({float(logits[i, j]) for j in edge}) == 1, (request.sampling, len(edge), mass)
            assert left.any()


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5, "typical_p": 0.5},
                                    {"temperature": 1.0, "top_k": 3, "repetition_penalty": 1.5, "logprobs": -1},
                                    {"frequency_penalty": 0.5, "logit_bias": ((17, 3.0), (17, -9.0))}])  # fmt: skip
@pytest.mark.parametrize("poison", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_a_row_that_is_not_finite_gives_minus_one_and_harms_no_other(params: Any, poison: float) -> None:
    logits = np.random.default_rng(4).normal(size=(3, 61)).astype(np.float32)
    requests = [a_request(seed=i, **({"logprobs": 2} | params)) for i in range(3)]
    clean, details = run(logits, requests)
    logits[1, 17] = poison
    ids, told = run(logits, requests)
    assert ids == [clean[0], -1, clean[2]]
    assert told == [details[0], None, details[2]]


def test_of_the_likeliest_that_tie_the_first_is_taken_and_zeros_of_both_signs_tie() -> None:
    logits = np.full((2, 61), -1.0, np.float32)
    logits[:, [3, 40]], logits[1, 40] = 0.0, -0.0
    assert run(logits, [a_request(), a_request(top_p=0.5)])[0] == [3, 3]
    drawn = run(logits[np.arange(12) % 2], [a_request(temperature=1.0, top_k=1, seed=s) for s in range(12)])[0]
    assert set(drawn[::2]) == set(drawn[1::2]) == {3, 40}


def test_rows_that_are_read_in_several_rounds_are_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocab = 12, 997
    monkeypatch.setattr(sampler_module, "MOST_LOGITS", 64)
    monkeypatch.setattr(sampler_module, "ROUND_LOGITS", 32)
    logits = np.random.default_rng(13).normal(size=(rows, vocab)).astype(np.float32)
    requests = [a_request(temperature=i % 3, seed=i, logit_bias=((0, 0.0),)) for i in range(rows)]
    assert_the_rules(logits, requests, [[]] * rows, run(logits, requests))


def test_long_sequences_are_counted_by_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, vocab, length = np.random.default_rng(8), 331, 9000 if ON_GPU else 1500
    monkeypatch.setattr(sampler_module, "TOKENS", 64)
    monkeypatch.setattr(sampler_module, "MOST_COUNTING", 21)
    requests, outputs = [], []
    for i in range(6):
        cut = int(rng.integers(1, length if i % 2 else 40))
        ids = (vocab * rng.random(length if i % 2 else 60) ** 3).astype(int)
        penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.01 * i, "presence_penalty": -0.2 * i}
        requests.append(a_request(ids[:cut], **penalties))
        outputs.append([int(t) for t in ids[cut:]])
    requests[4] = a_request(requests[4].prompt_ids)  # nothing to count
    logits = (rng.normal(size=(6, vocab)) * 4).astype(np.float32)
    bench = Bench(logits, max_total=length + 1)
    ids, _ = bench.run(make_step(requests, outputs))
    for i, r in enumerate(requests):
        scores = reference_scores(logits[i], list(r.prompt_ids), outputs[i], r.sampling, r.stopping)
        np.testing.assert_allclose(bench.sampler._scores[i].cpu().numpy(), scores, rtol=1e-5, atol=1e-5)
        assert ids[i] == scores.argmax()


def test_biases_add_up_grow_and_end_and_a_slot_taken_over_keeps_none() -> None:
    vocab, rng = 61, np.random.default_rng(11)
    bench = Bench(np.zeros((2, vocab), np.float32))
    room = bench.slots.biases.shape[1]
    twice = a_request(logit_bias=((5, 2.0), (9, 3.0), (5, 1.5)))
    assert bench.run(make_step([twice]))[0] == [5]
    many = a_request(logit_bias=tuple((i, float(v)) for i, v in enumerate(rng.normal(size=vocab))))
    assert len(many.sampling.logit_bias) > room
    both = make_step([twice, many])
    likeliest = int(np.argmax([v for _, v in many.sampling.logit_bias]))
    assert bench.run(replace(both, admitted=both.admitted[1:]))[0] == [5, likeliest]
    assert bench.run(make_step([many]))[0] == [likeliest]
    banned = a_request(logit_bias=((7, 50.0), (7, 1.0), (8, 20.0)), stopping=StoppingParams(10, 3, (7, 7)))
    assert [bench.run(make_step([banned], [[1] * n]))[0] for n in range(5)] == [[8], [8], [8], [7], [7]]
    assert bench.run(make_step([a_request(frequency_penalty=0.1)]))[0] == [0]


def test_each_watermarked_row_favours_its_own_ids() -> None:
    rng, rows = np.random.default_rng(14), 5
    logits = rng.normal(size=(rows, 61)).astype(np.float32)
    requests = [a_request((1, 2 * i), watermark_gamma=(0.0, 0.25, 0.5, 0.9, 1.0)[i], watermark_delta=1.5 - i, seed=i,
                          temperature=i % 2, repetition_penalty=1.2) for i in range(rows)]  # fmt: skip
    outputs: list[list[int]] = [[], [7], [9, 3], [], [60]]
    assert_the_rules(logits, requests, outputs, run(logits, requests, outputs))


def test_ids_beyond_the_vocabulary_change_nothing() -> None:
    logits = np.random.default_rng(2).normal(size=(2, 61)).astype(np.float32)
    requests = [a_request((1, 60, 61, 10**6), repetition_penalty=3.0), a_request(logit_bias=((61, 99.0), (60, 0.0)))]
    inside = [a_request((1, 60, 60, 60), repetition_penalty=3.0), a_request()]
    assert run(logits, requests)[0] == run(logits, inside)[0]


@pytest.mark.parametrize("asking", [range(21), (3, 14)] if ON_GPU else [(3, 14)])
@pytest.mark.parametrize(
    "params",
    [
        {}, {"temperature": 0.7}, pytest.param({"temperature": 0.7, "top_p": 0.95}, marks=pytest.mark.slow),
        {"presence_penalty": 0.5, "min_p": 0.1},
    ],
)  # fmt: skip
def test_log_probabilities_are_the_torch_backends_ties_with_the_last_one_too(params: Any, asking: Any) -> None:
    """All rows request them, or few, whose scores are copied."""
    rng, rows = np.random.default_rng(10), 21
    logits = (np.round(rng.normal(size=(rows, 61)) * 2)).astype(np.float32)
    logits += np.arange(61, dtype=np.float32) * 1e-3 * (np.arange(rows) % 7 == 0)[:, None]  # rows whose ties are cut
    requests = [
        a_request(logprobs=i % 5 if i in asking else -1, raw_logprobs=i % 7 == 0, seed=i, **params) for i in range(rows)
    ]
    ids, details = run(logits, requests)
    expected_ids, expected = torch_run(logits, requests)
    assert ids == expected_ids
    assert [d is None for d in details] == [d is None for d in expected]
    pairs = [(d, e) for d, e in zip(details, expected, strict=True) if e is not None]
    assert [d.top_ids for d, _ in pairs] == [e.top_ids for _, e in pairs]
    assert any(len(d.top_ids) > r.sampling.logprobs for d, r in zip(details, requests, strict=True) if d)
    for d, e in pairs:
        assert (d.logprob, *d.top_logprobs) == pytest.approx((e.logprob, *e.top_logprobs), abs=1e-4)


def test_a_seed_gives_the_same_tokens_in_any_company_and_any_slot() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 61)).astype(np.float32)
    requests = [a_request(temperature=1.0, seed=i, top_p=(1.0, 0.9)[i % 2], typical_p=(0.8, 1.0)[i % 3 > 0])
                for i in range(8)]  # fmt: skip
    together = run(logits, requests, slots=rng.permutation(8))[0]
    assert together == [run(logits[i : i + 1], [requests[i]], slots=[3])[0][0] for i in range(8)]


def test_with_batch_invariant_rows_a_penalty_beside_them_changes_no_sum() -> None:
    logits = torch.tensor(np.random.default_rng(6).normal(size=(3, 997)) * 3).bfloat16().float()
    filtered = [a_request(temperature=1.0, top_p=0.8, seed=1), a_request(temperature=0.7, typical_p=0.6, top_k=90)]
    alone, beside = (Bench(logits, dtype=torch.bfloat16, batch_invariant=True) for _ in range(2))
    ids, _ = alone.run(make_step(filtered))
    assert beside.run(make_step([*filtered, a_request(presence_penalty=1.0)]))[0][:2] == ids
    assert alone.sampler._kept[:2].tolist() == beside.sampler._kept[:2].tolist()


@pytest.mark.parametrize("tail", ["greedy", "plain"])
def test_a_graph_may_choose_what_a_step_then_only_fetches_or_chooses_anew(tail: Any) -> None:
    rng = np.random.default_rng(12)
    logits = rng.normal(size=(4, 61)).astype(np.float32)
    warmth = [0.0, 0.9, 0.0, 1.7] if tail == "plain" else [0.0] * 4
    requests = [a_request(temperature=t, seed=i) for i, t in enumerate(warmth)]
    expected = run(logits, requests)[0]
    bench = Bench(logits)
    inputs = replace(make_step(requests), tail=tail)
    bench.slots.apply(inputs)
    sizes = bench.sizes(inputs)
    padded = torch.cat([sizes.pairs, torch.tensor([bench.slots.padding, 0] * 2, device=DEVICE, dtype=torch.int32)])
    bench = Bench(np.concatenate([logits, rng.normal(size=(2, 61))]).astype(np.float32))
    bench.slots.apply(inputs)
    bench.sampler.launch(replace(sizes, tokens=6, sampling=6, pairs=padded.contiguous()))
    bench.logits.fill_(float("nan"))  # NaN: they must not be read again
    fetched, _ = bench.sampler.sample(inputs, sizes, chosen=True)
    bench.device.finish()
    assert fetched.tolist() == expected
    bench.assert_clean(inputs, expected)
    bench.logits[:4] = torch.tensor(logits)
    assert bench.run(replace(inputs, logprobs=0), chosen=True)[0] == expected
    full = [a_request(temperature=t, seed=i, logit_bias=((60, 99.0),)) for i, t in enumerate(warmth)]
    assert bench.run(make_step(full), chosen=True)[0] == [60] * 4


def test_a_step_takes_no_more_memory_than_it_says() -> None:
    """Add up all its allocations; beside the logits it holds scores and counts."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Made(TorchDispatchMode):
        nbytes, known = 0, set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
                if storage is not None and storage.data_ptr() not in self.known:
                    self.known.add(storage.data_ptr())
                    self.nbytes += storage.nbytes()
            return out

    rng, rows, vocab = np.random.default_rng(1), 16, 9001
    logits = rng.normal(size=(rows, vocab)).astype(np.float32)
    requests = [a_request(temperature=float(i == 0), top_p=0.9, presence_penalty=1.0, logprobs=3 if i % 9 == 0 else -1)
                for i in range(rows)]  # fmt: skip
    bench = Bench(logits, slots=rows)
    assert bench.sampler.nbytes > 2 * logits.nbytes
    inputs = make_step(requests)
    bench.slots.apply(inputs)
    sizes, made = bench.sizes(inputs), Made()
    made.known = {x.untyped_storage().data_ptr() for held in (bench.sampler, bench.slots) for x in vars(held).values()
                  if isinstance(x, torch.Tensor)}  # fmt: skip
    with made:
        bench.sampler.sample(inputs, sizes)
    assert 0 < made.nbytes <= bench.sampler.step_bytes < logits.nbytes


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_the_host_waits_for_nothing_but_a_watermark() -> None:
    rng, rows, vocab = np.random.default_rng(1), 64, 32000
    logits = rng.normal(size=(rows, vocab)).astype(np.float32)
    everything = {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.2,
                  "frequency_penalty": 0.1, "logit_bias": ((3, 1.0),), "temperature": 0.9}  # fmt: skip
    requests = [a_request(seed=i, logprobs=(-1, 3)[i % 9 == 0], **everything) for i in range(rows)]
    bench = Bench(logits, slots=rows)
    inputs = make_step(requests)
    bench.run(inputs)
    sizes = bench.sizes(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        bench.slots.apply(inputs)
        bench.sampler.sample(inputs, sizes)
        marked = make_step([a_request(watermark_gamma=0.5, watermark_delta=1.0)])
        bench.slots.apply(marked)
        with pytest.raises(RuntimeError, match="synchroniz"):
            bench.sampler.sample(marked, sizes)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_through_the_backend_answers_and_log_probabilities_are_the_torch_backends(tmp_path: Path) -> None:
    """Many different requests, chunked and preempted, each with all options of a request."""
    vocab, size = 128, 12 if ON_GPU else 4
    write_random(tmp_path, "llama", num_hidden_layers=1)
    rng, told = np.random.default_rng(21), []
    requests = [random_request(rng, vocab) for _ in range(size)]
    requests[0] = replaced(requests[0], logprobs=2, raw_logprobs=False, prompt_logprobs=1, repetition_penalty=1.4)
    requests[1] = replaced(requests[1], watermark_gamma=0.5, temperature=1.0)
    for kind in ("cuda", "torch"):
        with engine_of(tmp_path, kind, 20 if ON_GPU else 9, StepLimits(13, 4, 64, 4)) as engine:
            stopping = [StoppingParams(10 if ON_GPU else 6, 3, r.stopping.stop_ids) for r in requests]
            ids = [engine.submit(list(r.prompt_ids), r.sampling, s) for r, s in zip(requests, stopping, strict=True)]
            outputs = [list(engine.outputs(i)) for i in ids]
            assert engine.stats.preemptions > 0
        details = [prompt_details_of(row) + [d for o in row for d in o.details] for row in outputs]
        told.append(list(zip([[t for o in row for t in o.token_ids] for row in outputs], details, strict=True)))
    for (ids, details), (expected_ids, expected) in zip(*told, strict=True):
        assert ids == expected_ids
        assert [d.top_ids for d in details] == [d.top_ids for d in expected]
        for d, e in zip(details, expected, strict=True):
            assert (d.logprob, *d.top_logprobs) == pytest.approx((e.logprob, *e.top_logprobs), abs=1e-3)
    assert sum(len(details) for _, details in told[0]) > 10


def test_tokens_of_plain_steps_of_the_backend_are_those_of_the_rules(tmp_path: Path) -> None:
    write_random(tmp_path, "llama", num_hidden_layers=1, vocab_size=997)
    driver = CudaDriver(tmp_path)
    params = [SamplingParams(temperature=t, seed=s) for t, s in ((1.0, 1), (0.0, 2), (0.3, 2**63 + 5), (1.7, 4))]
    known = [[1, 2, 3, slot] for slot in range(4)]
    requests = [Request(i, tuple(known[i]), p, StoppingParams(9)) for i, p in enumerate(params)]
    admitted = tuple(Admitted(i, r, np.array(r.prompt_ids, np.int32)) for i, r in enumerate(requests))
    rows, blocks = np.arange(4, dtype=np.int32), np.array([(0, i, 0, i) for i in range(4)], np.int32)
    first = StepInputs(rows, rows * 0, rows * 0 + 4, rows, admitted, blocks, tail="plain")
    for step in range(3):
        inputs = first if step == 0 else StepInputs(rows, rows * 0 + 3 + step, rows * 0 + 1, rows, tail="plain")
        tokens = driver.run(inputs).result().token_ids
        logits = driver.logits[:4].float().cpu().numpy()
        for i, r in enumerate(requests):
            scores = reference_scores(logits[i], r.prompt_ids, known[i][4:], r.sampling, r.stopping)
            assert tokens[i] == reference_choice(scores, r.sampling, 4 + step)
            known[i].append(tokens[i])
