"""Ranks of the CUDA backend: the kernels of their collective operations, and whole models, without a second GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from support_cuda import DEVICE, CudaDriver, program, torch, write_random
from support_cuda_ranks import at_once, on_ranks, peers_of
from support_models import Driver, steps
from support_ranks import Rank

from bench.gpu import ranks
from bench.gpu.shapes import SHAPES
from tokenmill.backends.base import Masks
from tokenmill.backends.cuda.collectives import choice
from tokenmill.backends.cuda.collectives.base import Needs, Normed, RankAbsent
from tokenmill.backends.cuda.collectives.choice import NEVER, Limits
from tokenmill.backends.cuda.explain import KernelOptions, kernels_of, rules_of
from tokenmill.backends.cuda.sizes import Sizes
from tokenmill.models.base import program_of
from tokenmill.program.shard import shard
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import GrammarSpec

LIMITS = Limits(NEVER, NEVER)
RNG = torch.Generator().manual_seed(1)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=RNG).to(DEVICE, torch.float16)


def needs(rows: int, width: int, columns: int = 8, samples: int = 4) -> Needs:
    return Needs(rows, width * 2, samples, columns, 2)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_sum_rows_in_one_shot_with_equal_bits(size: int) -> None:
    peers = peers_of(needs(3, 40), size, LIMITS)
    for _ in range(3):  # both places of the numbers, and the first one again
        xs, outs = [drawn(3, 40) for _ in peers], [drawn(3, 40) for _ in peers]
        sums = [each.reduction(x, out) for each, x, out in zip(peers, xs, outs, strict=True)]
        at_once(peers, lambda rank, sums=sums: sums[rank].run(3))
        wanted = sum((x.float() for x in xs[1:]), xs[0].float()).half()
        for each, out in zip(peers, outs, strict=True):
            each.check()
            assert torch.equal(out, wanted)


def test_ranks_sum_many_rows_in_two_shots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.backends.cuda.collectives.peers.TILE_BYTES", 32)
    monkeypatch.setattr("tokenmill.backends.cuda.collectives.peers._MOST_TILES", 2)
    peers = peers_of(needs(5, 24), 2, Limits(0, NEVER))  # 120 numbers: 64 at once, and a part of a tile
    xs, outs = [drawn(5, 24) for _ in peers], [drawn(5, 24) for _ in peers]
    sums = [each.reduction(x, out) for each, x, out in zip(peers, xs, outs, strict=True)]
    for rows in (5, 2):
        counts = [each.counts.clone() for each in peers]
        at_once(peers, lambda rank, rows=rows: sums[rank].run(rows))
        assert any(not torch.equal(each.counts, before) for each, before in zip(peers, counts, strict=True))
        wanted = (xs[0].float() + xs[1].float()).half()
        assert all(torch.equal(out[:rows], wanted[:rows]) for out in outs)


@pytest.mark.parametrize("added", [True, False])
def test_a_sum_over_ranks_includes_the_norm_behind_it(added: bool) -> None:
    peers = peers_of(needs(2, 20), 2, LIMITS)
    xs, y, weight = [drawn(2, 20) for _ in peers], drawn(2, 20), drawn(20)
    totals, outs = [drawn(2, 20) for _ in peers], [drawn(2, 20) for _ in peers]
    sums = []
    for rank, each in enumerate(peers):
        normed = Normed(y if added else None, weight, None, totals[rank], outs[rank], 1e-5, False)
        sums.append(each.reduction(xs[rank], totals[rank], normed))
    assert sums[0].norms(2)
    at_once(peers, lambda rank: sums[rank].run_normed(2))
    total = (xs[0].float() + xs[1].float()).half()
    total = (total.float() + y.float()).half() if added else total
    wanted = torch.nn.functional.rms_norm(total.float(), (20,), weight.float(), 1e-5)
    for rank in range(2):
        assert torch.equal(totals[rank], total)
        torch.testing.assert_close(outs[rank].float(), wanted, atol=4e-3, rtol=4e-3)
    assert torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("first_only", [True, False])
def test_columns_of_ranks_are_gathered_without_the_padding(first_only: bool) -> None:
    peers = peers_of(needs(4, 8, columns=7, samples=2), 2, LIMITS)
    xs, outs = [drawn(4, 7) for _ in peers], [torch.full((4, 13), 9.0, device=DEVICE).half() for _ in peers]
    made = [each.gathering(x, out, first_only) for each, x, out in zip(peers, xs, outs, strict=True)]
    at_once(peers, lambda rank: made[rank].run(2))
    wanted = torch.cat(xs, 1)[:2, :13]
    assert torch.equal(outs[0][:2], wanted)
    assert torch.equal(outs[1][:2], torch.full_like(wanted, 9.0) if first_only else wanted)
    assert bool((outs[0][2:] == 9.0).all())


@pytest.mark.parametrize("some", [True, False])
def test_tokens_of_rank_0_are_appended_on_all_ranks(some: bool) -> None:
    peers = peers_of(needs(4, 8), 2, LIMITS)
    chosen = [torch.tensor(ids, dtype=torch.int32, device=DEVICE) for ids in ([5, -1, 7], [1, 2, 3])]
    tokens = [torch.zeros(3, 6, dtype=torch.int32, device=DEVICE) for _ in peers]
    pairs = torch.tensor([[0, 1], [2, 3], [1, 0], [0, 0]], dtype=torch.int32, device=DEVICE).view(-1)
    samples = torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE) if some else None
    made = [each.spreading(ids, held) for each, ids, held in zip(peers, chosen, tokens, strict=True)]
    at_once(peers, lambda rank: made[rank].run(Sizes(4, 3, pairs, samples), 3))
    assert chosen[1].tolist() == [5, -1, 7]
    places = [(1, 1), (0, 2), (2, 4)] if some else [(0, 2), (2, 4), (1, 1)]
    assert [int(tokens[1][place]) for place in places] == [5, 0, 7]
    assert not tokens[0].any(), "on rank 0 they are there already"


def test_a_rank_that_does_not_come_is_named() -> None:
    peers = peers_of(needs(1, 8), 3, LIMITS)
    for each in peers:
        each.wait_up_to(1e-4)
    for rank in (0, 2):
        peers[rank].reduction(drawn(1, 8), drawn(1, 8)).run(1)
    peers[0].counts.zero_()
    peers[0].fault.zero_()
    peers[0].reduction(drawn(1, 8), drawn(1, 8)).run(1)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(RankAbsent, match=r"rank 1 did not take part .* of rank 0"):
        peers[0].check()


def test_the_kernel_of_a_sum_is_the_fastest_of_its_size() -> None:
    times = {
        "one shot": {8: 3.0, 32: 5.0, 128: 20.0, 512: None},
        "two shots": {8: 6.0, 32: 6.0, 128: 9.0, 512: 30.0},
        "NCCL": {8: 9.0, 32: 9.0, 128: 10.0, 512: 25.0},
    }
    found = choice.measured({name: each.get for name, each in times.items()}, list, [8, 32, 128, 512])
    assert found == Limits(32, 128, measured=True)
    del times["NCCL"]
    found = choice.measured({name: each.get for name, each in times.items()}, list, [8, 32, 128, 512])
    assert found == Limits(32, NEVER, measured=True)


def test_doctor_tells_the_sums_over_ranks_and_the_launches(tmp_path: Path) -> None:
    made = shard(program(tmp_path, "llama", num_hidden_layers=3, hidden_size=64), 2)
    source = open_checkpoint(local_source(tmp_path))
    rules = rules_of(made, source, KernelOptions(dtype="bfloat16", ranks=2))
    assert rules["ranks"] == "2; a step has 7 sums over them, 1 KiB a row; 6 include the norm behind"
    assert rules["sums over the ranks"].startswith("one shot up to 1 MiB, two shots up to 8 MiB, NCCL above")
    assert rules["launches"] == "about 30 in a decode step of several rows"
    assert "ranks" not in rules_of(made, source, KernelOptions(dtype="bfloat16"))
    kinds = kernels_of(made, KernelOptions(dtype="bfloat16", ranks=2))
    assert (sum(kinds["AllReduce"].values()), list(kinds["Gather"])) == (7, ["gather_rows"])


def rank_of(
    folder: Path, group: Rank, rows_of_steps: list[list[tuple[int, list[int]]]], **options: Any
) -> list[np.ndarray]:
    driver = CudaDriver(folder, group=group, **options)
    try:
        return [driver.feed(rows) for rows in rows_of_steps]
    finally:
        driver.close()


FAMILIES = ["llama", "olmo2", "gpt2", "gemma2", "qwen3_moe", "gpt_oss", "deepseek_v2"]


@pytest.mark.parametrize("family, experts", [
    *[pytest.param(name, False, marks=[pytest.mark.slow] if name != "llama" else []) for name in FAMILIES],
    pytest.param("gpt_oss", True, marks=pytest.mark.slow), pytest.param("qwen3_moe", True, marks=pytest.mark.slow),
])  # fmt: skip
def test_logits_of_two_ranks_equal_the_torch_backends_of_one(family: str, experts: bool, tmp_path: Path) -> None:
    write_random(tmp_path, family, num_hidden_layers=1)
    history = [*steps()[:2], [(2, [9])]]
    found = on_ranks(2, lambda group: rank_of(tmp_path, group, history, expert_parallel=experts))
    expected = Driver.of(tmp_path)
    for step, rows in enumerate(history):
        wanted = expected.feed(rows)
        for rank in range(2):
            np.testing.assert_allclose(found[rank][step], wanted, atol=2e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4])
def test_sizes_that_ranks_do_not_divide_are_padded(size: int, tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "vocab_size": 131}
    write_random(tmp_path, "llama", num_hidden_layers=1, intermediate_size=72, **sizes)
    history = [[(0, [1, 2, 130]), (1, [5])], [(0, [128])]]
    found = on_ranks(size, lambda group: rank_of(tmp_path, group, history))
    expected = Driver.of(tmp_path)
    for step, rows in enumerate(history):
        np.testing.assert_allclose(found[0][step], expected.feed(rows), atol=2e-4, rtol=1e-3)


def test_a_mask_of_rank_0_decides_the_token_of_all_ranks(tmp_path: Path) -> None:
    write_random(tmp_path, "llama", num_hidden_layers=1)

    def masked(group: Rank) -> list[list[int]]:
        driver = CudaDriver(tmp_path, group=group)
        found = []
        for rows in ([(0, [1, 2, 3])], [(0, [4])]):  # a prompt, and a decode step, which has chosen before
            inputs = driver.inputs(rows)
            (admitted,) = inputs.admitted
            request = msgspec.structs.replace(admitted.request, grammar=GrammarSpec("regex", "a*"))
            admitted = replace(admitted, request=request)
            step = driver.run(replace(inputs, admitted=(admitted,), deferred=group.rank == 0))
            if group.rank == 0:
                bits = np.zeros((1, 4), np.uint32)
                bits[0, 2] = 1 << 5 if len(found) else 1 << 7
                step.sample(Masks(np.zeros(1, np.int32), bits))
            found.append(step.result().token_ids)
        driver.close()
        return found

    assert on_ranks(2, masked) == [[[71], [69]]] * 2


def test_predicted_steps_add_the_sums_to_the_bytes_of_a_rank() -> None:
    lines = ranks.predict("8b", {(2, 1): 2.0})
    cells = {int(line.split("|")[1]): line.split("|")[3:5] for line in lines[3:7]}
    assert [int(cells[size][0]) for size in (1, 2, 8)] == [0, 65, 65]
    whole, half, eighth = (float(cells[size][1].split()[0]) for size in (1, 2, 8))
    assert whole / 2 < half < whole
    assert whole / 8 < eighth < half
    program_of_two = shard(program_of(SHAPES["8b"]), 2)
    assert f"({2.0 + ranks.sums_ms(program_of_two, 2, 1):.2f})" in cells[2][1]
    assert ranks.sum_us(1 << 20, 2) < ranks.sum_us(2 << 20, 2) < ranks.sum_us(2 << 20, 8)
    assert ranks.sum_us(1 << 20, 1) == 0
