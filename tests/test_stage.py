"""Programs of pipeline stages: where they are cut, and the logits of stages on threads, with real transports."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import support_cuda
import torch
from support_cuda import write_random
from support_encoded import SIZES as ENCODED
from support_meeting import Meeting, Rank
from support_models import FAMILIES, Driver, steps
from support_ranks import logits_of_stages, run_threads
from support_states import STATES
from test_program import LLAMA_8B

from tokenmill.backends.steps import cache_plan
from tokenmill.errors import ArgumentError, Unsupported
from tokenmill.models.base import program_of
from tokenmill.parallel.mesh import Mesh
from tokenmill.program import ops
from tokenmill.program.cost import Load, cache_layout, cost, weights_of
from tokenmill.program.stage import Receive, Send, stage
from tokenmill.program.value import Program
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source

torch.set_num_threads(1)
GEMMA_27B = {
    "model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62,
    "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "vocab_size": 262208,
    "sliding_window": 1024, "max_position_embeddings": 131072,
    "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(62)],
}  # fmt: skip


def weight_bytes(program: Program) -> float:
    return sum(cost(op, Load.decode(1, 1), lambda w: 16).weights for op in program.ops)


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_stages_have_about_the_same_weights_and_exchange_the_residual_alone(count: int) -> None:
    whole = program_of(LLAMA_8B)
    stages = [stage(whole, i, count) for i in range(count)]
    sizes = [weight_bytes(part) for part in stages]
    assert sum(sizes) == pytest.approx(weight_bytes(whole), rel=1e-6)
    assert max(sizes) < 1.12 * sum(sizes) / count
    for i, part in enumerate(stages):
        received, sent = ([op for op in part.ops if isinstance(op, kind)] for kind in (Receive, Send))
        assert [op.out.width for op in received] == ([4096] if i else [])
        assert [op.x.width for op in sent] == ([4096] if i < count - 1 else [])
        assert any(isinstance(op, ops.Embed) for op in part.ops) == (i == 0)
        assert part.samples == (i == count - 1)
    assert sorted(layer for part in stages for layer in cache_layout(part)) == list(range(32))


def test_each_stage_reads_its_own_copy_of_a_tied_matrix() -> None:
    program = program_of({**LLAMA_8B, "tie_word_embeddings": True})
    first, last = (stage(program, i, 2) for i in range(2))
    assert "model.embed_tokens.weight" in {w.name for w in weights_of(first)} & {w.name for w in weights_of(last)}


def test_one_stage_is_the_whole_program() -> None:
    program = program_of(LLAMA_8B)
    assert stage(program, 0, 1) is program


def test_more_stages_than_layers_are_refused_with_the_most() -> None:
    program = program_of({**LLAMA_8B, "num_hidden_layers": 3})
    assert len(cache_layout(stage(program, 2, 3))) == 1
    with pytest.raises(ArgumentError, match=r"pipeline-parallel-size is 4, .* Allowed: 1 to 3\."):
        stage(program, 0, 4)


def test_an_encoder_and_a_decoder_are_not_cut() -> None:
    with pytest.raises(Unsupported, match=r"encoder and a decoder.*pipeline-parallel-size"):
        stage(program_of({"model_type": "t5", "decoder_start_token_id": 0, **ENCODED}), 0, 2)


@pytest.mark.parametrize("count", [2, 3])
def test_all_stages_have_the_same_block_tables_with_an_equal_share_of_the_layers(count: int) -> None:
    whole = program_of(GEMMA_27B)
    model = cache_plan(cache_layout(whole), 32768)
    plans = [cache_plan(cache_layout(stage(whole, i, count)), 32768, cache_layout(whole)) for i in range(count)]
    assert {plan.windows for plan in plans} == {model.windows}
    assert sorted(layer for plan in plans for layer in plan.places) == list(range(62))
    table_of = [{layer: plan.table(layer) for layer in plan.places} for plan in plans]
    windows = {layer: model.windows[table] for tables in table_of for layer, table in tables.items()}
    assert windows == {layer: 0 if layer % 6 == 5 else 1024 for layer in range(62)}
    assert max(len(plan.parts) for plan in plans) <= len(model.parts) / count + 2
    for plan in plans:
        assert len(set(plan.places.values())) == len(plan.places), "no two layers share a part of a table"


CASES = [
    ("llama_tied_with_biases", 3),
    ("mixtral", 2),
    ("gemma3_text", 2),  # a table for each window
    ("gemma3n_text", 2),  # several streams, inputs by layer, and layers that share a cache
    ("deepseek_v3", 2),  # compressed rows
    ("lfm2", 2),  # states
    pytest.param("gemma4_text", 3, marks=pytest.mark.slow),
    pytest.param("gpt2", 2, marks=pytest.mark.slow),  # positions are embedded
    pytest.param("qwen3_next", 2, marks=pytest.mark.slow),
    pytest.param("cohere2", 3, marks=pytest.mark.slow),
    pytest.param("mamba2", 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, count", CASES)
def test_stages_have_the_logits_of_the_whole_model(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support_cuda, "FAMILIES", FAMILIES | STATES)
    write_random(tmp_path, name)
    source = open_checkpoint(local_source(tmp_path))
    program = program_of(source.config)
    driver = Driver(program, source)
    wanted = [driver.feed(rows) for rows in steps()]
    driver.close()
    (found,) = logits_of_stages(program, source, count, steps())
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_stage_that_waits_for_another_can_be_closed(tmp_path: Path) -> None:
    write_random(tmp_path, "llama", num_hidden_layers=2)
    source = open_checkpoint(local_source(tmp_path))
    program = program_of(source.config)
    meeting, made = Meeting(2), dict[int, Driver]()

    def make(rank: int) -> None:
        mesh = Mesh.of(Rank(rank, meeting), 2)
        made[rank] = Driver(stage(program, rank, 2), source, group=mesh.tensor, mesh=mesh)

    run_threads(make, 2)
    step = made[1].run(made[1].inputs([(0, [1, 2])]))
    closing = threading.Thread(target=made[1].close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    with pytest.raises((ConnectionError, OSError)):
        step.result()
    made[0].close()
