"""States by slot on the CPU: batch-invariant, begun at zero, rewound, counted; and the kernels' own refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_cpu import CpuDriver
from support_models import prompts, reference
from support_programs import VOCABULARY, WIDTH, Arrays, Draw, logits_of, same, steps
from support_slow import mostly_slow
from test_states import around, greedy, made

from tokenmill.backends.base import StepInputs, StepLimits
from tokenmill.backends.cpu.explain import kernels_of
from tokenmill.backends.cpu.isa import available
from tokenmill.backends.cpu.prepare import refusal
from tokenmill.models.base import program_of
from tokenmill.program import ops
from tokenmill.program.value import Inputs, Program, Value, record
from tokenmill.quant.base import reader_of
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import StoppingParams

torch.set_num_threads(1)
KINDS = ("mamba", "mamba2", "lfm2", "qwen3_5", "recurrent_gemma", "kimi_linear")
"""A family of each kind of operation."""


@pytest.mark.parametrize("family", KINDS)
def test_no_bit_depends_on_chunks_batch_or_threads(family: str, tmp_path: Path) -> None:
    made(tmp_path, family)
    ids = [np.random.default_rng(i).integers(0, 128, 70).tolist() for i in range(3)]
    whole, pieces = CpuDriver.of(tmp_path, cpu_threads=1), CpuDriver.of(tmp_path, cpu_threads=3)
    want = [whole.feed([(slot, ids[slot])])[0] for slot in range(3)]
    cuts = [0, 1, 18, 20, 21, 53, 69, 70]
    for a, b in pairwise(cuts):
        got = pieces.feed([(slot, ids[slot][a:b]) for slot in (2, 0, 1)])
    np.testing.assert_array_equal(got, [want[2], want[0], want[1]])
    for slot in range(3):
        pieces.feed([(slot, [5])])
    np.testing.assert_array_equal(whole.feed([(0, [5]), (2, [5, 6])])[1], pieces.feed([(2, [6])])[0])
    whole.close(), pieces.close()


@pytest.mark.parametrize("family", KINDS)
def test_a_slot_begins_at_zero_whatever_was_in_it_and_a_position_is_computed_again(family: str, tmp_path: Path) -> None:
    model = made(tmp_path, family)
    backend = CpuDriver.of(tmp_path)
    for array in backend._memory.states._arrays.values():
        array.fill(np.nan)
    ids, seen = prompts()[0], list[int]()
    backend.feed([(0, ids), (1, [3])])
    for token, again in ((7, 8), (9, 3), (11, 2)):
        seen.append(again)
        for token_id in (token, again):
            got = backend.feed([(0, [token_id])])
            if token_id == token:
                backend.known[0].pop()
        (want,) = reference(model, [[(0, ids + seen)]])
        assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()
    backend.forget(0)
    again = backend.feed([(0, ids + seen)])
    assert np.abs(again - want).max() < 1e-3 * np.abs(want).max()
    backend.close()


def test_a_row_whose_state_is_lost_is_an_error_and_warming_up_leaves_no_trace(tmp_path: Path) -> None:
    made(tmp_path, "recurrent_gemma")
    cold, warm = CpuDriver.of(tmp_path), CpuDriver.of(tmp_path)
    warm.warm_up()
    assert not any(array.any() for array in warm._memory.states._arrays.values())
    for rows in ([(0, [1, 2, 3]), (1, [4])], [(1, [4, 7])]):
        np.testing.assert_array_equal(cold.feed(list(rows)), warm.feed(list(rows)))
    for slot, start, count in ((0, 1, 1), (0, 5, 1), (1, 2, 2), (2, 1, 1)):
        one = [np.array([n], np.int32) for n in (slot, start, count, 0)]
        with pytest.raises(RuntimeError, match=f"slot {slot} has no state after {start} tokens"):
            warm.run(StepInputs(*one)).result()
    cold.close(), warm.close()


def test_the_bytes_of_the_states_are_part_of_the_plan(tmp_path: Path) -> None:
    made(tmp_path, "mamba2")
    few, many = (CpuDriver.of(tmp_path, limits=StepLimits(256, n, 256, 16)) for n in (4, 5))
    state = 2 * 2 * 4 * (3 * (64 + 2 * 2 * 8) + 8 * 8 * 8)  # ring, layers, bytes, (convolution, scan)
    assert few._memory.states.nbytes == sum(a.nbytes for a in few._memory.states._arrays.values()) == 4 * state
    assert many.step_bytes() - few.step_bytes() >= state
    assert few.block_bytes() == 0
    few.close(), many.close()


@pytest.mark.parametrize("family", ["mamba2", "qwen3_5"])
def test_chunked_and_preempted_sequences_get_transformers_greedy_text(family: str, tmp_path: Path) -> None:
    model, rng = made(tmp_path, family), np.random.default_rng(1)
    asked = [rng.integers(0, 128, rng.integers(1, 30)).tolist() for _ in range(8)]
    backend = CpuDriver.of(tmp_path, limits=StepLimits(11, 5, 64, 16), num_blocks=7)
    with around(backend, 7) as engine:
        ids = [engine.submit(p, None, StoppingParams(20)) for p in asked]
        found = [[t for o in engine.outputs(i) for t in o.token_ids] for i in ids]
        assert engine.stats.preemptions > 0
    assert found == [greedy(model, p, tokens) for p, tokens in zip(asked, found, strict=True)]


@pytest.mark.parametrize("family", ["jamba", "qwen3_5", "recurrent_gemma", "kimi_linear"])
def test_the_kernels_of_a_model_are_known_without_its_weights(family: str, tmp_path: Path) -> None:
    made(tmp_path, family)
    source = open_checkpoint(local_source(tmp_path))
    backend = CpuDriver(source)
    kinds = kernels_of(program_of(source.config), source, reader_of(source, ""), backend.isa, "f16")
    assert {name for kernels in kinds.values() for name in kernels} == {line.kernel for line in backend._lines}
    backend.close()


# ---- every attribute of the operations ----


def layer(kind: str, seed: int) -> tuple[Program, Arrays]:
    """Return a program of one operation of a kind that `Draw` can make, on embeddings."""
    draw = Draw(seed)

    def model(inputs: Inputs) -> Value:
        table = draw.weight(VOCABULARY, WIDTH, table=True)
        x = inputs.ids.record(ops.Embed, WIDTH, ids=inputs.ids, table=table)
        y = getattr(draw, kind)(x, *([] if kind in ("_special", "_experts") else [0]))
        return draw.linear(y.record(ops.TakeRows, rows="samples", x=y), VOCABULARY)[0]

    return record(model), draw.source()


ISAS = [isa.name for isa in available()[:: max(1, len(available()) - 1)]]
"""The best of this machine, and the simplest."""


@pytest.mark.parametrize("isa", mostly_slow(ISAS, ISAS[:1]))
@pytest.mark.parametrize("kind", ["_convolution", "_scan", "_delta", "_unit", "_latent", "_special", "_experts"])
def test_each_attribute_of_an_operation_equals_torch_or_is_refused(kind: str, isa: str) -> None:
    compared = 0
    for seed in range(10):
        program, source = layer(kind, seed)
        if refusal(program, 16):
            continue
        want, backend = logits_of(program, source), CpuDriver(source, program=program, cpu_isa=isa)  # type: ignore[arg-type]
        got, compared = [backend.feed(rows) for rows in steps()], compared + 1
        backend.close()
        assert same(got, want, 3e-3 if kind == "_latent" else 2e-5), f"seed {seed}\n{program}"
    assert compared >= 4


@pytest.mark.parametrize(
    "kind, fields, why",
    [
        ("_delta", {"head_dim": 8}, "heads of a multiple of 16 columns, not 8 and"),
        ("_scan", {"groups": 10}, "its scans are for groups of a multiple of 16 columns, not"),
        ("_latent", {"value_dim": 12}, "values are of multiples of 16 columns, not 16, "),
    ],
)
def test_what_the_kernels_lack_is_refused_by_name(kind: str, fields: dict[str, Any], why: str) -> None:
    program, _ = layer(kind, 0)
    changed = tuple(replace(op, **fields) if op.state() or op.keeps() else op for op in program.ops)
    assert why in refusal(replace(program, ops=changed), 16)
