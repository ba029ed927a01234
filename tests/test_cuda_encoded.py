"""Models that are an encoder and a decoder on the CUDA backend: the same text as transformers', whatever the steps."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_cuda import cuda_job, torch
from support_cuda_ranks import on_ranks
from support_encoded import SIZES, START, save
from test_cuda_graphs import graphs  # noqa: F401  # a fixture
from test_cuda_memory import held
from test_encoded import greedy
from test_offline import crowded_engine

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda.encoded import EncoderDecoderBackend, together
from tokenmill.backends.cuda.explain import KernelOptions, kernels_of
from tokenmill.backends.cuda.prepare import attention_of, refusal
from tokenmill.models.base import config_of, program_of
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import SamplingParams, StoppingParams

torch.set_num_threads(1)
SMALL: dict[str, Any] = {"num_layers": 1, "num_decoder_layers": 2, "num_heads": 1, "bias": 5.0}


def backend_of(folder: Path, limits: StepLimits, dtype: str = "float32", **options: Any) -> EncoderDecoderBackend:
    source = open_checkpoint(local_source(folder))
    return EncoderDecoderBackend(
        cuda_job(program_of(source.config), source, limits, dtype, **{"cuda_graphs": ()} | options)
    )


def engine_of(
    folder: Path, num_blocks: int, limits: StepLimits, dtype: str = "float32", scale: float = 1.0, **options: Any
) -> OfflineEngine:
    def make(source: Any, limits: StepLimits) -> EncoderDecoderBackend:
        backend = backend_of(folder, limits, dtype, **options)
        if scale != 1.0:
            backend._attention.scales.update(dict.fromkeys(range(4), (scale, scale)))
        return backend

    return crowded_engine(folder, num_blocks, limits, make, shares_prefixes=False)


@pytest.mark.parametrize("family, dtype, options", [
    ("flan-t5", "float32", {}),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("t5", "float32", {"deterministic": True}), ("umt5", "float32", {}), ("mt5", "float16", {}),
    )),
])  # fmt: skip
def test_chunked_and_preempted_sequences_get_transformers_greedy_text(
    family: str, dtype: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = save(tmp_path, family, **SMALL | {"num_heads": 2})
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 128, n).tolist() for n in (13, 12)]
    with engine_of(tmp_path, 2, StepLimits(9, 2, 32, 16), dtype, **options) as engine:
        ids = [engine.submit([*prompt, START], None, StoppingParams(5)) for prompt in prompts]
        found = [[t for o in engine.outputs(i) for t in o.token_ids] for i in ids]
        assert engine.stats.preemptions > 0
    assert found == [greedy(model, prompt, 5) for prompt in prompts]


@pytest.mark.parametrize("options, error", [
    ({}, 1e-4), ({"kv_cache_dtype": "fp8_e4m3fn", "scale": 0.25}, 0.1),
    pytest.param({"deterministic": True}, 1e-4, marks=pytest.mark.slow),
])  # fmt: skip
def test_log_probabilities_behind_long_inputs_are_those_of_transformers(
    options: dict[str, Any], error: float, tmp_path: Path
) -> None:
    model = save(tmp_path, "t5", **SMALL)
    prompts = [[3, *range(1, 68), 9], [5]]
    with engine_of(tmp_path, 20, StepLimits(80, 2, 80, 16), **options) as engine:
        asked = SamplingParams(logprobs=3)
        requests = [engine.submit([*prompt, START], asked, StoppingParams(2)) for prompt in prompts]
        for prompt, request in zip(prompts, requests, strict=True):
            outputs = list(engine.outputs(request))
            ids = [START, *(t for output in outputs for t in output.token_ids)]
            with torch.no_grad():
                logits = model(torch.tensor([prompt]), decoder_input_ids=torch.tensor([ids[:-1]])).logits[0]
            expected = logits.log_softmax(-1)
            for number, detail in enumerate(d for output in outputs for d in output.details):
                assert detail.logprob == pytest.approx(float(expected[number, ids[number + 1]]), abs=error)


def test_penalties_spare_the_input(tmp_path: Path) -> None:
    model = save(tmp_path, "t5", **SMALL | {"num_decoder_layers": 1})
    rng = np.random.default_rng(0)
    prompts = (rng.integers(1, 128, 30).tolist() for _ in range(99))
    prompt = next(prompt for prompt in prompts if greedy(model, prompt, 1)[0] in prompt)
    with engine_of(tmp_path, 3, StepLimits(31, 1, 48, 16)) as engine:
        made = engine.generate([[*prompt, START]], SamplingParams(repetition_penalty=5.0), StoppingParams(3))
    assert made == [greedy(model, prompt, 3, repetition_penalty=5.0)]


def test_steps_that_only_decode_are_captured_whatever_inputs_they_complete(tmp_path: Path, graphs: Any) -> None:  # noqa: F811
    model = save(tmp_path, "t5", **SMALL)
    made: list[EncoderDecoderBackend] = []

    def make(source: Any, limits: StepLimits) -> EncoderDecoderBackend:
        made.append(backend_of(tmp_path, limits))
        return made[0]

    with crowded_engine(tmp_path, 4, StepLimits(16, 1, 32, 16), make, shares_prefixes=False) as engine:
        backend = made[0]
        backend._graphs = graphs(1)
        for rows, contexts in backend._graphs.missing(backend._graphs.first):
            backend._capture(rows, contexts)
        for prompt in ([5, 6, 7], [8]):
            assert engine.generate([[*prompt, START]], None, StoppingParams(2)) == [greedy(model, prompt, 2)]
        assert sum(graph.replays for graph in backend._graphs._captured.values()) == 4  # type: ignore[attr-defined]


@pytest.mark.slow
def test_two_ranks_get_transformers_greedy_text(tmp_path: Path) -> None:
    model = save(tmp_path, "flan-t5", **SMALL | {"num_heads": 3})  # which two ranks do not divide
    prompts = [[5, 6, 7], [8]]

    def answers(group: Any) -> list[list[int]]:
        with engine_of(tmp_path, 4, StepLimits(8, 2, 32, 16), group=group) as engine:
            return engine.generate([[*prompt, START] for prompt in prompts], None, StoppingParams(3))

    assert on_ranks(2, answers) == [[greedy(model, prompt, 3) for prompt in prompts]] * 2


@pytest.mark.slow
def test_a_warm_up_leaves_nothing_behind(tmp_path: Path) -> None:
    model = save(tmp_path, "t5", **SMALL)
    with engine_of(tmp_path, 4, StepLimits(8, 1, 16, 16)) as engine:
        engine._parts.executor._backend.warm_up()
        assert engine.generate([[5, 6, 7, START]], None, StoppingParams(3)) == [greedy(model, [5, 6, 7], 3)]


@pytest.mark.slow
def test_what_is_counted_as_taken_is_what_is_held(tmp_path: Path) -> None:
    save(tmp_path, "umt5", **SMALL)
    gc.collect()
    before = held()
    backend = backend_of(tmp_path, StepLimits(64, 20, 4096, 16))
    backend.allocate(70)
    new = sum(size for address, size in held().items() if address not in before)
    counted = backend._account.weights + backend._account.step + backend._account.sampler + 71 * backend.block_bytes()
    assert abs(new - counted) < 0.01 * counted, (new, counted)


def test_inputs_are_encoded_together_as_far_as_there_is_room() -> None:
    complete = [(3, 5), (1, 4), (2, 9), (5, 1), (4, 10)]
    assert list(together(complete, 10)) == [[(3, 5), (1, 4)], [(2, 9), (5, 1)], [(4, 10)]]
    assert list(together([], 10)) == []


def test_it_is_served_and_described_and_what_is_not_is_refused_by_name() -> None:
    made = program_of({"model_type": "t5", **SIZES})
    assert refusal(made, "bfloat16") == refusal(made, "float16", True) == ""
    assert "heads of 300" in refusal(program_of({"model_type": "t5", **SIZES, "d_kv": 300}), "bfloat16")
    found = kernels_of(made, KernelOptions(dtype="bfloat16"))
    assert list(found["EncoderAttention"]) == ["attend_spans, heads of 16 with a bias by distance"]
    assert next(iter(found["CrossAttention"])).startswith("single tokens attend_single (split 16 up to 4 rows")
    same = kernels_of(made, KernelOptions(dtype="bfloat16", deterministic=True))
    assert list(same["CrossAttention"]) == ["attend_spans, heads of 16"]


def test_flashinfer_leaves_it_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.backends.cuda.prepare.flashinfer_missing", lambda: "")
    made = program_of({"model_type": "t5", **SIZES})
    assert attention_of(made, "flashinfer", "bfloat16") == (
        "triton", "flashinfer is not used for an encoder and a decoder"
    )  # fmt: skip


@pytest.mark.parametrize("stored, computed", [("float16", "bfloat16"), (None, "bfloat16"), ("float32", "float32")])
def test_numbers_stored_in_float16_are_not_computed_in_it(stored: str | None, computed: str) -> None:
    assert config_of({"model_type": "t5", "torch_dtype": stored}).dtype == computed
