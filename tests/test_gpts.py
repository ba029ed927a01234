"""GPT-like architectures: defaults of their classes, names in published files, refusals, layouts of fused matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support_models import FAMILIES, SIZES, Driver, make_checkpoint, reference, steps

from tokenmill import plugins
from tokenmill.errors import ModelError, StartError
from tokenmill.layers.attention import alibi_slopes
from tokenmill.models import _gpt
from tokenmill.models._aliases import ALIASES
from tokenmill.models.base import config_of, program_of
from tokenmill.program.ops import Part

torch.set_num_threads(1)
TYPES = sorted(
    {
        kind
        for kind, _ in FAMILIES.values()
        if kind not in ALIASES and issubclass(plugins.find("models", kind).Config, _gpt.Config)
    }
)
NUMBERS = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 24, "max_position_embeddings": 64}
OF_ROPE = {"rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base", "partial_rotary_factor"}
OURS = {"dtype", "seq_length", "n_embed", "attn_config", "ffn_config", "sliding_window_pattern"}  # not of the class


def their_default(model_type: str) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]()


@pytest.mark.parametrize("model_type", TYPES)
def test_the_defaults_are_those_of_transformers_class(model_type: str) -> None:
    config, theirs = config_of({"model_type": model_type}), their_default(model_type)
    fields = [f for f in msgspec.structs.fields(type(config)) if f.encode_name not in OF_ROPE | OURS]
    for field in fields:
        default = getattr(theirs, field.encode_name, None)  # None: its layers do not have it
        assert getattr(config, field.name) in (default, None), field.encode_name
    shared = 1 if getattr(theirs, "multi_query", False) else None
    assert (config.kv_heads, config.head_size) == (
        shared or getattr(theirs, "num_key_value_heads", None) or config.num_attention_heads,
        getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
    )
    rope = getattr(theirs, "rope_parameters", None)
    if rope and config.rope is not None:
        share = rope.get("partial_rotary_factor") or 1.0
        assert config.rope.table.theta == rope["rope_theta"]
        assert config.rope.table.rotary_dim == int(config.head_size * share)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_field_may_have_the_general_name_that_transformers_class_maps_to_it(model_type: str) -> None:
    kind = plugins.find("models", model_type).Config
    names = {f.name: f.encode_name for f in msgspec.structs.fields(kind)}
    theirs = type(their_default(model_type)).attribute_map
    assert {name: names[name] for name in kind.mapped} == theirs
    for name, old in theirs.items():  # as in bloom-560m's file; with both names the general one wins
        config = {"model_type": model_type, "rotary_dim": 2, "hidden_size": 64, "num_attention_heads": 8}
        config |= {name: NUMBERS[name], old: 4096}
        assert getattr(config_of(config), name) == NUMBERS[name]


@pytest.mark.parametrize("model_type", TYPES)
def test_a_null_length_is_refused_by_every_type(model_type: str) -> None:
    (name,) = (
        field.encode_name
        for field in msgspec.structs.fields(plugins.find("models", model_type).Config)
        if field.name == "max_position_embeddings"
    )
    with pytest.raises(StartError, match="null; give a number"):
        config_of({"model_type": model_type, name: None})


@pytest.mark.parametrize(
    "family, prefix",
    [("gpt2", "transformer."), ("bloom", "transformer."), ("gpt_neox", "gpt_neox."), ("opt", "model.")],
)
def test_files_without_the_whole_models_prefix_and_with_old_masks_are_read(
    tmp_path: Path, family: str, prefix: str
) -> None:
    model = make_checkpoint(tmp_path, family)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}
    layers = {"gpt_neox": "layers", "opt": "decoder.layers"}.get(family, "h")
    masks = {f"{layers}.0.attn.bias": np.ones((1, 1, 8, 8), np.uint8), f"{layers}.1.attention.masked_bias": np.ones(1)}
    save_file(tensors | masks, file)
    backend = Driver.of(tmp_path)
    rows = steps()[0]
    np.testing.assert_allclose(backend.feed(rows), reference(model, [rows])[0], rtol=1e-4, atol=1e-4)


def test_a_fused_matrix_of_other_heads_is_refused_by_name(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt_neox")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(ModelError, match=r"'gpt_neox.embed_in.weight' has shape \(128, 64\).*\(128, 32\)"):
        Driver.of(tmp_path)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"model_type": "gpt2", "n_head": 7}, "7 heads do not divide"),
        ({"model_type": "gpt2", "activation_function": "mish"}, "activation_function"),
        ({"model_type": "gpt_neox", **SIZES, "rotary_pct": 0.2}, "3 rotary columns"),
        ({"model_type": "gpt_neox", **SIZES, "rotary_pct": 2.0}, "32 rotary columns of heads of 16"),
        ({"model_type": "bloom", "n_embed": 60}, "8 heads do not divide"),
        ({"model_type": "codegen", "n_head": 2}, "2 heads cannot be in 4 groups"),
        ({"model_type": "gptj", "rotary_dim": 512}, "512 rotary columns of heads of 256"),
        ({"model_type": "gpt_neo", "num_layers": 3}, "`attention_types` names 24 layers, `num_layers` 3"),
        ({"model_type": "gpt_neo", "attention_types": [[["far"], 24]]}, "attention_types"),
        ({"model_type": "falcon", "new_decoder_architecture": True, "parallel_attn": False}, "is parallel"),
        ({"model_type": "falcon", "num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
        ({"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 8}, "8 key-value heads for 71"),
        ({"model_type": "mpt", "attn_config": {"clip_qkv": -6}}, "clip_qkv"),
        ({"model_type": "dbrx", "ffn_config": {"moe_normalize_expert_weights": 2.0}}, "moe_normalize_expert_weights"),
        ({"model_type": "dbrx", "ffn_config": {"moe_top_k": 5}}, "5 experts are to be chosen"),
        ({"model_type": "mpt", "attn_config": {"qk_ln": True}}, "qk_ln"),
        ({"model_type": "mpt", "attn_config": {"attn_type": "multiquery_attention"}}, "attn_type"),
        ({"model_type": "mpt", "attn_config": {"alibi": False}}, "alibi"),
        ({"model_type": "cohere", "partial_rotary_factor": 0.5}, "rotates whole heads"),
        ({"model_type": "cohere2", "layer_types": ["full_attention"]}, "1 layer_types for 40 layers"),
        ({"model_type": "cohere2", "logit_scale": None}, "logit_scale"),
        ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}}, "it has longrope"),
        ({"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0]}}, "incomplete or wrong"),
        ({"model_type": "stablelm", "num_key_value_heads": 5}, "5 key-value heads for 32 heads"),
        ({"model_type": "nemotron", "hidden_act": "softplus"}, "hidden_act"),
        ({"model_type": "opt", "layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
    ],
)
def test_inconsistent_numbers_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(StartError) as found:
        program_of(config)
    assert words in str(found.value)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 7, 8, 12, 16, 71, 112])
def test_slopes_of_any_number_of_heads_are_transformers(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)[:, 0, 1]
    np.testing.assert_allclose(alibi_slopes(heads), theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize("heads", [1, 3, 4, 6, 16])
def test_slopes_of_mpt_are_transformers_and_heed_the_largest_exponent(heads: int) -> None:
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    for largest in (8, 16):  # transformers' model leaves out the second one, which MPT-7B-StoryWriter has
        config = {"model_type": "mpt", "n_heads": heads, "d_model": heads * 16}
        found = config_of(config | {"attn_config": {"alibi_bias_max": largest}}).alibi
        theirs = build_mpt_alibi_tensor(heads, 2, largest)[:, 0, 0]
        np.testing.assert_allclose(found, -theirs.numpy(), rtol=1e-6)


def test_the_places_of_a_part_in_runs_are_those_of_a_reshape() -> None:
    rows = np.arange(5 * 12).reshape(5, 12)
    part = Part("w", 5 * 4, start=3, run=4, step=12)
    want = rows[:, 3:7].ravel()
    assert part.end == 60
    for first in range(20):
        for count in range(21 - first):
            found = [i for s in part.slices(first, count) for i in range(s.start, s.stop)]
            assert found == want[first : first + count].tolist()


def test_a_longrope_models_frequencies_change_at_the_original_length(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "phi3_longrope")
    config = config_of(json.loads((tmp_path / "config.json").read_text()))
    assert (config.max_positions, config.exact_prompt) == (256, 128)
    at = config.rope.table.frequencies_at(np.array([0, 127, 128]))
    np.testing.assert_array_equal(at[0], at[1])
    np.testing.assert_allclose(at[0] / at[2], [1.0, 2.0 / 1.5, 2.0, 8.0 / 3.0], rtol=1e-6)


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_every_name_of_phi3s_scaling_means_longrope(kind: str) -> None:
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    old = {"model_type": "phi3", "max_position_embeddings": 131072, "rope_scaling": {"type": kind, **factors}}
    new = {
        "model_type": "phi3", "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 4096, **factors},
    }  # fmt: skip
    assert str(program_of(old)) == str(program_of(new))
    table = config_of(old).rope.table
    assert (table.kind, table.exact_prompt, table.longest) == ("longrope", 4096, 131072)
