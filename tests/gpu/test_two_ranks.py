"""Two ranks of the CUDA backend that share one GPU, as processes: collective operations; models against one rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_cuda import ON_GPU, CudaDriver, torch, write_random
from support_ports import unused_port
from support_quantized import quantize_folder
from support_server import Server, byte_model
from test_quant_stored import CASES

if ON_GPU:
    from support_rank_processes import Processes, answers, relative

    from bench.gpu.engine import RandomWeights
    from bench.gpu.shapes import SHAPES
    from tokenmill.backends.base import StepLimits
    from tokenmill.backends.cuda.collectives.nccl import Nccl
    from tokenmill.backends.cuda.sizes import Sizes
    from tokenmill.parallel.group import Group

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
RNG = np.random.default_rng(0)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def two() -> Iterator[Any]:
    processes = Processes(2)
    yield processes
    processes.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_sums_of_any_size_equal_torchs(dtype: str, two: Any) -> None:
    shapes = [(n, width) for n in (1, 2, 7, 64) for width in (2, 96, 576, 4096)] + [(300, 4096), (2049, 72)]
    assert two.run("sums", shapes, dtype, 1 << 30) == [[], []]
    assert two.run("sums", shapes, dtype, 0) == [[], []]


def test_a_graph_of_collective_operations_is_replayed_a_thousand_times(two: Any) -> None:
    assert two.run("replays", 5, 1024, 1000) == [[], []]


@pytest.mark.parametrize("columns, width, rows", [(16, 31, 3), (64128, 128256, 9), (75968, 151936, 300)])
def test_columns_are_gathered_on_rank_0(columns: int, width: int, rows: int, two: Any) -> None:
    assert two.run("gathers", columns, width, rows) == [True, True]


def test_a_rank_that_does_not_come_ends_the_wait(two: Any) -> None:
    assert "rank 1 did not take part" in two.run("absent")[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2", "mistral_window"])
def test_text_and_log_probabilities_in_float32_equal_one_ranks(family: str, two: Any, tmp_path: Path) -> None:
    write_random(tmp_path, family, num_hidden_layers=2)
    prompts = [RNG.integers(0, 128, n).tolist() for n in (3, 40, 9, 70, 1, 20, 33)]
    (tokens, details), (others, _) = two.run("answers", str(tmp_path), prompts, 24)
    wanted, expected = answers(Group(), str(tmp_path), prompts, 24)
    assert tokens == others == wanted
    for made, want in zip(details, expected, strict=True):
        np.testing.assert_allclose(np.concatenate([[0], *made]), np.concatenate([[0], *want]), atol=2e-3)


def history(vocab: int) -> list[list[tuple[int, list[int]]]]:
    def ids(n: int) -> list[int]:
        return RNG.integers(0, vocab, n).tolist()

    return [
        [(0, ids(300)), (1, ids(70))], [(0, ids(1))], [(1, ids(1)), (0, ids(1))], [(2, ids(1000))],
        [(i, ids(1)) for i in range(3)], [(i, ids(1)) for i in range(3, 40)], [(i, ids(1)) for i in range(40)],
        [(0, ids(1)), (1, ids(50)), (3, ids(1))],
    ]  # fmt: skip


SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "vocab_size": 49152, "tie_word_embeddings": True, "num_hidden_layers": 4, "max_position_embeddings": 2048,
}  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"kv_cache_dtype": "fp8_e4m3fn"}, {"quantize": "fp8"}, {"deterministic": True}]
)
@pytest.mark.parametrize("shape", ["8b", "smollm2"])
def test_logits_of_real_shapes_are_those_of_one_rank(shape: str, options: dict[str, Any], two: Any) -> None:
    config = SHAPES["8b"] | ({"num_hidden_layers": 2, "vocab_size": 32001} if shape == "8b" else SMOLLM2)
    options = {"dtype": "bfloat16", "num_blocks": 600, "warm": True, "graphs": (1, 4, 48)} | options
    limits, rows_of_steps = (2048, 48, 2048, 16), history(config["vocab_size"])
    (found, others) = two.run("logits", "", rows_of_steps, config, limits=limits, **options)
    driver = CudaDriver("", source=RandomWeights(config), limits=StepLimits(*limits), **options)
    for rows, (token_ids, made), (theirs, _) in zip(rows_of_steps, found, others, strict=True):
        assert token_ids == theirs
        assert relative(made, driver.feed(rows)) < (0.08 if options.get("quantize") else 0.03)
    driver.close()


@pytest.mark.parametrize("name", ["int4, groups of 16, zeros", "fp8 in blocks", "nf4", "mxfp4"])
def test_quantized_checkpoints_are_read_in_parts(name: str, two: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    write_random(tmp_path, "llama", dtype=torch.bfloat16, spread=0.06, **sizes)
    about, write = CASES[name]
    quantize_folder(tmp_path, about, lambda module: write if module.endswith(LINEAR) else None)
    compared(tmp_path, two)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_are_shared(family: str, two: Any, tmp_path: Path) -> None:
    write_random(tmp_path, family, dtype=torch.bfloat16, spread=0.06)
    compared(tmp_path, two)


def compared(folder: Path, two: Any) -> None:
    rows_of_steps = [[(0, [1, 2, 3] * 9), (1, [5])], [(0, [7]), (1, [8])], [(2, [9] * 20), (0, [1])], [(2, [3])]]
    found, others = two.run("logits", str(folder), rows_of_steps, dtype="bfloat16")
    driver = CudaDriver(folder, dtype="bfloat16")
    off = []
    for rows, (token_ids, made), (theirs, _) in zip(rows_of_steps, found, others, strict=True):
        assert token_ids == theirs
        off.append(relative(made, driver.feed(rows)))
    assert np.median(off) < 0.04, off


def test_nccls_library_is_called_and_captured() -> None:
    nccl = Nccl(Group())
    x, out = torch.randn(5, 64, device="cuda").bfloat16(), torch.zeros(5, 64, device="cuda").bfloat16()
    wide = torch.zeros(5, 60, device="cuda").bfloat16()
    chosen, tokens = torch.tensor([7, -1], dtype=torch.int32, device="cuda"), torch.zeros(3, 4, device="cuda").int()
    pairs = torch.tensor([0, 1, 2, 2], dtype=torch.int32, device="cuda")
    reduction, gathering = nccl.reduction(x, out), nccl.gathering(x, wide, True)
    spreading = nccl.spreading(chosen, tokens)

    def step() -> None:
        reduction.run(3)
        gathering.run(4)
        spreading.run(Sizes(2, 2, pairs), 2)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    x.add_(1)
    tokens.fill_(9)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out[:3], x[:3])
    assert not out[3:].any()
    assert torch.equal(wide[:4], x[:4, :60])
    assert tokens.tolist() == [[9, 9, 7, 9], [9] * 4, [9, 9, 9, 0]]
    nccl.close()


def served(folder: Path, *options: str) -> list[Any]:
    """Return a server's answers to requests of many kinds, greedy, seeded, constrained and with details."""
    path = os.environ.get("PYTHONPATH", "")
    words = ["--dtype", "float32", "--max-total-tokens", "512", *options]
    server = Server(folder, unused_port(), *words, mock=False, wait=False, python_path=path)
    try:
        server.wait_until_ready(150)  # two ranks take turns on one card, and compile first
        asked = [
            {"inputs": "Hello", "parameters": {"max_new_tokens": 40}},
            {"inputs": "A text", "parameters": {"max_new_tokens": 30, "do_sample": True, "seed": 3, "top_p": 0.9}},
            {"inputs": "Yes or no?", "parameters": {
                "max_new_tokens": 20, "grammar": {"type": "regex", "value": "(yes|no), [0-9]{3}"}}},
            {"inputs": "Log", "parameters": {"max_new_tokens": 8, "details": True, "repetition_penalty": 1.2}},
        ]  # fmt: skip
        with ThreadPoolExecutor(4) as pool:
            return [answer.json() for answer in pool.map(lambda body: server.post("/generate", body), asked)]
    finally:
        print(server.stop())


def test_a_server_of_two_ranks_answers_as_one_of_one(tmp_path: Path) -> None:
    byte_model(tmp_path)
    write_random(tmp_path, "llama", vocab_size=258, num_hidden_layers=2, max_position_embeddings=512)
    alone, both = served(tmp_path), served(tmp_path, "--num-shard", "2", "--share-devices")
    assert [answer["generated_text"] for answer in both] == [answer["generated_text"] for answer in alone]
    logprobs = [[token["logprob"] for token in answers[3]["details"]["tokens"]] for answers in (alone, both)]
    np.testing.assert_allclose(logprobs[1], logprobs[0], atol=2e-3)
