"""States by slot: every family against transformers, through chunks, rewinds, retractions, preemption and ranks."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import check_request
from support_constraints import Automaton, House, Ready
from support_cpu import CpuDriver
from support_jobs import job_of
from support_models import Driver, prompts, reference, steps, write_model
from support_ranks import of_ranks
from support_slow import mostly_slow
from support_states import STATES
from test_constrained import check_guided, guided_case
from test_out_of_memory import Faults

from tokenmill.backends import steps as sizes
from tokenmill.backends.base import StepInputs, StepLimits
from tokenmill.backends.torch.backend import TorchBackend
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.limits import SchedulerLimits
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.tables import Tables
from tokenmill.errors import GenerationError, ModelError, NotEnoughMemory
from tokenmill.models.base import program_of
from tokenmill.parallel.group import Group
from tokenmill.program.cost import state_layout
from tokenmill.runtime.assembly import Assembled, EngineOptions, assemble
from tokenmill.runtime.constraints import Constraints
from tokenmill.runtime.executor import Executor
from tokenmill.runtime.memory import Demand, count_blocks, count_device_blocks, fitting_states
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import EngineInfo, GrammarSpec, SamplingParams, StoppingParams

torch.set_num_threads(1)
KINDS = ("mamba", "mamba2", "lfm2", "qwen3_5")
"""A family of each kind of operation."""


@pytest.fixture(scope="module", params=STATES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, made(folder, request.param)


def made(folder: Path, name: str, **changes: Any) -> Any:
    """Write a tiny random model of the family and return transformers' model."""
    model_type, fields = STATES[name]
    return write_model(folder, model_type, fields | changes)


def test_logits_equal_transformers_in_prefill_chunks_decode_and_all_at_once(case: tuple[Path, Any]) -> None:
    folder, model = case
    backend, cpu = Driver.of(folder), CpuDriver.of(folder)
    for rows, want in zip(steps(), reference(model, steps()), strict=True):
        np.testing.assert_allclose(backend.feed(rows), want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
        assert np.abs(cpu.feed(rows) - want).max() < 1e-3 * np.abs(want).max()  # keys and values are float16
    backend.close(), cpu.close()


@pytest.mark.parametrize("case", mostly_slow(STATES, KINDS), indirect=True)
def test_three_ranks_equal_one(case: tuple[Path, Any]) -> None:
    folder, model = case
    source = open_checkpoint(local_source(folder))
    logits = of_ranks(program_of(source.config), source, 3, steps())
    for own in logits:
        for found, want in zip(own, reference(model, steps()), strict=True):
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    assert len(logits) == 3


@pytest.mark.parametrize("family", KINDS)
def test_a_long_prompt_in_chunks_of_odd_sizes_equals_one_forward(family: str, tmp_path: Path) -> None:
    model = made(tmp_path, family)
    ids = np.random.default_rng(5).integers(0, 128, 331).tolist()
    backend = Driver.of(tmp_path, limits=StepLimits(512, 4, 512, 16), num_blocks=100)
    cuts = [0, 1, 67, 68, 70, 133, 330, 331]
    rows = [[(0, ids[a:b])] for a, b in itertools.pairwise(cuts)]
    for found, want in zip([backend.feed(some) for some in rows], reference(model, rows), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    backend.close()


# ---- rewinds, slots -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_a_position_that_is_computed_again_with_another_token_continues_from_the_state_before_it(
    family: str, tmp_path: Path
) -> None:
    model = made(tmp_path, family)
    backend = Driver.of(tmp_path)
    (ids, _, other), seen = prompts(), list[int]()
    backend.feed([(0, ids), (1, other)])
    for token, again in ((7, 8), (9, 3), (11, 2)):
        seen.append(again)
        for token_id in (token, again):
            got = backend.feed([(0, [token_id])])
            if token_id == token:
                backend.known[0].pop()
        (want,) = reference(model, [[(0, ids + seen)]])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    chunk = backend.feed([(1, [5, 6, 7, 8]), (0, [1, 2, 3])])
    want = reference(model, [[(1, [*other, 5, 6, 7, 8]), (0, ids + seen + [1, 2, 3])]])[0]
    np.testing.assert_allclose(chunk, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    backend.close()


@pytest.mark.parametrize("family", KINDS)
def test_a_slot_begins_at_zero_whatever_was_in_it(family: str, tmp_path: Path) -> None:
    made(tmp_path, family)
    clean, dirty = Driver.of(tmp_path), Driver.of(tmp_path)
    for ring in dirty._states._rings.values():
        ring.fill_(float("nan"))
    for rows in steps():
        np.testing.assert_array_equal(clean.feed(rows), dirty.feed(rows))
    dirty.known[0] = []
    again = dirty.feed([(0, prompts()[0])])
    np.testing.assert_allclose(again[0], Driver.of(tmp_path).feed([(0, prompts()[0])])[0], rtol=1e-5, atol=1e-6)


def test_a_row_whose_state_is_lost_is_an_error_and_no_wrong_number(tmp_path: Path) -> None:
    made(tmp_path, "mamba")
    backend = Driver.of(tmp_path)
    backend.feed([(0, [1, 2, 3]), (1, [4])])
    for slot, start, count in ((0, 1, 1), (0, 5, 1), (1, 3, 2), (2, 1, 1)):
        one = [np.array([n], np.int32) for n in (slot, start, count, 0)]
        with pytest.raises(RuntimeError, match=f"slot {slot} has no state after {start} tokens"):
            backend.run(StepInputs(*one)).result()
    backend.close()


def test_warming_up_leaves_no_trace(tmp_path: Path) -> None:
    made(tmp_path, "lfm2")
    cold, warm = Driver.of(tmp_path), Driver.of(tmp_path)
    warm.warm_up()
    assert not any(ring.any() for ring in warm._states._rings.values())
    assert (warm._states._progress.after < 0).all()
    for rows in steps():
        np.testing.assert_array_equal(cold.feed(rows), warm.feed(rows))


def test_rows_continue_where_a_ring_of_two_states_is_whatever_happens_to_them(histories: Any) -> None:
    rewound = restarted = 0
    for seed in histories(24):
        case, rules = guided_case(seed)
        case.limits = replace(case.limits, shares_prefixes=False, stride=1 + seed // 2 % 3)
        house = House(case.script, case.num_blocks, case.limits, seed=seed, full_rate=0.02 * (seed % 2))
        house.run()
        for r in case.requests if not seed % 2 else ():  # without memory, a request of a single token may fail
            (check_guided if r.id in rules else check_request)(r, case, house if r.id in rules else house.link)
        assert house.link.stats.cached_tokens == 0
        assert house.oracle.batches
        after = np.full((case.limits.max_batch_size, sizes.STATE_RING), -1)
        for batch in house.oracle.batches:
            for seq in batch.admitted:
                restarted += seq.num_preemptions > 0
            rows = zip(batch.slots.tolist(), batch.starts.tolist(), batch.counts.tolist(), strict=True)
            first_new = len(batch.slots) - len(batch.admitted)
            for row, (slot, start, count) in enumerate(rows):
                assert (start == 0) if row >= first_new else (after[slot, start % sizes.STATE_RING] == start)
                rewound += start > 0 and after[slot].max() > start
                end = start + count
                after[slot] = np.where(after[slot] > end, -1, after[slot])  # a rewound sequence's later state is void
                after[slot, end % sizes.STATE_RING] = end
                if start == 0:
                    after[slot, (end + 1) % sizes.STATE_RING] = -1
    assert min(rewound, restarted) > 0


# ---- the whole engine ----------------------------------------------------------------------------------------------


def engine_of(folder: Path, limits: StepLimits, num_blocks: int = 64, rules: bool = False) -> OfflineEngine:
    source = open_checkpoint(local_source(folder))
    backend = TorchBackend(job_of(program_of(source.config), source, limits))
    backend.allocate(num_blocks)
    return around(backend, num_blocks, rules)


def around(backend: Any, num_blocks: int, rules: bool = False) -> OfflineEngine:
    sized = backend.limits
    limits = SchedulerLimits(
        sized.max_batch_tokens, sized.max_batch_size, sized.max_total_tokens, sized.block_size, shares_prefixes=False
    )
    info = EngineInfo("tiny", "float32", "cpu", "torch", num_blocks, sized.block_size, 128, 63, 64, 1, 1)
    constraints = Constraints(128, Ready(random.Random()) if rules else None)
    executor = Executor(backend, sized.max_batch_size, constraints)
    parts = Assembled(Scheduler(BlockPool(num_blocks, sized.block_size), limits), executor, info, constraints)
    parts._resources.callback(backend.close)
    return OfflineEngine(parts)


def greedy(model: Any, prompt: list[int], tokens: list[int]) -> list[int]:
    """Return the greedy choice of transformers' model after each beginning of `tokens`."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0]
    chosen: list[int] = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    return chosen


@pytest.mark.parametrize("case", mostly_slow(STATES, KINDS), indirect=True)
def test_chunked_and_preempted_sequences_get_transformers_greedy_text(case: tuple[Path, Any]) -> None:
    folder, model = case
    rng = np.random.default_rng(1)
    head = rng.integers(0, 128, 21).tolist()
    asked = [head[: rng.integers(0, 22)] + rng.integers(0, 128, rng.integers(1, 9)).tolist() for _ in range(10)]
    counts = [int(n) for n in rng.integers(5, 30, 10)]
    with engine_of(folder, StepLimits(11, 5, 64, 4), 22) as engine:
        ids = [engine.submit(p, None, StoppingParams(n)) for p, n in zip(asked, counts, strict=True)]
        found = [[t for o in engine.outputs(i) for t in o.token_ids] for i in ids]
        assert engine.stats.preemptions > 0
        assert engine.stats.cached_tokens == 0
    assert [len(tokens) for tokens in found] == counts
    assert found == [greedy(model, p, tokens) for p, tokens in zip(asked, found, strict=True)]


@pytest.mark.parametrize("family", KINDS)
def test_forced_tokens_and_masks_give_in_a_crowd_what_they_give_alone(family: str, tmp_path: Path) -> None:
    model = made(tmp_path, family)
    rng = random.Random(3)
    asked: list[dict[str, Any]] = []
    for i in range(9):
        prompt = [rng.randrange(128) for _ in range(rng.randint(1, 20))]
        how: dict[str, Any] = {"stopping": StoppingParams(9)}
        if i % 3 == 0:
            how["grammar"] = GrammarSpec("fake", str(rng.randrange(1000)), ((7,), (9,), (60,)) if i % 2 else ())
        elif i % 3 == 1:
            forced = (100, 101, 102)[: rng.randint(1, 3)]
            how["stopping"] = StoppingParams(9, force_after=rng.randint(1, 4), forced_ids=forced, unless=((7,),))
        sampling = SamplingParams(temperature=float(i % 2), seed=i, top_k=9)
        asked.append({"prompt_ids": prompt, "sampling": sampling, **how})
    limits = StepLimits(16, 4, 64, 4)
    with engine_of(tmp_path, limits, rules=True) as engine:
        alone = [engine_answer(engine, request) for request in asked]
        assert engine.stats.forced_tokens > 0
    with engine_of(tmp_path, limits, 24, rules=True) as engine:
        ids = [engine.submit(**request) for request in asked]
        crowd = [outputs_of(engine, i) for i in ids]
    assert sum(a == b for a, b in zip(alone, crowd, strict=True)) >= len(crowd) - 1  # sums of a chunk may round
    for request, tokens in zip(asked, alone, strict=True):
        if not request["sampling"].temperature:
            assert tokens == by_the_rules(model, request, tokens)


def by_the_rules(model: Any, request: dict[str, Any], tokens: list[int]) -> list[int]:
    """Return the greedy choice of transformers' model after each beginning of `tokens`, by the request's rules."""
    prompt, spec, stopping = request["prompt_ids"], request.get("grammar"), request["stopping"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 :]
    matcher = Automaton(int(spec.source)).matcher() if spec else None
    chosen: list[int] = []
    for i, token in enumerate(tokens):
        begun = spec and (not spec.after or any((t,) in spec.after for t in tokens[:i]))
        allowed = sorted(matcher.ways) if matcher and begun else list(range(128))
        best = allowed[int(logits[i, allowed].argmax())]
        forced = stopping.force_after and i >= stopping.force_after and 7 not in tokens[: stopping.force_after]
        if forced and i - stopping.force_after < len(stopping.forced_ids):
            best = stopping.forced_ids[i - stopping.force_after]
        chosen.append(best)
        if matcher and begun:
            assert matcher.accept(token)
    return chosen


def engine_answer(engine: OfflineEngine, request: dict[str, Any]) -> list[int]:
    return outputs_of(engine, engine.submit(**request))


def outputs_of(engine: OfflineEngine, request_id: int) -> list[int]:
    """Return the tokens of a request; [] if its grammar has a dead end."""
    try:
        return [t for o in engine.outputs(request_id) for t in o.token_ids]
    except GenerationError:
        return []


@pytest.mark.parametrize(
    ("family", "place"), [("mamba2", "_slots.apply"), ("qwen3_5", "_interpreter.body"), ("lfm2", "_sample")]
)
def test_a_step_without_memory_changes_no_token(family: str, place: str, tmp_path: Path) -> None:
    made(tmp_path, family)
    limits = StepLimits(24, 5, 64, 4)

    def answers(engine: OfflineEngine) -> list[list[int]]:
        rng = np.random.default_rng(4)
        ids = [engine.submit(rng.integers(0, 128, n).tolist(), None, StoppingParams(9)) for n in (3, 17, 9, 30, 1)]
        return [outputs_of(engine, i) for i in ids]

    with engine_of(tmp_path, limits) as engine:
        wanted = answers(engine)
    source = open_checkpoint(local_source(tmp_path))
    backend = TorchBackend(job_of(program_of(source.config), source, limits))
    backend.allocate(64)
    faults = Faults(backend, place, 0.25, 1, least=2)
    with around(backend, 64) as engine:
        assert answers(engine) == wanted
        assert 0 < engine.stats.retracted == faults.count


# ---- memory --------------------------------------------------------------------------------------------------------


def test_the_bytes_of_the_states_are_part_of_the_plan(tmp_path: Path) -> None:
    made(tmp_path, "mamba2")
    backend = Driver.of(tmp_path)
    rings = sum(ring.nbytes for ring in backend._states._rings.values())
    layout = state_layout(backend.program)
    assert sizes.state_bytes(layout, 4) * 4 == rings
    assert sizes.state_bytes(layout, 4) == 2 * 2 * 4 * (3 * (64 + 2 * 2 * 8) + 8 * 8 * 8)  # ring, layers, bytes
    assert sizes.state_bytes(layout, 2) == 2 * 2 * (2 * 3 * (64 + 2 * 2 * 8) + 4 * 8 * 8 * 8)
    assert backend.step_bytes() > rings
    assert backend.block_bytes() == 0
    backend.close()


def test_blocks_that_hold_nothing_are_as_many_as_all_slots_use() -> None:
    demand = Demand(0, 1000, Tables.of((0,), 16, 64), 4, 100)
    assert count_blocks(demand, 1000) == count_device_blocks(demand, 1 << 30) == 4 * 7
    with pytest.raises(NotEnoughMemory, match=r"states of 4 sequences and a step need 1000 B: 1 B more .*batch-size"):
        count_blocks(demand, 999)
    with pytest.raises(NotEnoughMemory, match="states of 4 sequences"):
        count_blocks(demand, 5000, weight_bytes=100, limit=1000)
    with pytest.raises(NotEnoughMemory, match="states of 4 sequences"):
        count_device_blocks(demand, 1 << 20)


@pytest.mark.parametrize("each, free, fit", [(0, 0, 128), (1, 1 << 30, 128), (100, 4000, 10), (100, 0, 1), (9, -5, 1)])
def test_as_many_sequences_run_as_their_states_fit_into_a_quarter(each: int, free: int, fit: int) -> None:
    assert fitting_states(each, free, 128) == fit


def test_an_engine_of_such_a_model_has_no_prefix_cache_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made(tmp_path, "mamba2")
    caplog.set_level("INFO")
    options = EngineOptions(max_total_tokens=64)
    with OfflineEngine(assemble(local_source(tmp_path), options, Group(), lambda progress: None)) as engine:
        assert not engine.info.shares_prefixes
        prompt = list(range(40))
        first, second = (engine.generate([prompt], None, StoppingParams(3))[0] for _ in range(2))
        assert first == second
        assert engine.stats.cached_tokens == 0
    assert "The prefix cache is off" in caplog.text
    assert engine.info.backend == "cpu"


def test_the_layers_of_kimis_own_configuration_are_counted_from_one() -> None:
    model_type, fields = STATES["kimi_linear"]
    own = {"full_attn_layers": [2], "kda_layers": [1, 3], "num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4}
    left_out = {"layer_types": None, "linear_head_dim": 99, "mlp_layer_types": None}
    old = program_of({"model_type": model_type, **fields, **left_out, "linear_attn_config": own})
    new = program_of({"model_type": model_type, **fields, "mlp_layer_types": ["dense", "sparse", "sparse"]})
    assert str(old) == str(new)


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("mamba2", {"num_heads": 5}, "5 heads of 8 columns are not 64"),
        ("mamba2", {"n_groups": 3}, "3 groups do not divide 8 heads"),
        ("mamba2", {"time_step_limit": [0, None]}, "time_step_limit"),
        ("mamba2", {"time_step_limit": [0]}, "time_step_limit"),
        ("mamba", {"conv_kernel": 1}, "conv_kernel"),
        ("mamba", {"hidden_act": "softsign"}, "hidden_act"),
        ("lfm2", {"layer_types": ["conv", "mamba", "conv"]}, "layer_types"),
        ("lfm2", {"layer_types": ["conv"]}, "expected 3 of"),
        ("qwen3_5", {"layer_types": ["conv"] * 3}, "layer_types"),
        ("nemotron_h", {"layers_block_type": ["mlp", "mix"]}, "its layers are of mix, too"),
        ("nemotron_h", {"num_experts_per_tok": 9}, "9 experts are to be chosen"),
        ("bamba", {"mamba_n_heads": 7}, "7 heads of auto columns are not 128"),
        ("falcon_h1", {"ssm_multipliers": [1.0]}, "ssm_multipliers"),
        ("recurrent_gemma", {"lru_width": 33}, "4 heads do not divide `lru_width` 33"),
        ("kimi_linear", {"layer_types": ["conv"] * 3}, "layer_types"),
        ("qwen3_next", {"linear_num_key_heads": 3}, "3 key heads for 4 value heads"),
    ],
)
def test_configurations_that_cannot_be_are_refused_by_name(name: str, change: dict[str, Any], words: str) -> None:
    model_type, fields = STATES[name]
    with pytest.raises(ModelError, match=words):
        program_of({"model_type": model_type, **fields, **change})
