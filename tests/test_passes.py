"""Every pass preserves the numbers of random programs, and changes many of these programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support_cpu import CpuDriver
from support_programs import VOCABULARY, WIDTH, Arrays, Draw, logits_of, same, steps
from support_ranks import of_ranks
from support_states import Layers

from tokenmill.backends.cpu import prepare
from tokenmill.errors import Unsupported
from tokenmill.program import ops, passes
from tokenmill.program.rope import RopeTable
from tokenmill.program.shard import shard
from tokenmill.program.value import Inputs, Program, Value, record

torch.set_num_threads(1)
SEEDS = 48
Rewrite = Callable[[Program], Program]


def fusing(*fusions: passes.Fusion) -> Rewrite:
    return lambda program: passes.fuse(program, *fusions)


FUSIONS = {
    "residual into linear": passes.residual_into_linear,
    "act into linear": passes.act_into_linear,
    "heads into attention": passes.heads_into_attention,
    "add into norm": passes.add_into_norm,
}
PASSES: dict[str, Rewrite] = {
    **{name: fusing(fusion) for name, fusion in FUSIONS.items()},
    "rows early": passes.take_rows_early,
    "twice": fusing(*FUSIONS.values(), *FUSIONS.values()),
    "a CPU's": lambda p: passes.fuse(
        passes.take_rows_early(p), passes.residual_into_linear, passes.act_into_linear, passes.heads_into_attention
    ),
    "a GPU's": lambda p: passes.fuse(passes.take_rows_early(p), passes.add_into_norm, passes.heads_into_attention),
    "rows late": lambda p: passes.take_rows_early(passes.fuse(p, *FUSIONS.values())),
}


@pytest.fixture(scope="module")
def drawn() -> list[tuple[int, Program, Arrays, list[np.ndarray]]]:
    found = []
    for seed in range(SEEDS):
        draw = Draw(seed)
        program = draw.program()
        found.append((seed, program, draw.source(), logits_of(program, draw.source())))
    return found


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_leaves_the_numbers_of_any_program_as_they_were(name: str, drawn: Any) -> None:
    applied = 0
    for seed, program, source, want in drawn:
        after = PASSES[name](program)
        if after.ops != program.ops:
            applied += 1
            assert same(logits_of(after, source), want), f"seed {seed}\n{program}\n--- after\n{after}"
    assert applied >= SEEDS // 10, "the pass found next to nothing: the draws do not try it"


def test_a_fusion_is_refused_as_well_as_applied_in_the_draws(drawn: Any) -> None:
    """A fusion that is never refused is not tested: each must meet operations to apply to and operations to refuse."""
    taken: Counter[str] = Counter()
    left: Counter[str] = Counter()
    kinds = {"residual into linear": ops.Add, "act into linear": ops.GatedAct | ops.Act,
             "heads into attention": ops.Attention, "add into norm": ops.Norm}  # fmt: skip
    for _, program, _, _ in drawn:
        graph = passes.Graph.of(program)
        for name, fusion in FUSIONS.items():
            for op in program.ops:
                if isinstance(op, kinds[name]):
                    (taken if fusion(op, graph) else left)[name] += 1
    assert all(taken[name] >= 10 and left[name] >= 5 for name in FUSIONS), (taken, left)


def test_int8_inputs_are_equal_whichever_operation_writes_them(drawn: Any) -> None:
    """Compare with the simplest way: a separate Quantize before every product with an int8 input."""

    def wants(op: ops.Linear) -> bool:
        return op.x.width % 32 == 0 and op.x.start % 32 == 0

    def plainest(program: Program) -> Program:
        tape = program.tape()
        for op in program.ops:
            if isinstance(op, ops.Linear) and wants(op):
                x = tape.new(op.x.spec.rows, op.x.width, "int8")
                tape.ops.append(ops.Quantize(x=op.x, out=x))
                op = replace(op, x=x)
            tape.ops.append(op)
        return replace(program, ops=tuple(tape.ops))

    saved = 0
    for seed, program, source, _ in drawn[::3]:
        for fused in (program, PASSES["a CPU's"](program), PASSES["a GPU's"](program)):
            after = passes.quantize_inputs(fused, wants, lambda op: isinstance(op, ops.Norm | ops.Linear))
            want = plainest(fused)
            saved += len(want.ops) - len(after.ops)
            assert same(logits_of(after, source), logits_of(want, source)), f"seed {seed}\n{fused}\n--- after\n{after}"
    assert saved > SEEDS // 3


def test_the_cpu_backend_computes_a_drawn_program_or_refuses_it(drawn: Any) -> None:
    """A kernel that ignores an attribute would be silently wrong: each program is refused or equals torch."""
    refused: Counter[str] = Counter()
    for seed, program, source, want in drawn[::2]:
        if why := prepare.refusal(program, 16):
            refused[why] += 1
            continue
        backend = CpuDriver(source, program=program)  # type: ignore[arg-type]
        got = [backend.feed(rows) for rows in steps()]
        backend.close()
        message = f"seed {seed}\n{program}\n--- lowered\n{backend.program}"
        assert same(got, want, 3e-3), message  # its activations are approximations
    assert refused.total() < len(drawn[::2]) * 0.9, refused


def test_an_activation_behind_a_convolution_is_part_of_it() -> None:
    drawn = Layers("conv")
    program = drawn.program()
    fused = passes.fuse(program, passes.act_into_conv)
    assert len(fused.ops) == len(program.ops) - 1
    assert same(logits_of(fused, drawn.source()), logits_of(program, drawn.source()))


def test_rows_that_something_later_needs_are_not_left_out() -> None:
    """An output of all tokens, such as a hidden state, keeps the rows that do not sample."""
    program = Draw(2).program()
    take = next(i for i, op in enumerate(program.ops) if isinstance(op, ops.TakeRows))
    assert passes.take_rows_early(program).ops != program.ops
    hidden = replace(program, outputs={"logits": program.logits, "hidden": program.ops[take].reads()["x"]})
    assert passes.take_rows_early(hidden) is hidden


# ---- ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_give_the_numbers_of_one(size: int) -> None:
    for seed in range(10):
        draw = Draw(1000 + seed, plain=True)
        program = draw.program()
        want = logits_of(program, draw.source())
        for got in of_ranks(program, draw.source(), size, steps()):
            assert same(got, want), f"seed {seed}, {size} ranks\n{program}\n--- one rank's\n{shard(program, size)}"


def test_a_layer_norm_across_what_ranks_share_is_refused_by_name() -> None:
    """Its mean needs another sum over the ranks, which no pass inserts: it must not give wrong numbers."""
    draw = Draw(0, plain=True)
    draw._heads = lambda q, k: (draw.norm(q, center=True), draw.norm(k))  # type: ignore[method-assign]
    draw.chance = lambda share: share >= 0.5  # type: ignore[method-assign]
    with pytest.raises(Unsupported, match="operation on the whole row"):
        shard(draw.program(), 2)


def heads_of_sizes(draw: Draw, *sizes: tuple[int, int, int]) -> Program:
    """Return a program of a layer for each (columns of a head, key-value heads, window)."""

    def model(inputs: Inputs) -> Value:
        table = draw.weight(VOCABULARY, WIDTH, table=True)
        x = inputs.ids.record(ops.Embed, WIDTH, ids=inputs.ids, table=table)
        for layer, (size, shared, window) in enumerate(sizes):
            q, k, v = draw.linear(draw.norm(x), 4 * size, shared * size, shared * size)
            q, k = (y.record(ops.Rope, x=y, rope=RopeTable.of(size, 1e4, 256, None), head_dim=size) for y in (q, k))
            fields: dict[str, Any] = {"q": q, "k": k, "v": v, "layer": layer, "scale": size**-0.5, "window": window}
            x = x + draw.linear(q.record(ops.Attention, 4 * size, head_dim=size, **fields), WIDTH)[0]
        return draw.linear(x.record(ops.TakeRows, rows="samples", x=x), VOCABULARY)[0]

    return record(model)


@pytest.mark.parametrize("sizes", [[(16, 2, 5), (32, 2, 0), (16, 2, 5)], [(32, 4, 0), (16, 1, 9)]])
def test_layers_may_have_caches_of_different_sizes(sizes: list[tuple[int, int, int]]) -> None:
    draw = Draw(5)
    program = heads_of_sizes(draw, *sizes)
    backend = CpuDriver(draw.source(), program=program)  # type: ignore[arg-type]
    got = [backend.feed(rows) for rows in steps()]
    backend.close()
    assert same(got, logits_of(program, draw.source()), 3e-3)
