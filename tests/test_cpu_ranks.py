"""Ranks of the CPU engine: threads of this process share a model as processes would, and say what one rank says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_cpu import CpuDriver, Rows, kernel_folder
from support_meeting import Rank, on_ranks
from support_models import make_checkpoint
from support_programs import Draw, same, steps

from tokenmill.backends.base import Masks, StepResult
from tokenmill.backends.cpu import peers, prepare
from tokenmill.backends.cpu.division import Division
from tokenmill.backends.cpu.memory import Sizes, plans_of
from tokenmill.backends.cpu.peers import Peers, RankLost
from tokenmill.backends.cpu.pinning import cpus_of, memory_nodes, parse
from tokenmill.backends.kind import BackendOptions
from tokenmill.models.base import program_of
from tokenmill.program import ops
from tokenmill.program.shard import shard
from tokenmill.program.value import Program
from tokenmill.quant.base import reader_of
from tokenmill.runtime import assembly
from tokenmill.runtime.assembly import EngineOptions
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import SamplingParams, StoppingParams

FEW: Rows = [(0, [6]), (1, [3])]
STEPS: list[Rows] = [[(0, [1, 2, 3, 4, 5]), (1, [7, 8, 9])], FEW, [(0, [6] * 33), (2, [3])], [(0, [1]), (2, [2])]]
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, repetition_penalty=1.1, seed=11, logprobs=2, prompt_logprobs=1)


def make(folder: Path, family: str = "llama", **changes: Any) -> Path:
    make_checkpoint(folder, family, **changes)
    return folder


def of_ranks(
    size: int, folder: Path, wanted: list[Rows], sampling: SamplingParams | None = None, **options: Any
) -> Any:
    """Return the results and the logits of each step, on each rank."""

    def work(group: Rank) -> list[tuple[StepResult, np.ndarray]]:
        driver = CpuDriver.of(folder, group=group, **{"cpu_threads": 1} | options)
        found = [(driver.step(rows, sampling, **_asked(sampling)), driver.logits(len(rows))) for rows in wanted]
        group.exchange()
        driver.close()
        return found

    return on_ranks(size, work)


def _asked(sampling: SamplingParams | None) -> dict[str, Any]:
    if sampling is None:
        return {}
    return {"tail": "full", "logprobs": sampling.logprobs, "prompt_logprobs": sampling.prompt_logprobs}


@pytest.mark.parametrize("size, family, changes, threads", [
    (2, "llama", {"num_hidden_layers": 1}, 2), (3, "gemma2", {}, 1),
    (3, "falcon_alibi", {}, 1),
    (2, "mixtral", {"intermediate_size": 64}, 1),
])  # fmt: skip
def test_ranks_choose_what_one_rank_chooses_and_have_equal_bits(
    size: int, family: str, changes: dict[str, Any], threads: int, tmp_path: Path
) -> None:
    """Four steps, of many rows and of few: ranks divide the rows of the former."""
    make(tmp_path, family, **{"num_hidden_layers": 2} | changes)
    (alone,) = of_ranks(1, tmp_path, STEPS)
    for found in of_ranks(size, tmp_path, STEPS, cpu_threads=threads):
        for (result, logits), (wanted, expected), (_, first) in zip(found, alone, found, strict=True):
            assert result.token_ids == wanted.token_ids
            assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
            assert np.array_equal(logits, first)


def test_ranks_may_have_whole_experts(tmp_path: Path) -> None:
    """Three ranks have two places each, of which the last one is empty."""
    make(tmp_path, "gpt_oss", num_hidden_layers=1)
    (alone,) = of_ranks(1, tmp_path, STEPS)
    for found in of_ranks(3, tmp_path, STEPS, expert_parallel=True):
        for (result, logits), (wanted, expected) in zip(found, alone, strict=True):
            assert result.token_ids == wanted.token_ids
            assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_logits_have_room_for_the_columns_of_every_rank_also_those_of_no_token(tmp_path: Path) -> None:
    program = program_of(open_checkpoint(local_source(make(tmp_path, num_hidden_layers=1))).config)
    fused = prepare.fused(shard(program, 3))
    columns = next(op.out.width for op in reversed(fused.ops))
    assert fused.logits.width == 128
    assert fused.logits.spec.width == 3 * columns > 128


@pytest.mark.slow
@pytest.mark.parametrize("size, family", [
    (2, "deepseek_v3"), (2, "gpt_oss"), (3, "olmo2"), (2, "bloom"), (2, "gemma3_text"), (2, "phimoe"), (4, "gpt2"),
    (2, "gemma3n_text"),
])  # fmt: skip
def test_ranks_of_other_architectures_choose_what_one_chooses(size: int, family: str, tmp_path: Path) -> None:
    make(tmp_path, family, moe_intermediate_size=64, intermediate_size=128)
    (alone,) = of_ranks(1, tmp_path, STEPS)
    for found in of_ranks(size, tmp_path, STEPS):
        for (result, logits), (wanted, expected) in zip(found, alone, strict=True):
            assert result.token_ids == wanted.token_ids
            assert np.abs(logits - expected).max() < 1e-3 * np.abs(expected).max()


def test_rank_zero_samples_and_has_the_log_probabilities_also_those_of_prompts(tmp_path: Path) -> None:
    make(tmp_path, num_hidden_layers=2)
    (alone,) = of_ranks(1, tmp_path, STEPS, SAMPLED)
    first, second = of_ranks(2, tmp_path, STEPS, SAMPLED)
    for (result, _), (other, _), (wanted, _) in zip(first, second, alone, strict=True):
        assert result.token_ids == other.token_ids == wanted.token_ids
        assert (other.details, other.payloads) == (None, None)
        prompts = [[d for row in (r.payloads or {}).values() for d in row.details] for r in (result, wanted)]
        assert len(prompts[0]) == len(prompts[1])
        for own, expected in ((result.details, wanted.details), prompts):
            assert [d.top_ids for d in own] == [d.top_ids for d in expected]
            assert np.allclose([d.logprob for d in own], [d.logprob for d in expected], atol=1e-4)


def test_engines_of_ranks_preempt_alike_and_say_what_one_rank_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of eight blocks is far too small for five sequences of up to 44 tokens."""
    make(tmp_path, num_hidden_layers=1)
    monkeypatch.setattr(assembly, "count_blocks", lambda *_: 8)
    own = BackendOptions(backend="cpu", cpu_threads=1, cpus=4, kernel_cache=str(kernel_folder()))
    wanted = EngineOptions(backend=own, max_total_tokens=64, max_batch_tokens=24, max_batch_size=5)

    def work(group: Rank) -> tuple[list[list[int]], int]:
        parts = assembly.assemble(local_source(tmp_path), wanted, group, lambda progress: None)
        with OfflineEngine(parts) as engine:
            sampling = SamplingParams(temperature=0.8, top_k=20, seed=5)
            found = engine.generate([[i + 1] * (3 + 5 * i) for i in range(5)], sampling, StoppingParams(20))
            group.exchange()
            return found, engine.stats.preemptions

    ((alone, _),) = on_ranks(1, work)
    for found, preemptions in on_ranks(2, work):
        assert found == alone
        assert preemptions > 0


@pytest.mark.slow
def test_ranks_of_drawn_programs_give_the_numbers_of_one() -> None:
    compared = 0
    for seed in range(1000, 1012):
        program, source = (draw := Draw(seed, plain=True)).program(), draw.source()
        if prepare.refusal(program, 16) or prepare.refusal(shard(program, 2), 16):
            continue
        compared += 1

        def work(group: Rank, program: Program = program, source: Any = source) -> list[np.ndarray]:
            driver = CpuDriver(source, program=program, group=group, cpu_threads=1)
            found = [driver.feed(rows) for rows in steps()]
            group.exchange()
            driver.close()
            return found

        driver = CpuDriver(source, program=program, cpu_threads=1)  # type: ignore[arg-type]
        want = [driver.feed(rows) for rows in steps()]
        driver.close()
        for got in on_ranks(2, work):
            assert same(got, want, 3e-3), f"seed {seed}\n{program}"
    assert compared > 2


def test_masks_reach_the_other_ranks_as_tokens(tmp_path: Path) -> None:
    """Only rank 0's step is deferred: the others wait for its ids."""
    make(tmp_path, num_hidden_layers=1)
    allowed = np.zeros((1, 4), np.uint32)
    allowed[0, 1] = 1 << 5  # id 37

    def work(group: Rank) -> list[int]:
        driver = CpuDriver.of(tmp_path, group=group, cpu_threads=1)
        step = driver.run(driver.inputs([(0, [1, 2, 3])], deferred=group.rank == 0))
        if group.rank == 0:
            step.sample(Masks(np.zeros(1, np.int32), allowed))
        ids = step.result().token_ids
        known = driver._slots.tokens[0, :4].tolist()
        group.exchange()
        driver.close()
        return [*ids, *known]

    assert on_ranks(2, work) == [[37, 1, 2, 3, 37]] * 2


# ---- memory ----


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Program:
    folder = make(tmp_path_factory.mktemp("model"), "gemma2", num_hidden_layers=3)
    return prepare.fused(shard(program_of(open_checkpoint(local_source(folder)).config), 2))


def test_ranks_meet_twice_a_layer_with_few_rows_and_four_times_with_many(sharded: Program) -> None:
    """Besides: at the start, for the embedding, before rows are taken, for the last norm, and for the logits."""
    division = Division.of(sharded, 2)
    needed = list(division.meetings.values())
    assert needed.count("always") == 2 * 3 + 4
    assert len(needed) == 4 * 3 + 5
    for i, op in enumerate(sharded.ops):
        if isinstance(op, ops.AllReduce):
            assert division.meetings[i] == "always"


def test_shared_memory_is_used_again_only_behind_a_meeting_that_always_takes_place(sharded: Program) -> None:
    division = Division.of(sharded, 2)
    sizes = Sizes(64, 8, 64, 1, "f16")
    plan = plans_of(sharded, sizes, prepare.private_outputs(sharded), division).shared
    certain = [i for i, needed in division.meetings.items() if needed == "always"]
    uses: dict[int, list[int]] = {}
    for i, op in enumerate(sharded.ops):
        for value in (*op.reads().values(), *op.results().values()):
            uses.setdefault(value.buffer, []).append(i)
    specs = {v.buffer: v.spec for op in sharded.ops for v in op.results().values()}
    spans = {b: (at, at + sizes.rows(specs[b]) * 64) for b, at in plan.offsets.items()}  # at least so large
    shared = [(a, b) for a in spans for b in spans if a != b and uses[a][0] <= uses[b][0]]
    overlapping = [(a, b) for a, b in shared if spans[a][0] < spans[b][1] and spans[b][0] < spans[a][1]]
    assert overlapping
    for a, b in overlapping:
        assert any(uses[a][-1] < meeting <= uses[b][0] for meeting in certain)


# ---- peers ----


@pytest.fixture(params=["nameless", "file"])
def kind_of_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "file":
        monkeypatch.setattr(peers, "_nameless", lambda nbytes, until_mapped: "")
    return str(request.param)


def test_what_one_rank_writes_the_others_read_and_nothing_is_left_behind(kind_of_memory: str) -> None:
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()

    def work(group: Rank) -> int:
        memory = Peers(group, 5000, 3)
        memory.values[group.rank] = 7 + group.rank
        if group.rank == 0:
            memory.ids(3)[:] = 4, 5, 6
        group.exchange()
        return int(memory.values[:2].sum()) * 100 + int(memory.ids(2).sum())

    assert on_ranks(2, work) == [1509, 1509]
    assert not {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("tokenmill")}


def test_ranks_that_were_started_differently_are_told_so() -> None:
    with pytest.raises(RuntimeError, match=r"different sizes: \[4\d+, 8\d+\] bytes. Start them alike"):
        on_ranks(2, lambda group: Peers(group, 100 + 4000 * group.rank, 8))


def test_ranks_that_cannot_share_memory_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_map", lambda path, nbytes: None)
    with pytest.raises(RuntimeError, match="of one user on one host"):
        on_ranks(2, lambda group: Peers(group, 100, 8))


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("how, message", [
    ("leaves", "rank 1 has ended while rank 0 waited"), ("dies", "rank 1 has ended while rank 0 waited"),
    ("hangs", "rank 1 did not arrive in time while rank 0 waited"),
])  # fmt: skip
def test_a_step_ends_with_an_error_that_names_the_rank_that_does_not_come(
    how: str, message: str, tmp_path: Path
) -> None:
    make(tmp_path, num_hidden_layers=1)

    def work(group: Rank) -> str:
        driver = CpuDriver.of(tmp_path, group=group, cpu_threads=1, rank_timeout_s=0.2 if how == "hangs" else 60.0)
        driver.step(FEW)
        if group.rank == 1:
            if how == "leaves":
                driver.close()
            elif how == "dies":
                driver._memory.peers._lines[1, 1] = ended_process()
            group.exchange()
            driver.close()
            return ""
        try:
            driver.step(FEW)
        except RankLost as error:
            return str(error)
        finally:
            group.exchange()
            driver.close()
        return "computed"

    assert on_ranks(2, work)[0].startswith(message)


# ---- memory nodes ----


@pytest.mark.parametrize("rank, ranks, nodes, cpus", [
    (1, 2, ["0-3", "4-7"], "4-7"), (1, 2, ["0-1", "2-3", "4-5", "6-7"], "4-7"), (3, 4, ["0-3", "4-7"], "6-7"),
    (1, 2, ["0-7"], ""), (2, 3, ["0-3", "4-7"], ""), (0, 1, ["0-3", "4-7"], ""), (1, 2, ["0,2,4", "1,3,5"], "1,3,5"),
])  # fmt: skip
def test_ranks_are_tied_to_nodes_if_their_numbers_divide(rank: int, ranks: int, nodes: list[str], cpus: str) -> None:
    assert cpus_of(rank, ranks, [frozenset(parse(text)) for text in nodes]) == parse(cpus)


def test_nodes_have_the_cpus_that_this_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for node, text in enumerate(("0-1,8\n", "2-3\n", "\n", "9-")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 8}, raising=False)
    assert memory_nodes(tmp_path) == [{1, 8}, {2}]
    assert memory_nodes(tmp_path / "none") == []


def test_ranks_read_their_part_of_quantized_matrices(tmp_path: Path) -> None:
    make(tmp_path, num_hidden_layers=1, hidden_size=128, intermediate_size=256)
    source = open_checkpoint(local_source(tmp_path))

    def work(group: Rank) -> tuple[list[np.ndarray], set[str]]:
        read = reader_of(source, "int8")
        driver = CpuDriver(source, read=read, group=group, cpu_threads=1)
        found = [driver.feed(rows) for rows in STEPS]
        forms = {part.form for parts in driver._memory._panels.values() for part in parts}
        group.exchange()
        driver.close()
        return found, forms

    ((want, forms),) = on_ranks(1, work)
    for got, own in on_ranks(2, work):
        assert own == forms
        assert same(got, want, 2e-2)
