"""Results of the CPU backend's steps besides logits: tokens, log-probabilities, prompt details; and refusals."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_backends import choice_of, make
from support_cpu import CpuDriver, kernel_folder
from support_models import Driver, make_checkpoint, prompts

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cpu import layout as t
from tokenmill.backends.cpu.isa import available
from tokenmill.backends.cpu.memory import AttentionShape, page_bytes
from tokenmill.backends.cpu.prepare import refusal
from tokenmill.backends.kind import BackendOptions
from tokenmill.errors import NotEnoughMemory, StartError, Unsupported
from tokenmill.models.base import program_of
from tokenmill.runtime.choice import choose
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import SamplingParams

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_checkpoint(path, "llama")
    return path


@pytest.fixture
def cpu(folder: Path) -> Any:
    backend = CpuDriver.of(folder)
    yield backend
    backend.close()


def test_the_greedy_token_is_the_likeliest_and_stands_behind_its_sequence(cpu: CpuDriver) -> None:
    found = cpu.step([(2, prompts()[1]), (0, [5])])
    best = cpu.logits(2).argmax(-1).tolist()
    assert found.token_ids == best
    assert [cpu._slots.tokens[2, 37], cpu._slots.tokens[0, 1]] == best


def test_a_row_that_is_not_finite_gives_minus_one(cpu: CpuDriver) -> None:
    cpu._memory.panels(cpu.program.ops[0].weights()["table"][0])[0].panels.view(np.float32)[:] = np.nan
    assert cpu.step([(0, [5, 6])]).token_ids == [-1]


def test_a_chunk_that_samples_nothing_computes_the_cache_only(cpu: CpuDriver) -> None:
    ids = prompts()[1]
    inputs = cpu.inputs([(0, ids[:20])])
    assert cpu.run(replace(inputs, samples=inputs.samples[:0])).result().token_ids == []
    rest = cpu.feed([(0, ids[20:])])
    cpu.forget(0)
    np.testing.assert_array_equal(rest, cpu.feed([(0, ids)]))


def test_log_probabilities_of_prompt_and_output_are_torchs(folder: Path, cpu: CpuDriver) -> None:
    torch_backend = Driver.of(folder)
    ids = prompts()[1]
    sampling = SamplingParams(prompt_logprobs=3, logprobs=2)
    got = cpu.step([(1, ids)], sampling, logprobs=2, prompt_logprobs=3)
    cpu.forget(1)
    again = cpu.inputs([(1, ids)], sampling, logprobs=2, prompt_logprobs=3)
    want = torch_backend.run(again).result()
    assert got.token_ids == want.token_ids
    assert got.payloads is not None
    assert want.payloads is not None
    assert got.payloads[0].start == want.payloads[0].start == 1
    assert len(got.payloads[0].details) == len(ids) - 1
    for mine, theirs in zip(got.payloads[0].details, want.payloads[0].details, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=0.02)
        assert mine.top_ids[0] == theirs.top_ids[0]
    assert got.details is not None
    assert want.details is not None
    assert got.details[0].logprob == pytest.approx(want.details[0].logprob, abs=0.02)


def test_a_seed_gives_the_tokens_that_it_gives_with_torch(folder: Path, cpu: CpuDriver) -> None:
    sampling = SamplingParams(temperature=0.8, seed=99)
    torch_backend = Driver.of(folder)
    for i in range(20):
        inputs = cpu.inputs([(1, prompts()[1][i:])], sampling, tail="plain")
        assert cpu.run(inputs).result().token_ids == torch_backend.run(inputs).result().token_ids
        cpu.forget(1)


@pytest.mark.parametrize("family", ["qwen3", "mistral_window", "bloom", "cohere", "deepseek_v3"])
def test_an_int8_cache_is_near_float16(tmp_path: Path, family: str) -> None:
    make_checkpoint(tmp_path, family)
    exact, rounded = CpuDriver.of(tmp_path), CpuDriver.of(tmp_path, kv_cache_dtype="int8")
    for rows in ([(0, prompts()[1])], [(0, [3]), (1, prompts()[2])], [(1, [4])]):
        a, b = exact.feed(list(rows)), rounded.feed(list(rows))
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.999
    assert rounded.block_bytes() < 0.7 * exact.block_bytes()
    exact.close(), rounded.close()


def test_blocks_of_several_pages_give_the_same_bits(folder: Path, cpu: CpuDriver) -> None:
    large = CpuDriver.of(folder, limits=StepLimits(256, 4, 256, 32), num_blocks=20)
    for rows in ([(0, prompts()[1]), (1, prompts()[2])], [(1, [3]), (0, [4])]):
        np.testing.assert_array_equal(large.feed(list(rows)), cpu.feed(list(rows)))
    large.close()


def test_warming_up_leaves_no_trace(folder: Path, cpu: CpuDriver) -> None:
    other = CpuDriver.of(folder)
    other.warm_up()
    assert len(other._memory._cache)
    assert not other._memory._cache.any()
    assert not other._slots.tables.any()
    np.testing.assert_array_equal(other.feed([(0, prompts()[1])]), cpu.feed([(0, prompts()[1])]))
    other.close()


def test_pages_on_the_host_are_those_of_the_kernels() -> None:
    from tokenmill.backends.cpu import attention_tiles

    for kv_dtype in ("f16", "int8"):
        for dim, group in ((64, 3), (128, 4), (16, 1), (80, 7)):
            mine, theirs = AttentionShape(kv_dtype, dim, 2, group, False), attention_tiles.Heads(kv_dtype, dim, group)
            assert page_bytes(dim, dim, kv_dtype) == theirs.pages.size
            assert (mine.name, mine.item_rows) == (theirs.name, theirs.item_rows)


def test_a_cache_that_cannot_be_had_is_said_with_its_size(folder: Path) -> None:
    backend = CpuDriver.of(folder, num_blocks=8)
    with pytest.raises(NotEnoughMemory, match=r"1125899906842624 blocks needs \d{19,} bytes"):
        backend.allocate(1 << 50)
    backend.close()


@pytest.mark.skipif(not available()[0].pairs, reason="this machine does not multiply bfloat16")
def test_room_for_rounded_activations_is_made_and_counted_only_where_weights_are_bfloat16(
    tmp_path: Path, cpu: CpuDriver
) -> None:
    make_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    paired = CpuDriver.of(tmp_path)
    room = 256 * t.narrow_stride(128)  # a step's tokens, the widest input of a product
    counters = 64 * (4 * 3 + 1)  # one for each row of the table that rounds
    assert paired.step_bytes() - cpu.step_bytes() == room + counters
    assert not cpu._scratch.context[t.NARROW]
    paired.close()


# ---- choice of the backend ----


def program(folder: Path) -> Any:
    return program_of(open_checkpoint(local_source(folder)).config)


def test_a_block_that_is_no_page_is_refused(folder: Path) -> None:
    assert "multiple" in refusal(program(folder), 8)
    assert refusal(program(folder), 32) == ""


def test_torch_is_chosen_with_the_reason_where_the_cpu_backend_cannot(folder: Path) -> None:
    assert choose(program(folder), BackendOptions(), 16, 1) == choice_of("cpu")
    assert choose(program(folder), BackendOptions(backend="torch"), 16, 1) == choice_of("torch")
    other = choose(program(folder), BackendOptions(), 8, 1)
    assert other.name == "torch"
    assert "or a multiple" in other.reason
    assert choose(program(folder), BackendOptions(cpus=2), 16, 2).name == "cpu"
    with pytest.raises(Unsupported, match="or a multiple"):
        choose(program(folder), BackendOptions(backend="cpu"), 8, 1)


def test_an_instruction_set_that_is_wrong_is_an_error_not_a_reason(folder: Path) -> None:
    with pytest.raises(StartError, match="TOKENMILL_ISA"):
        choose(program(folder), BackendOptions(cpu_isa="mmx"), 16, 1)


def test_the_reason_for_torch_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_checkpoint(local_source(folder))
    with caplog.at_level(logging.WARNING):
        backend = make(choice_of("torch", "it has no kernel for Experts"), program(folder), source)
    backend.close()
    assert "no kernel for Experts" in caplog.text


def test_weights_count_as_the_backend_keeps_them(folder: Path) -> None:
    source = open_checkpoint(local_source(folder))
    cpu, torch = choice_of("cpu").kind, choice_of("torch").kind
    floats = cpu.weight_bytes(program(folder), source, "float32")
    assert floats == torch.weight_bytes(program(folder), source, "float32")
    assert floats == 2 * torch.weight_bytes(program(folder), source, "bfloat16")


def test_loading_reports_bytes_and_then_kernels(folder: Path) -> None:
    source, seen = open_checkpoint(local_source(folder)), []
    backend = make(choice_of("cpu"), program(folder), source, seen.append, kernel_cache=str(kernel_folder()))
    backend.close()
    loaded = [p for p in seen if p.phase == "load"]
    assert [p.done for p in loaded] == sorted(p.done for p in loaded)
    assert loaded[-1].done == loaded[-1].total
