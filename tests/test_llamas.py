"""Llama-like architectures: defaults of their classes, forms of their config.json, refusals."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from support_models import SIZES, YARN

from tokenmill import plugins
from tokenmill.errors import StartError
from tokenmill.models import llama
from tokenmill.models.base import config_of, program_of
from tokenmill.program import ops

torch.set_num_threads(1)
TYPES = (
    "apertus", "arcee", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite", "helium",
    "hunyuan_v1_dense", "ministral", "ministral3", "olmo", "olmo2", "olmo3", "seed_oss", "smollm3", "afmoe", "cwm",
    "exaone_moe", "flex_olmo", "granite_swa", "granitemoe_swa", "hyperclovax", "jais2", "llama4_text", "nanochat",
    "sarvam_moe", "vaultgemma",
)  # fmt: skip
OF_ROPE = {"rope_theta", "rope_scaling", "rope_local_base_freq", "rope_local_scaling", "partial_rotary_factor"}


def windows(program: Any) -> list[int]:
    return [op.window for op in program.ops if isinstance(op, ops.Attention)]


def rotations(program: Any) -> list[Any]:
    """Return the rotary table of each layer's keys; None for a layer without one."""
    made = {op.out.buffer: op for op in program.ops}
    found = [made[op.k.buffer] for op in program.ops if isinstance(op, ops.Attention)]
    return [op.rope if isinstance(op, ops.Rope) else None for op in found]


@pytest.mark.parametrize("model_type", TYPES)
def test_the_defaults_are_those_of_transformers_class(model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    ours, theirs = config_of({"model_type": model_type}), CONFIG_MAPPING[model_type]()
    assert isinstance(ours, llama.Config)
    compared = 0
    for field in msgspec.structs.fields(plugins.find("models", model_type).Config):
        name = field.encode_name
        if name in OF_ROPE or not hasattr(theirs, name) or getattr(ours, field.name) is None:
            continue
        assert getattr(ours, field.name) == getattr(theirs, name), name
        compared += 1
    assert compared > 8
    rope = theirs.rope_parameters
    whole = rope.get("full_attention", rope)
    table = ours.rope.table
    assert (table.theta, table.kind) == (whole["rope_theta"], whole["rope_type"])
    assert table.rotary_dim == int(ours.head_size * whole.get("partial_rotary_factor", 1.0))
    if "sliding_attention" in rope:
        local = next(ours.rope_of(i) for i in range(ours.num_hidden_layers) if ours.window(i))
        assert local is not None
        assert local.table.theta == rope["sliding_attention"]["rope_theta"]
    kinds = getattr(theirs, "layer_types", None) or ["full_attention"] * theirs.num_hidden_layers
    window = getattr(theirs, "sliding_window", None) or 0
    assert [ours.window(i) for i in range(ours.num_hidden_layers)] == [
        window if kind == "sliding_attention" else 0 for kind in kinds
    ]


def test_one_rotation_for_each_kind_of_layer_is_read_in_both_versions_forms() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    gemma = {"model_type": "gemma3_text", **SIZES, "head_dim": 16, "num_hidden_layers": 6, "sliding_window": 8}
    old = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": linear}
    kinds = {"full_attention": {"rope_theta": 5e5, **linear}, "sliding_attention": {"rope_theta": 2e4}}
    programs = [program_of(gemma | form) for form in (old, {"rope_parameters": kinds})]
    assert [[table.theta for table in rotations(p)] for p in programs] == [[2e4] * 5 + [5e5]] * 2
    assert [[table.kind for table in rotations(p)] for p in programs] == [["default"] * 5 + ["linear"]] * 2
    olmo = {"model_type": "olmo3", **SIZES, "num_hidden_layers": 4, "sliding_window": 8, "rope_theta": 7e5}
    made = rotations(program_of(olmo | {"rope_scaling": YARN}))
    assert [(table.theta, table.kind) for table in made] == [(7e5, "default")] * 3 + [(7e5, "yarn")]


def test_a_gemma_3_of_stated_length_is_not_stretched_by_its_factor() -> None:
    config = {"model_type": "gemma3_text", **SIZES, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert config_of(config).max_positions == SIZES["max_position_embeddings"]


def test_layers_without_rotation_or_window_are_those_that_the_configuration_names() -> None:
    smollm3 = {"model_type": "smollm3", **SIZES, "num_hidden_layers": 4}
    assert [table is None for table in rotations(program_of(smollm3))] == [False, False, False, True]
    named = smollm3 | {"no_rope_layers": [0, 1, 1, 0]}
    assert [table is None for table in rotations(program_of(named))] == [True, False, False, True]
    exaone = {"model_type": "exaone4", **SIZES, "num_hidden_layers": 5, "sliding_window": 8}
    for pattern in (4, "LLLG"):
        program = program_of(exaone | {"sliding_window_pattern": pattern})
        assert windows(program)[:4] == [8, 8, 8, 0]
        assert [table is None for table in rotations(program)][:4] == [False, False, False, True]
    whole = program_of(exaone | {"sliding_window": None, "sliding_window_pattern": None})
    assert windows(whole) == [0] * 5
    assert None not in rotations(whole)


def test_the_first_gemmas_name_an_approximation_gelu() -> None:
    for name in ("gelu", "gelu_pytorch_tanh"):
        assert config_of({"model_type": "gemma", "hidden_act": name}).act == "gelu_pytorch_tanh"


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model_type": "gemma2", "sliding_window": None}, "`sliding_window` is null"),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention"]}, "1 layer_types for 3 layers"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "reads it forward only"),
        ({"model_type": "gemma2", "final_logit_softcapping": 0}, "final_logit_softcapping"),
        ({"model_type": "gemma", "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "of one kind for all"),
        ({"model_type": "ministral", "sliding_window": None, "layer_types": ["sliding_attention"] * 3}, "is null"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "1 no_rope_layers for 3 layers"),
        ({"model_type": "smollm3", "layer_types": ["sliding_attention"] * 3, "sliding_window": 8}, "no window is used"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling"),
        ({"model_type": "olmo", "clip_qkv": -1.0}, "clip_qkv"),
        ({"model_type": "helium", "head_dim": 32}, "4 heads of 32 columns for hidden_size 64"),
        ({"model_type": "ministral3", "rope_parameters": {"rope_theta": 1e6, **YARN}}, "llama_4_scaling_beta"),
        ({"model_type": "hunyuan_v1_dense", "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": -1}}, "alpha"),
        ({"model_type": "apertus", "hidden_act": "silu"}, "hidden_act"),
        ({"model_type": "glm", "rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "'ntk' is not supported"),
    ],
)
def test_a_config_that_no_backend_computes_is_refused_with_its_field(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(StartError) as found:
        program_of({**SIZES, **fields})
    assert words in str(found.value)
