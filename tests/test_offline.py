"""Tiny models through the whole engine: the same greedy text as transformers', and `LLM` from text to text."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
from support_jobs import job_of
from support_models import make_checkpoint
from support_slow import mostly_slow
from tokenizers import decoders, models, pre_tokenizers

import tokenmill
from tokenmill import LLM
from tokenmill.backends.base import StepLimits
from tokenmill.backends.cpu import isa
from tokenmill.backends.sampling import green_ids
from tokenmill.backends.torch.backend import TorchBackend
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.scheduler import Scheduler, SchedulerLimits
from tokenmill.errors import (
    ArgumentError,
    BatchError,
    ContextLengthError,
    GrammarError,
    ModelError,
    NotEnoughMemory,
    TemplateError,
    Unsupported,
    ValidationError,
)
from tokenmill.models.base import program_of
from tokenmill.parallel.group import Group
from tokenmill.runtime.assembly import Assembled, EngineOptions, assemble
from tokenmill.runtime.executor import Executor
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.text.options import Options
from tokenmill.weights.checkpoint import Checkpoint, open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import EngineInfo, GrammarSpec, SamplingParams, StoppingParams

torch.set_num_threads(1)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def torch_backend(source: Checkpoint, limits: StepLimits) -> TorchBackend:
    return TorchBackend(job_of(program_of(source.config), source, limits))


def crowded_engine(
    folder: Path, num_blocks: int, limits: StepLimits, make=torch_backend, shares_prefixes: bool = True
) -> OfflineEngine:
    """Return an engine whose cache is far too small for its slots. `num_blocks`: more for a model with windows."""
    backend = make(open_checkpoint(local_source(folder)), limits)
    sizes = limits.max_batch_tokens, limits.max_batch_size, limits.max_total_tokens, limits.block_size
    scheduler_limits = SchedulerLimits(*sizes, windows=backend.windows, shares_prefixes=shares_prefixes)
    num_blocks += scheduler_limits.tables.blocks_of(limits.max_total_tokens) - SchedulerLimits(*sizes).tables.blocks_of(
        limits.max_total_tokens
    )
    backend.allocate(num_blocks)
    scheduler = Scheduler(BlockPool(num_blocks, limits.block_size), scheduler_limits)
    info = EngineInfo("tiny", "float32", "cpu", "torch", num_blocks, limits.block_size, 128, 63, 64, 1, 1)
    parts = Assembled(scheduler, Executor(backend, limits.max_batch_size), info)
    parts._resources.callback(backend.close)
    return OfflineEngine(parts)


@pytest.mark.parametrize(
    "family",
    mostly_slow(
        ["llama", "mistral_window", "qwen3_yarn_tied", "gpt2", "bloom", "gptj", "qwen2_window", "gemma3_text"],
        ["llama", "bloom", "gemma3_text"],
    ),
)
def test_chunked_shared_and_preempted_sequences_get_transformers_greedy_text(family, tmp_path):
    model = make_checkpoint(tmp_path, family)
    rng = np.random.default_rng(1)
    head = rng.integers(0, 128, 21).tolist()
    prompts = [head[: rng.integers(0, 22)] + rng.integers(0, 128, rng.integers(1, 9)).tolist() for _ in range(10)]
    counts = [int(n) for n in rng.integers(5, 30, 10)]
    with crowded_engine(tmp_path, 22, StepLimits(11, 5, 64, 4)) as engine:
        ids = [engine.submit(p, None, StoppingParams(n)) for p, n in zip(prompts, counts, strict=True)]
        found = [[t for o in engine.outputs(i) for t in o.token_ids] for i in ids]
        assert engine.stats.preemptions > 0 or family == "mistral_window"  # is admitted with all that it ever needs
        assert engine.stats.cached_tokens > 0
    for prompt, count, tokens in zip(prompts, counts, found, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert tokens == expected


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd_that_is_preempted(tmp_path):
    make_checkpoint(tmp_path, "llama")
    params = [SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=s) for s in range(8)]
    with crowded_engine(tmp_path, 64, StepLimits(64, 8, 64, 4)) as engine:
        alone = [engine.generate([[5, 6, s]], p, StoppingParams(20))[0] for s, p in enumerate(params)]
    with crowded_engine(tmp_path, 18, StepLimits(7, 8, 64, 4)) as engine:
        ids = [engine.submit([5, 6, s], p, StoppingParams(20)) for s, p in enumerate(params)]
        assert [[t for o in engine.outputs(i) for t in o.token_ids] for i in ids] == alone
        assert engine.stats.preemptions > 0


# From here on: text.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write a tiny Llama with a byte-level tokenizer; id 256 ends an answer."""
    path: Path = tmp_path_factory.mktemp("tiny")
    make_checkpoint(path, "llama", vocab_size=260, eos_token_id=256, bos_token_id=257)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<begin>"])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": "<end>", "bos_token": "<begin>", "model_max_length": 200, "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(str(folder), cpu_threads=1, block_size=4) as model:
        yield model


def test_generate_answers_strings_and_token_ids_in_the_order_of_the_prompts(llm):
    texts = ["Hello", "World wide", "a"]
    answers = llm.generate(texts, max_new_tokens=8, ignore_eos=True)
    ids = [llm.tokenizer.encode(text) for text in texts]
    again = llm.generate(ids, max_new_tokens=8, ignore_eos=True)
    assert [a.token_ids for a in answers] == [a.token_ids for a in again]
    assert [list(a.prompt_ids) for a in answers] == ids
    assert [a.text for a in answers] == [llm.tokenizer.decode(a.token_ids) for a in answers]
    assert {a.finish_reason for a in answers} == {"length"}
    [single] = llm.generate(texts[1], max_new_tokens=8, ignore_eos=True)
    assert single.token_ids == answers[1].token_ids
    [of_ids] = llm.generate(ids[1], max_new_tokens=8, ignore_eos=True)
    assert of_ids.token_ids == answers[1].token_ids


def test_streamed_pieces_join_to_the_text(llm):
    options = Options(max_new_tokens=20, temperature=0.9, seed=3, ignore_eos=True)
    pieces = list(llm.stream("Once", options))
    assert len(pieces) > 3
    assert "".join(pieces) == llm.generate("Once", options)[0].text


def test_closing_a_stream_frees_what_it_held(llm):
    stream = llm.stream("Once", max_new_tokens=50, temperature=1.0, seed=1, ignore_eos=True)
    next(stream)
    stream.close()
    assert llm._engine.step()  # processes the abort, and the launched step
    assert not llm._engine.step()
    assert llm.stats.blocks_used == llm.stats.running == 0


def test_a_stop_string_ends_the_answer_before_it(llm):
    [whole] = llm.generate("Tell", max_new_tokens=40, temperature=1.0, seed=5, ignore_eos=True)
    stop = whole.text[10:13]
    [cut] = llm.generate("Tell", max_new_tokens=40, temperature=1.0, seed=5, ignore_eos=True, stop=stop)
    assert cut.finish_reason == "stop_sequence"
    assert cut.stop == stop
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_an_end_of_sequence_token_ends_the_answer_and_is_not_in_its_text(llm):
    [answer] = llm.generate("x", max_new_tokens=9, logit_bias={256: 100.0})
    assert (answer.token_ids, answer.text, answer.finish_reason) == ((256,), "", "stop")
    [later] = llm.generate("x", max_new_tokens=9, min_new_tokens=4, logit_bias={256: 100.0})
    assert len(later.token_ids) == 5
    assert later.finish_reason == "stop"


def test_chat_renders_the_models_template(llm):
    messages = [{"role": "user", "content": "Hi"}]
    assert llm.render(messages) == "user: Hi\na:"
    [answer] = llm.chat(messages, max_new_tokens=6)
    assert list(answer.prompt_ids) == llm.tokenizer.encode("user: Hi\na:", add_special_tokens=False)
    assert "".join(llm.stream_chat(messages, max_new_tokens=6)) == answer.text
    both = llm.chat([messages, [{"role": "user", "content": "Ho"}]], max_new_tokens=6)
    assert both[0].text == answer.text


def test_a_chat_is_planned_as_the_servers_are(llm):
    """Its fields are checked, and the model's template defines the reasoning."""
    message = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValidationError, match="`thinking_budget` is not supported") as caught:
        llm.chat(message, thinking_budget=3)
    assert caught.value.param == "thinking_budget"
    with pytest.raises(ValidationError, match="messages"):
        llm.stream_chat([{"role": "nobody", "content": "Hi"}])


THINKING_TEMPLATE = TEMPLATE.replace("a:", "a:<think>") + "{# a thought ends with </think> #}"
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def thinking_folder(folder, tmp_path_factory) -> Path:
    """Write the same model with a template that begins the reasoning; its marks are special tokens."""
    path: Path = tmp_path_factory.mktemp("thinking")
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(["<think>", "</think>"])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": THINKING_TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def thinker(thinking_folder):
    with LLM(str(thinking_folder), cpu_threads=1, block_size=4) as model:
        yield model


@pytest.mark.parametrize(("stop", "least", "reason", "content"), [
    ((), None, "length", "XXXXX"),
    (("XX",), None, "stop_sequence", ""),
    (("XX",), 2, "stop_sequence", "X"),
    (("XX",), 4, "stop_sequence", "XXX"),
    (("XXXXXX",), None, "length", "XXXXX"),
    (("</think>",), None, "length", "XXXXX"),
])  # fmt: skip
def test_stop_strings_and_least_tokens_of_a_chat_are_about_what_is_behind_the_thought(
    thinker, stop, least, reason, content
):
    """Four tokens of reasoning, four that end it, and five of the answer. All that are not forced are X."""
    bias = {thinker.tokenizer.encode("X", False)[0]: 100.0}
    options = Options(max_new_tokens=13, thinking_budget=4, logit_bias=bias, stop=stop, min_new_tokens=least)
    [answer] = thinker.chat(MESSAGES, options)
    assert (answer.reasoning, answer.content, answer.finish_reason) == ("XXXX", content, reason)
    assert answer.text == "XXXX\n\n\n" + content  # marks are special tokens, which are not shown in text
    assert answer.stop == (stop[0] if reason == "stop_sequence" else None)
    pieces = list(thinker.stream_chat(MESSAGES, options))
    assert "".join(pieces) == answer.text
    assert pieces[:4] == ["X"] * 4  # reasoning is not held back for a stop string


def test_a_grammar_of_a_chat_holds_behind_the_thought(thinker):
    [answer] = thinker.chat(
        MESSAGES, max_new_tokens=20, thinking_budget=3, grammar={"type": "regex", "value": "yes|no"}
    )
    assert answer.content in ("yes", "no")
    thought = answer.token_ids[: answer.token_ids.index(thinker.tokenizer.token_id("</think>"))]
    assert answer.reasoning == thinker.tokenizer.decode(thought).strip()
    assert answer.finish_reason == "stop"


def test_without_a_reasoning_parser_a_thought_is_content(thinking_folder):
    with LLM(str(thinking_folder), cpu_threads=1, reasoning_parser="none") as model:
        bias = {model.tokenizer.encode("X", False)[0]: 100.0}
        [answer] = model.chat(MESSAGES, max_new_tokens=9, logit_bias=bias, stop="XXX")
        assert (answer.reasoning, answer.content, answer.text) == ("", "", "")
    with pytest.raises(Unsupported, match="reasoning parser"):
        LLM(str(thinking_folder), reasoning_parser="thinky")


def test_a_completion_without_a_thought_is_all_content(llm):
    [answer] = llm.generate("Hello", max_new_tokens=4, ignore_eos=True)
    assert (answer.reasoning, answer.content) == ("", answer.text)


def test_without_a_chat_template_chat_says_what_to_use(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with LLM(str(tmp_path), cpu_threads=1) as model, pytest.raises(TemplateError, match="no chat template"):
        model.chat([{"role": "user", "content": "Hi"}])


def test_logprobs_of_answer_and_prompt_come_as_asked(llm):
    [answer] = llm.generate("Hello", max_new_tokens=3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    assert [len(d.top_ids) for d in answer.logprobs] == [2, 2, 2]
    assert all(d.logprob == d.top_logprobs[0] for d in answer.logprobs)  # greedy: the likeliest
    assert len(answer.prompt_logprobs) == len(answer.prompt_ids) - 1
    [plain] = llm.generate("Hello", max_new_tokens=3, ignore_eos=True)
    assert plain.logprobs == plain.prompt_logprobs == ()


def test_a_watermark_is_made_with_the_servers_options(folder, llm):
    plain, marked = (
        llm.generate("Hello", max_new_tokens=40, ignore_eos=True, watermark=watermark)[0] for watermark in (False, True)
    )
    assert plain.token_ids != marked.token_ids
    with LLM(str(folder), cpu_threads=1, watermark_gamma=0.1, watermark_delta=50.0) as model:
        [answer] = model.generate("Hello", max_new_tokens=40, ignore_eos=True, watermark=True)
        ids = [answer.prompt_ids[-1], *answer.token_ids]
        assert all(new in green_ids(before, 0.1, 260) for before, new in itertools.pairwise(ids))


def test_timings_come_with_every_token_if_they_are_wanted(folder):
    parts = assemble(local_source(folder), EngineOptions(max_total_tokens=100), Group(), lambda _: None)
    with OfflineEngine(parts) as engine:
        quiet, asking = engine.submit([1, 2], None, StoppingParams(5)), engine.submit([3], None, wants_timings=True)
        told = [output.timings for output in engine.outputs(asking) if output.token_ids]
        assert len(told) == 16
        assert all(t and t.largest_batch == 2 and t.prefill_s > 0 for t in told)
        assert not any(output.timings for output in engine.outputs(quiet))


def test_a_second_prompt_finds_its_beginning_in_the_cache(llm):
    text = "The same long beginning of two prompts, "
    llm.generate(text + "one", max_new_tokens=1)
    [second] = llm.generate(text + "two", max_new_tokens=1)
    assert second.num_cached >= len(text) // 4 * 4


def test_the_drawn_seed_repeats_the_answer(llm):
    [drawn] = llm.generate("Hi", max_new_tokens=12, temperature=1.5, ignore_eos=True)
    [again] = llm.generate("Hi", max_new_tokens=12, temperature=1.5, ignore_eos=True, seed=drawn.seed)
    assert again.token_ids == drawn.token_ids


def test_the_tokenizers_own_limit_bounds_a_sequence(llm):
    assert llm.info.max_total_tokens == 200  # config.json says 256
    with pytest.raises(ContextLengthError):
        llm.generate("x" * 300)


@pytest.mark.parametrize("params", [{"temprature": 1.0}, {"temperature": "hot"}, {"top_p": 2.0}, {"max_new_tokens": 0}])
def test_an_option_of_a_generation_that_cannot_be_is_refused(llm, params):
    with pytest.raises(ValidationError):
        llm.generate("x", **params)


@pytest.mark.parametrize(
    "options,error,text",
    [
        ({"max_totl_tokens": 9}, ArgumentError, "max_totl_tokens"),
        ({"num_shard": 2}, ArgumentError, "tokenmill serve"),
        ({"max_total_tokens": "many"}, ArgumentError, "max_total_tokens"),
        ({"max_total_tokens": 100, "max_input_tokens": 100}, ArgumentError, "max_input_tokens"),
        ({"memory_limit": "1kB"}, NotEnoughMemory, r"weights need 563.8 KiB, but 1000 B"),
        ({"memory_limit": "3MB", "max_total_tokens": 200_000}, NotEnoughMemory, "sequence of 200000 tokens"),
        ({"device": "cuda"}, Unsupported, "cuda"),
    ],
)  # fmt: skip
def test_an_option_of_the_model_that_cannot_be_is_refused_with_its_name(folder, options, error, text):
    with pytest.raises(error, match=text):
        LLM(str(folder), **options)


BAD_GRAMMARS = [
    {"type": "regex", "value": "(a"}, {"type": "json", "value": {"not": {"const": 1}}},
    {"type": "json", "value": {"type": "integer", "multipleOf": 999983}}, GrammarSpec("grammar", "root ::= nothing"),
]  # fmt: skip


@pytest.mark.parametrize("grammar", BAD_GRAMMARS)
def test_a_grammar_that_is_none_is_refused_before_anything_runs(llm, grammar):
    prompts = ["x" * 150, "y", "z" * 190]  # of several steps, and longer than a batch
    before = llm.stats.steps
    message = [{"role": "user", "content": "Hi"}]
    for ask in (
        lambda: llm.generate(prompts, grammar=grammar), lambda: llm.stream("x", grammar=grammar),
        lambda: llm.chat(message, grammar=grammar), lambda: llm.stream_chat(message, grammar=grammar),
    ):  # fmt: skip
        with pytest.raises(GrammarError) as caught:
            ask()
        assert caught.value.param == "grammar"
    assert llm.stats.steps == before
    assert llm.generate("x", max_new_tokens=2, ignore_eos=True)[0].finish_reason == "length"


def test_a_prompt_that_fails_takes_no_other_with_it(folder, tmp_path, llm):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    weights["model.embed_tokens.weight"][llm.tokenizer.encode("Z", False)] = np.nan
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    with LLM(str(tmp_path), cpu_threads=1) as model:
        asked = {"max_new_tokens": 5, "ignore_eos": True}
        with pytest.raises(BatchError, match=r"^2 of 4 prompts failed, the first at \[1\]: .*finite") as caught:
            model.generate(["a", "aZ", "b", "Z"], **asked)
        assert sorted(caught.value.errors) == [1, 3]
        assert [c is None for c in caught.value.completions] == [False, True, False, True]
        [first], [third] = model.generate("a", **asked), model.generate("b", **asked)
        assert (caught.value.completions[0], caught.value.completions[2]) == (first, third)


def test_the_engine_says_for_which_instruction_set_it_computes(folder, llm):
    assert llm.info.isa == torch.backends.cpu.get_cpu_capability().lower()  # the CPU backend refuses such small blocks
    with LLM(str(folder), backend="cpu", cpu_threads=1) as model:
        assert model.info.isa == isa.detect("").name


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ModelError):
        LLM(str(tmp_path))


def test_half_precision_runs(folder):
    with LLM(str(folder), dtype="bfloat16", cpu_threads=1) as model:
        assert model.info.dtype == "bfloat16"
        assert model.info.isa
        assert len(model.generate("Hello", max_new_tokens=4, ignore_eos=True)[0].token_ids) == 4


def test_the_cache_takes_no_more_than_memory_allows(folder):
    source = local_source(folder)
    options = EngineOptions(block_size=8, max_batch_size=2, max_total_tokens=100)
    parts = assemble(source, options, Group(), lambda _: None)
    with OfflineEngine(parts) as engine:
        assert engine.info.num_blocks == 2 * 13  # all that two sequences of full length can use
        assert engine.info.max_input_tokens == 99


def test_the_package_offers_llm():
    assert tokenmill.LLM is LLM
