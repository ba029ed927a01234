"""Passes preserve numbers, ranks equal one, costs equal hand counts, buffers do not overlap.

Operations that no model uses yet equal their formula.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_models import SIZES, Driver, make_checkpoint, prompts, reference, steps
from support_programs import Arrays

from tokenmill.backends.torch.interpreter import Interpreter
from tokenmill.errors import Unsupported
from tokenmill.layers.attention import attend
from tokenmill.layers.mlp import act, soft_cap
from tokenmill.layers.norm import LayerNorm
from tokenmill.layers.scope import Scope
from tokenmill.models.base import program_of
from tokenmill.parallel.gloo import join
from tokenmill.parallel.group import Group
from tokenmill.program import ops, passes
from tokenmill.program.buffers import Plan, plan_buffers
from tokenmill.program.cost import Cost, Load, cache_layout, cost, total
from tokenmill.program.shard import shard
from tokenmill.program.value import Buffer, Inputs, Program, Tape, Value, record
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source

torch.set_num_threads(1)
CASES = ("llama_tied_with_biases", "qwen3", "mistral_window")
CPU_FUSIONS = (passes.residual_into_linear, passes.act_into_linear, passes.heads_into_attention)
GPU_FUSIONS = (passes.add_into_norm, passes.heads_into_attention, passes.act_into_linear)
PASSES: dict[str, Callable[[Program], Program]] = {
    "none": lambda p: p,
    "cpu": lambda p: passes.fuse(p, *CPU_FUSIONS),
    "gpu": lambda p: passes.fuse(p, *GPU_FUSIONS),
    "rows": passes.take_rows_early,
    "rows, cpu": lambda p: passes.fuse(passes.take_rows_early(p), *CPU_FUSIONS),
    "gpu, rows": lambda p: passes.take_rows_early(passes.fuse(p, *GPU_FUSIONS)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, reference(make_checkpoint(folder, request.param), steps())


def logits_of(folder: Path, rewrite: Callable[[Program], Program], group: Group | None = None) -> list[np.ndarray]:
    """Return the logits of the program as rewritten, with no other passes of the backend than sharding."""
    source = open_checkpoint(local_source(folder))
    program = program_of(source.config)
    backend = Driver(program, source, group=group)
    backend._interpreter = Interpreter(rewrite(shard(program, backend.group.size)))
    made = [backend.feed(rows) for rows in steps()]
    backend.close()
    return made


def same(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rewrite", PASSES)
def test_a_pass_leaves_the_numbers_as_they_were(case: tuple[Path, list[np.ndarray]], rewrite: str) -> None:
    same(logits_of(case[0], PASSES[rewrite]), case[1])


def test_passes_do_what_they_say(case: tuple[Path, list[np.ndarray]]) -> None:
    program = program_of(open_checkpoint(local_source(case[0])).config)
    cpu = PASSES["rows, cpu"](program)
    kinds = [type(op) for op in cpu.ops]
    assert not {ops.Rope, ops.GatedAct, ops.Add} & set(kinds)
    assert kinds.index(ops.TakeRows) == len(kinds) - 1 - kinds[::-1].index(ops.Attention) + 1
    gpu = [type(op) for op in passes.fuse(passes.take_rows_early(program), *GPU_FUSIONS).ops]
    assert gpu.count(ops.AddNorm) == 2 * SIZES["num_hidden_layers"]
    assert ops.Add not in gpu


def test_a_residual_is_not_fused_into_a_product_that_something_else_reads() -> None:
    tape = Tape()
    ids = tape.new("tokens", 1, "ids")
    x = tape.record(ops.Embed, "tokens", 8, ids=ids, table=ops.Weight((ops.Part("e", 4),), 8))
    y = tape.record(ops.Linear, "tokens", 8, x=x, weight=ops.Weight((ops.Part("l", 8),), 8))
    z = (x + y) + y
    program = passes.fuse(Program(tuple(tape.ops), Inputs(ids, ids), {"logits": z}), passes.residual_into_linear)
    assert [type(op) for op in program.ops] == [ops.Embed, ops.Linear, ops.Add, ops.Add]


def test_int8_activations_stay_close(case: tuple[Path, list[np.ndarray]]) -> None:
    def rewrite(program: Program) -> Program:
        fused = PASSES["cpu"](program)
        return passes.quantize_inputs(fused, lambda op: op.x.width % 32 == 0, lambda op: isinstance(op, ops.Norm))

    got = logits_of(case[0], rewrite)
    assert min(np.corrcoef(g.ravel(), w.ravel())[0, 1] for g, w in zip(got, case[1], strict=True)) > 0.995
    program = rewrite(program_of(open_checkpoint(local_source(case[0])).config))
    assert any(isinstance(op, ops.Quantize) for op in program.ops)
    assert all(op.x.spec.dtype == "int8" for op in program.ops if isinstance(op, ops.Linear))


def test_an_operation_without_a_kernel_is_refused_by_name() -> None:
    class Fourier(ops.Op):
        x: Value

    with pytest.raises(Unsupported, match="operation 'Fourier' is not supported"):
        Interpreter(record(lambda inputs: inputs.ids.record(Fourier, x=inputs.ids)))


# ---- ranks ---------------------------------------------------------------------------------------------------------


def rank_main(rank: int, size: int, folders: list[Path], run_dir: Path) -> None:
    torch.set_num_threads(1)
    group = Group.connect(rank, size, str(run_dir / "group.sock"), 60)
    try:
        assert group.minimum(5 + rank) == 5
        together, ids = join(group), torch.tensor([rank, rank + 7])
        assert together.broadcast(ids).tolist() == [0, 7]
        together.close()
        for folder in folders:
            same(logits_of(folder, PASSES["rows, cpu"], group), list(np.load(folder / "want.npz").values()))
            same(logits_of(folder, PASSES["none"], group), list(np.load(folder / "want.npz").values()))
    finally:
        group.close()


def run_ranks(size: int, folders: list[Path], run_dir: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    work = [(rank, size, folders, run_dir) for rank in range(size)]
    ranks = [spawn.Process(target=rank_main, args=args, daemon=True) for args in work]  # if one hangs, pytest ends it
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0] * size


@pytest.mark.slow
def test_two_ranks_equal_one_for_every_kind_of_model(tmp_path: Path, run_dir: Path) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("llama_tied_with_biases", {}),
        ("qwen2", {"vocab_size": 129}),  # padded
        ("qwen3", {}),
        ("mistral_window", {"num_key_value_heads": 1}),  # fewer heads than ranks: repeated
    ]
    folders = [tmp_path / name for name, _ in cases]
    for folder, (name, changes) in zip(folders, cases, strict=True):
        model = make_checkpoint(folder, name, **changes)
        np.savez(folder / "want.npz", *reference(model, steps()))
    run_ranks(2, folders, run_dir)


def test_ranks_that_do_not_divide_the_heads_have_places_for_more() -> None:
    program = program_of({"model_type": "llama", **SIZES, "num_attention_heads": 6, "head_dim": 16})
    attention = next(op for op in shard(program, 4).ops if isinstance(op, ops.Attention))
    assert (attention.q.width, attention.k.width) == (2 * 16, 16)


def test_one_rank_alone_changes_nothing() -> None:
    group, x = Group(), torch.ones(2)
    alone = join(group)
    assert alone.all_reduce(x) is x
    assert alone.gather(x) is x
    assert alone.broadcast(x) is x
    assert group.minimum(3) == 3
    alone.close()
    group.close()


# ---- cost ----------------------------------------------------------------------------------------------------------

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
    "max_position_embeddings": 131072,
}  # fmt: skip
LAYER = 4096 * (4096 + 1024 + 1024) + 4096 * 4096 + 2 * 4096 * 14336 + 14336 * 4096
HEAD, NORMS, KV = 128256 * 4096, 65 * 4096, 32 * 2 * 8 * 128 * 2


def of_kind(program: Program, kind: type[ops.Op], load: Load) -> Cost:
    return sum((cost(op, load, lambda w: 16) for op in program.ops if isinstance(op, kind)), Cost())


@pytest.mark.parametrize("rows, context", [(1, 512), (64, 513)])
def test_the_cost_of_a_decode_step_equals_a_hand_count(rows: int, context: int) -> None:
    program, load = program_of(LLAMA_8B), Load.decode(rows, context)
    assert total(program, load).weights == 2 * (32 * LAYER + HEAD + NORMS) + rows * 4096 * 2
    assert total(program, load).cache == rows * (context + 1) * KV
    assert of_kind(program, ops.Linear, load).flops == 2 * rows * (32 * LAYER + HEAD)
    assert of_kind(program, ops.Attention, load).flops == 32 * 4 * 4096 * rows * context
    assert total(PASSES["cpu"](program), load).weights == total(program, load).weights


def test_a_prompt_costs_logits_of_one_row_and_little_of_the_last_layer() -> None:
    program, load = program_of(LLAMA_8B), Load.prefill(2048)
    assert of_kind(program, ops.Linear, load).flops == 2 * 2048 * 32 * LAYER + 2 * HEAD
    saved = 4096 * 4096 + 3 * 4096 * 14336  # all of the last layer but its qkv
    early = of_kind(passes.take_rows_early(program), ops.Linear, load).flops
    assert early == 2 * 2048 * (32 * LAYER - saved) + 2 * saved + 2 * HEAD


@pytest.mark.parametrize("tokens, context", [(1, 3), (1, 9), (4, 4), (7, 12), (9, 9), (2, 20)])
def test_a_layer_with_a_window_costs_what_its_queries_read(tokens: int, context: int) -> None:
    window, rows = 5, 3
    first = context - tokens
    seen = [range(max(0, p + 1 - window), p + 1) for p in range(first, context)]
    every = [range(p + 1) for p in range(first, context)]
    load = Load(rows * tokens, rows, rows * context, rows * sum(map(len, every)))
    assert load.within(0) == (rows * context, rows * sum(map(len, every)))
    assert load.within(window) == (rows * len(set().union(*seen)), rows * sum(map(len, seen)))
    mistral = LLAMA_8B | {"model_type": "mistral", "sliding_window": window}
    found = of_kind(program_of(mistral), ops.Attention, load)
    assert found.flops == 32 * 4 * 4096 * load.within(window)[1]
    assert found.cache == (load.within(window)[0] + load.tokens) * KV


def test_two_ranks_halve_all_but_the_norms() -> None:
    one, two, load = program_of(LLAMA_8B), shard(program_of(LLAMA_8B), 2), Load.decode(1, 512)
    assert of_kind(two, ops.Linear, load).weights * 2 == of_kind(one, ops.Linear, load).weights
    assert total(two, load).cache * 2 == total(one, load).cache
    assert sum(isinstance(op, ops.AllReduce) for op in two.ops) == 65
    assert cache_layout(two)[0] == (0, (("key", 4, 128), ("value", 4, 128)), 0)


# ---- buffers -------------------------------------------------------------------------------------------------------


def size_of(buffer: Buffer) -> int:
    return buffer.width * 4 * (100 if buffer.rows == "tokens" else 7)


@pytest.mark.parametrize("late", [lambda op: False, lambda op: isinstance(op, ops.Norm)])
def test_no_two_live_buffers_overlap(case: tuple[Path, Any], late: Callable[[ops.Op], bool]) -> None:
    program = PASSES["cpu"](program_of(open_checkpoint(local_source(case[0])).config))
    plan = plan_buffers(program, size_of, late)
    replay(program, plan, late)
    assert plan.size < 0.5 * plan.naive


def replay(program: Program, plan: Plan, late: Callable[[ops.Op], bool]) -> None:
    """Check buffers by a second method: record the writer of each place, and check that values read are still there."""
    owner: dict[int, int] = {}
    specs: dict[int, Buffer] = {}
    stale: list[tuple[int, int]] = []  # places read since the last barrier
    for op in program.ops:
        for v in op.reads().values():
            assert v.spec.dtype == "ids" or owner[plan.offsets[v.buffer]] == v.buffer
        for v in op.results().values():
            start, specs[v.buffer] = plan.offsets[v.buffer], v.spec
            end = start + size_of(v.spec)
            assert all(end <= a or start >= b for a, b in stale)
            owner = {s: b for s, b in owner.items() if s + size_of(specs[b]) <= start or s >= end} | {start: v.buffer}
        reads = [v for v in op.reads().values() if v.spec.dtype != "ids"] if late(op) else []
        stale = [(plan.offsets[v.buffer], plan.offsets[v.buffer] + size_of(v.spec)) for v in reads]


@pytest.mark.parametrize("summed", [True, False])
def test_what_a_late_norm_reads_is_not_written_over_by_the_next_operation(summed: bool) -> None:
    tape = Tape()
    ids = tape.new("tokens", 64, "ids")
    x = tape.record(ops.Act, "tokens", 64, x=ids, act="relu")
    y = tape.record(ops.Norm, "tokens", 64, x=x, weight=ops.Weight((ops.Part("n", 64),)), eps=1e-5)
    product = ops.Weight((ops.Part("l", 64),), 64)
    z = tape.record(ops.Linear, "tokens", 64, x=y, weight=product, residual=x if summed else None)
    program = Program(tuple(tape.ops), Inputs(ids, ids), {"logits": z})
    for late in (False, True):
        offsets = plan_buffers(program, lambda b: 64, lambda op, late=late: late and isinstance(op, ops.Norm)).offsets
        assert (offsets[z.buffer] != offsets[x.buffer]) == late


# ---- operations that no model uses yet -----------------------------------------------------------------------------


def test_soft_caps_layer_norms_and_activations_equal_their_formulas() -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "e.weight": rng.normal(size=(128, 32)),
        "n.weight": rng.normal(size=32),
        "n.bias": rng.normal(size=32),
    }
    scope = Scope()

    def model(inputs: Inputs) -> Value:
        table = ops.Weight((ops.Part("e.weight", 128),), 32, table=True)
        x = inputs.ids.record(ops.Embed, 32, ids=inputs.ids, table=table, scale=2.0)
        x = act(LayerNorm(scope / "n", 32, 1e-5)(x), "gelu_pytorch_tanh")
        x = attend(x, *x.split(16, 16), layer=0, head_dim=8, scale=3.0, window=5, softcap=1.5)
        return soft_cap(x.record(ops.TakeRows, rows="samples", x=x), 0.3)

    backend = Driver(record(model), Arrays(arrays))
    ids = prompts()[2]
    got = backend.feed([(0, ids)])[0]
    x = torch.tensor(arrays["e.weight"][ids] * 2.0).float()
    w, b = (torch.tensor(arrays[name]).float() for name in ("n.weight", "n.bias"))
    x = torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, (32,), w, b), approximate="tanh")
    q, k, v = x[-1].view(4, 8), x[-5:, :16].reshape(5, 2, 8), x[-5:, 16:].reshape(5, 2, 8)
    heads = []
    for h in range(4):
        scores = 1.5 * torch.tanh(k[:, h // 2] @ q[h] * 3.0 / 1.5)
        heads.append(scores.softmax(0) @ v[:, h // 2])
    np.testing.assert_allclose(got, 0.3 * torch.tanh(torch.cat(heads) / 0.3).numpy(), rtol=1e-4, atol=1e-5)
