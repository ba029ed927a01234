"""Models that are an encoder and a decoder: the same text as transformers', whatever the steps, and their prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from support_encoded import SIZES, START, save
from support_jobs import job_of
from test_offline import crowded_engine
from tokenizers import decoders, models, pre_tokenizers, processors

from tokenmill import LLM
from tokenmill.backends.base import StepInputs, StepLimits
from tokenmill.backends.cpu.encoded import EncoderDecoderBackend as CpuEncoderDecoder
from tokenmill.backends.encoded import of_decoder
from tokenmill.backends.kind import BackendOptions
from tokenmill.backends.torch.encoded import EncoderDecoderBackend, buckets_of
from tokenmill.errors import ModelError, StartError, ValidationError
from tokenmill.models.base import config_of, program_of
from tokenmill.parallel.group import Group
from tokenmill.program import encoded
from tokenmill.program.cost import Load, cache_layout, total, weights_of
from tokenmill.quant._unread import unread
from tokenmill.runtime.assembly import EngineOptions, assemble
from tokenmill.runtime.choice import choose
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.text.load import load_tokenizer
from tokenmill.text.options import Options
from tokenmill.text.prepare import prepare
from tokenmill.weights.checkpoint import Checkpoint, open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import SamplingParams, StoppingParams

torch.set_num_threads(1)
def greedy(model: Any, prompt: list[int], count: int, **more: Any) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=None,
        use_cache=False, **more,
    )  # fmt: skip
    return made[0, 1:].tolist()


BACKENDS = ["torch", "cpu"]
MAKERS: dict[str, Any] = {"torch": EncoderDecoderBackend, "cpu": CpuEncoderDecoder}


def engine_of(folder: Path, backend: str = "torch", **options: Any) -> OfflineEngine:
    found = EngineOptions(backend=BackendOptions(backend=backend, device="cpu"), memory_limit=64 << 20, **options)
    return OfflineEngine(assemble(local_source(folder), found, Group(), lambda progress: None))


@pytest.mark.parametrize("backend, family", [
    ("torch", "t5"), ("torch", "flan-t5"), ("cpu", "flan-t5"),
    *(pytest.param("torch", family, marks=pytest.mark.slow) for family in ("mt5", "umt5")),
    *(pytest.param("cpu", family, marks=pytest.mark.slow) for family in ("t5", "mt5", "umt5")),
])  # fmt: skip
def test_chunked_and_preempted_sequences_get_transformers_greedy_text(
    backend: str, family: str, tmp_path: Path
) -> None:
    model = save(tmp_path, family)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 128, rng.integers(1, 30)).tolist() for _ in range(8)]
    prompts[3] = prompts[4]
    counts = [int(n) for n in rng.integers(5, 30, 8)]

    def made(source: Checkpoint, limits: StepLimits) -> Any:
        return MAKERS[backend](job_of(program_of(source.config), source, limits))

    size = 4 if backend == "torch" else 16
    with crowded_engine(
        tmp_path, 88 // size, StepLimits(11, 5, 64, size), made, shares_prefixes=False
    ) as engine:
        ids = [engine.submit([*p, START], None, StoppingParams(n)) for p, n in zip(prompts, counts, strict=True)]
        gone = engine.submit([7, 8, 9, START], None, StoppingParams(30))
        for _ in range(4):
            engine.step()
        engine.abort(gone)
        found = [[t for o in engine.outputs(i) for t in o.token_ids] for i in ids]
        assert engine.stats.preemptions > 0
    assert found == [greedy(model, *both) for both in zip(prompts, counts, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_serves_long_inputs_and_shares_no_prefixes(backend: str, tmp_path: Path) -> None:
    model = save(tmp_path)
    prompt = [3, *range(1, 120), 9]
    with engine_of(tmp_path, backend, max_batch_tokens=16) as engine:
        assert engine.info.max_total_tokens == 1024
        assert not engine.info.shares_prefixes
        assert engine.generate([[*prompt, START]] * 2, None, StoppingParams(6)) == [greedy(model, prompt, 6)] * 2
        assert engine.stats.cached_tokens == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probabilities_are_those_of_transformers_and_penalties_spare_the_input(
    backend: str, tmp_path: Path
) -> None:
    model = save(tmp_path)
    prompt = [5, 6, 7, 8]
    with engine_of(tmp_path, backend) as engine:
        plain, error = greedy(model, prompt, 12), 1e-4 if backend == "torch" else 2e-3  # a cache of float16
        request = engine.submit([*prompt, START], SamplingParams(logprobs=3), StoppingParams(2))
        details = [d for output in engine.outputs(request) for d in output.details]
        ids = torch.tensor([[START, plain[0]]])
        with torch.no_grad():
            expected = model(torch.tensor([prompt]), decoder_input_ids=ids).logits[0].log_softmax(-1)
        for number, found in enumerate(details):
            assert found.logprob == pytest.approx(float(expected[number, plain[number]]), abs=error)
            assert found.top_ids == tuple(expected[number].topk(3).indices.tolist())
        prompt = plain  # an input with the ids of the answer, which would not come again if it counted
        penalized = SamplingParams(repetition_penalty=1.7)
        assert engine.generate([[*prompt, START]], penalized, StoppingParams(12)) == [
            greedy(model, prompt, 12, repetition_penalty=1.7)
        ]


def test_the_step_of_a_decoder_has_neither_inputs_tokens_nor_rows_without_others() -> None:
    def ints(*numbers: int) -> Any:
        return np.array(numbers, np.int32)

    step = StepInputs(ints(4, 1, 7, 2), ints(0, 3, 9, 0), ints(5, 4, 1, 3), ints(1, 2))
    made = of_decoder(step, ints(9, 6, 5, 2))
    assert made.slots.tolist() == [1, 7, 2]
    assert made.starts.tolist() == [6, 9, 2]
    assert made.counts.tolist() == [1, 1, 1]
    assert made.samples.tolist() == [0, 1]


@pytest.mark.parametrize("both_sides", [False, True])
def test_buckets_of_distances_are_those_of_transformers(both_sides: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 301)
    for count, longest in ((32, 128), (16, 20), (8, 64)):
        expected = T5Attention._relative_position_bucket(distance, both_sides, count, longest)
        assert torch.equal(buckets_of(distance, count, longest, both_sides=both_sides), expected)
        found = encoded.buckets_of(distance.numpy(), count, longest, both_sides=both_sides)
        assert found.tolist() == expected.tolist()


def test_other_backends_refuse_it_by_name() -> None:
    program = program_of({"model_type": "t5", **SIZES})
    assert choose(program, BackendOptions(device="cpu"), 16, 1).name == "cpu"
    narrow = program_of({"model_type": "t5", **SIZES, "d_kv": 8})
    choice = choose(narrow, BackendOptions(device="cpu"), 16, 1)
    assert choice.name == "torch"
    assert "for heads of a multiple of 16 columns, not 8" in choice.reason
    assert sorted(cache_layout(program)) == [0, 1]
    with pytest.raises(ModelError, match="relative_attention_num_buckets is 6"):
        config_of({"model_type": "t5", "relative_attention_num_buckets": 6})
    with pytest.raises(ModelError, match="feed_forward_proj"):
        config_of({"model_type": "t5", "feed_forward_proj": "gated-mystery"})


def test_a_decode_step_reads_the_cache_and_no_weight_of_the_encoder() -> None:
    program = program_of({"model_type": "t5", **SIZES})
    found, prompt = total(program, Load.decode(2, 30)), total(program, Load.prefill(60))
    encoder = sum(w.size for w in weights_of(program) if w.name.startswith("encoder.") and w.columns > 3)  # no bias
    stored = sum(op.k.width * SIZES["d_model"] * 2 for op in program.ops if isinstance(op, encoded.StoreInput))
    assert prompt.weights - found.weights >= 2 * (encoder + stored)
    assert found.cache == 2 * 2 * 48 * 2 * (2 * 30 + 2)  # layers, keys and values, columns, bytes, entries


def test_an_old_bias_that_is_not_used_is_no_other_model(tmp_path: Path) -> None:
    save(tmp_path)
    source = open_checkpoint(local_source(tmp_path))
    weights = [w for op in program_of(source.config).ops for some in op.weights().values() for w in some]

    class More:
        config, format, shape = source.config, source.format, source.shape

        def names(self) -> Any:
            return iter([*source.names(), "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"])

    more: Any = More()
    assert unread(weights, more) == []


# From here on: text.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny T5 with a tokenizer like its own: words with a space before them, and </s> behind a text."""
    path: Path = tmp_path_factory.mktemp("t5")
    save(path, "flan-t5", eos_token_id=1)
    words = [f"▁{a}{b}" for a in "abcdefghij" for b in "klmnopqrstuv"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -5.0), *((word, -2.0) for word in words)]
    inner = tokenizers.Tokenizer(models.Unigram(pieces[:128], unk_id=2))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    inner.add_special_tokens(["<pad>", "</s>", "<unk>"])
    inner.save(str(path / "tokenizer.json"))
    named = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(named))
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), backend="torch", device="cpu", memory_limit="64MB")


def test_a_prompt_is_the_encoders_input_and_the_answer_begins_anew(llm: LLM, folder: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = load_tokenizer(local_source(folder))
    ids = tokenizer.encode("ak bl cm")
    assert ids[-1] == 1
    (made,) = llm.generate(["ak bl cm"], max_new_tokens=8, ignore_eos=True)
    assert made.prompt_ids == (*ids, START)
    assert list(made.token_ids) == greedy(model, ids, 8)
    assert made.text == tokenizer.decode(list(made.token_ids))


def test_a_request_counts_the_input_and_shows_the_decoders_first_token(llm: LLM) -> None:
    prepared = prepare("ak bl", Options(prompt_logprobs=0), llm._limits, llm.tokenizer)
    assert (prepared.num_prompt, prepared.prefill_ids, prepared.ids_before) == (3, (START,), ())
    assert prepared.sampling.prompt_logprobs == -1
    cut = prepare("ak bl cm", Options(truncate=2), llm._limits, llm.tokenizer)
    assert (cut.num_prompt, cut.num_truncated, len(cut.prompt_ids)) == (2, 2, 3)
    with pytest.raises(ValidationError, match="an encoder reads it"):
        prepare("ak", Options(prompt_logprobs=0), llm._limits, llm.tokenizer, dialect="openai")


def test_an_answer_without_a_first_token_is_refused_with_the_field(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    config = {"model_type": "t5", "is_encoder_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(StartError, match="decoder_start_token_id"):
        load_tokenizer(local_source(tmp_path))
    (tmp_path / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 5}))
    assert load_tokenizer(local_source(tmp_path)).answer_start == (5,)
