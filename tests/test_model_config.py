"""config.json as transformers' classes read it: each field missing, null or set, against the class and its model."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from support_models import SIZES, Driver

from tokenmill import plugins
from tokenmill.errors import ModelError, StartError
from tokenmill.models.base import config_of, program_of

torch.set_num_threads(1)
TYPES = ("llama", "mistral", "qwen2", "qwen3")
VALUES: dict[str, list[Any]] = {
    "vocab_size": [128], "hidden_size": [64, 128], "intermediate_size": [96], "num_hidden_layers": [3, 30],
    "num_attention_heads": [4, 8], "num_key_value_heads": [None, 2, 4], "head_dim": [None, 16, 32],
    "hidden_act": ["silu", "gelu", "swish", "gelu_fast"], "max_position_embeddings": [None, 64, 4096],
    "rms_norm_eps": [1e-5], "rope_theta": [5e5, 10000], "attention_bias": [None, True, False],
    "mlp_bias": [None, True], "tie_word_embeddings": [None, True, False], "sliding_window": [None, 8],
    "use_sliding_window": [None, True, False], "max_window_layers": [0, 1, 2], "rope_scaling": [None],
    "layer_types": [None],
}  # fmt: skip
"""Field -> what a file may say of it; each may be left out, too."""


def drawn(model_type: str, seed: int) -> dict[str, Any]:
    """Return a random config.json."""
    rng = random.Random(f"{model_type} {seed}")
    chosen = {name: rng.choice(values) for name, values in VALUES.items() if rng.random() < 0.6}
    return without_refused_nulls({"model_type": model_type, **chosen})


def admits(model_type: str, name: str, kind: type) -> bool:
    """Return True if transformers' class admits a value of this kind in a field; True for a field that it lacks."""
    from transformers import CONFIG_MAPPING

    hints = {field.name: field.type for field in fields(CONFIG_MAPPING[model_type])}
    return name not in hints or kind is hints[name] or kind in get_args(hints[name])


def of_class(config: dict[str, Any]) -> Any:
    """Return transformers' configuration object of the same file.

    Its classes refuse null in a flag since version 5. It was false before, as it is here.
    """
    from transformers import CONFIG_MAPPING

    of = config["model_type"]
    given = {k: False if v is None and not admits(of, k, type(None)) else v for k, v in config.items()}
    return CONFIG_MAPPING[of].from_dict(deepcopy({k: v for k, v in given.items() if k != "model_type"}))


def without_refused_nulls(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out each null that transformers' class refuses, except in flags. Older versions admitted some of them."""
    of = config["model_type"]
    return {k: v for k, v in config.items() if v is not None or admits(of, k, type(None)) or admits(of, k, bool)}


def as_transformers_models_use_it(theirs: Any) -> dict[str, Any]:
    """Return the numbers that a model of transformers takes from its configuration."""
    of = theirs.model_type
    layers = range(theirs.num_hidden_layers)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention" if of == "mistral" else ""] * len(layers)
    biased = {"llama": theirs.__dict__.get("attention_bias"), "qwen3": theirs.__dict__.get("attention_bias")}.get(of)
    window = getattr(theirs, "sliding_window", None)
    return {
        "vocab": theirs.vocab_size, "hidden": theirs.hidden_size, "inner": theirs.intermediate_size,
        "heads": theirs.num_attention_heads, "kv": theirs.num_key_value_heads,
        "head": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        "act": theirs.hidden_act, "length": theirs.max_position_embeddings, "eps": theirs.rms_norm_eps,
        "theta": theirs.rope_parameters["rope_theta"], "tied": bool(theirs.tie_word_embeddings),
        "biases": (bool(biased) or of == "qwen2", bool(biased), of == "llama" and bool(theirs.mlp_bias)),
        "windows": [(window or 0) if kind == "sliding_attention" else 0 for kind in kinds],
    }  # fmt: skip


def as_read_here(ours: Any) -> dict[str, Any]:
    return {
        "vocab": ours.vocab_size, "hidden": ours.hidden_size, "inner": ours.intermediate_size,
        "heads": ours.num_attention_heads, "kv": ours.kv_heads, "head": ours.head_size, "act": ours.hidden_act,
        "length": ours.max_position_embeddings, "eps": ours.rms_norm_eps, "theta": ours.rope_theta,
        "tied": ours.tie_word_embeddings, "biases": tuple(ours.biases),
        "windows": [ours.window(layer) for layer in range(ours.num_hidden_layers)],
    }  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_fields_left_out_null_or_set_are_what_transformers_class_makes_of_them(model_type: str) -> None:
    compared = 0
    for seed in range(100):
        config = drawn(model_type, seed)
        theirs = as_transformers_models_use_it(of_class(config))
        if theirs["heads"] % theirs["kv"]:  # accepted by the class, but the model fails
            with pytest.raises(StartError, match="key-value heads"):
                config_of(config)
            continue
        assert as_read_here(config_of(config)) == theirs, config
        compared += 1
    assert compared > 40


@pytest.mark.parametrize("model_type", TYPES)
def test_an_empty_config_is_the_classs_default_in_every_field(model_type: str) -> None:
    config = {"model_type": model_type}
    assert as_read_here(config_of(config)) == as_transformers_models_use_it(of_class(config))
    names = set(plugins.find("models", model_type).Config.__struct_fields__)
    assert names <= {*VALUES, "partial_rotary_factor", "dtype"}


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
             "rms_norm_eps", "rope_theta", "partial_rotary_factor"]
)  # fmt: skip
def test_null_where_transformers_model_fails_of_it_is_refused_with_the_default(name: str) -> None:
    with pytest.raises(StartError, match=f"`{name}` is null, which is no value of it; leave it out for its default, "):
        config_of({"model_type": "qwen3", **SIZES, name: None})


@pytest.mark.parametrize("model_type", TYPES)
def test_a_heads_size_of_null_is_what_the_heads_make_of_the_width(model_type: str) -> None:
    config = config_of({"model_type": model_type, **SIZES, "head_dim": None})
    assert config.head_size == SIZES["hidden_size"] // SIZES["num_attention_heads"]


def test_rope_parameters_of_transformers_5_are_read_as_the_fields_that_they_replace() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64}
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **yarn}}
    new = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "partial_rotary_factor": 1.0, **yarn}}
    nulls = {"rope_theta": None, "rope_scaling": None}
    made = [
        str(program_of({"model_type": "qwen3", **SIZES, **some}))
        for some in (old, new, old | new, new | nulls, old | {"rope_parameters": {}})
    ]
    assert "yarn" in made[0]
    assert "500000" in made[0]
    assert made == made[:1] * 5
    plain = [{}, {"rope_scaling": {}}, {"rope_parameters": {"rope_theta": 1e4}}]
    assert len({str(program_of({"model_type": "llama", **SIZES, **some})) for some in plain}) == 1


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "two values of rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "linear", "factor": 4}},
         "two values of rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "of one kind for all layers"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "names two types"),
        ({"rope_scaling": {"factor": 2.0}}, "has a factor but no rope_type"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "incomplete or wrong"),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "incomplete or wrong"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": float("nan")}}, "incomplete or wrong"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "incomplete or wrong"),
        ({"rope_scaling": {"type": "ntk"}}, "'ntk' is not supported. Supported: default, dynamic"),
        ({"rope_scaling": {"type": "su"}}, "'short_factor'"),
        ({"partial_rotary_factor": 0.5}, "rotates whole heads"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rotates whole heads"),
        ({"hidden_size": 60}, "4 heads do not divide hidden_size 60 into even numbers"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, "leave `layer_types` out"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"] * 2}, "2 layer_types for 3 layers"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "no window is used"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": None}, "give its first layer"),
    ],
)  # fmt: skip
def test_contradictions_and_what_no_model_of_transformers_computes_are_refused_by_name(
    wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(StartError) as found:
        program_of({"model_type": "llama", **SIZES, **wrong})
    assert words in str(found.value)


SMALL = {**SIZES, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
CHOICES: dict[str, list[Any]] = {
    "num_key_value_heads": [None, 1, 2, 4], "head_dim": [None, 16], "hidden_act": ["gelu", "swish", "gelu_fast"],
    "rms_norm_eps": [1e-3], "rope_theta": [50.0], "attention_bias": [None, True], "mlp_bias": [None, True],
    "tie_word_embeddings": [None, True], "sliding_window": [None, 3], "use_sliding_window": [None, True],
    "max_window_layers": [None, 1], "layer_types": [None, ["full_attention", "sliding_attention"]],
    "max_position_embeddings": [None, 16], "partial_rotary_factor": [1.0],
    "rope_scaling": [
        None, {"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 3.0},
        {"type": "dynamic", "factor": 2.0}, {"rope_type": "default"},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "truncate": None},
        {"type": "yarn", "factor": 2.0, "mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": None},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8}, {"rope_type": "llama3", "factor": 8.0},
    ],
}  # fmt: skip
IDS = [5, 9, 100, 3, 77, 2, 61, 8, 9, 4, 120, 33]


def their_model(config: dict[str, Any]) -> tuple[Any, np.ndarray] | None:
    """Return transformers' model with random weights and its logits; None if it cannot be made or run."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(of_class(config), attn_implementation="eager").float().eval()
        for p in model.parameters():
            p.data = torch.randn_like(p) * 0.2 + (0.5 if p.dim() == 1 else 0.0)
        with torch.no_grad():
            return model, model(torch.tensor([IDS]), use_cache=False).logits[0, -1].numpy()
    except (StrictDataclassError, TypeError, KeyError, ValueError, RuntimeError, AttributeError):
        return None


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_of_random_configs_equal_transformers_and_what_fails_there_is_refused(
    model_type: str, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    served = 0
    for seed in range(24):
        rng = random.Random(f"logits {model_type} {seed}")
        chosen = {name: rng.choice(values) for name, values in CHOICES.items() if rng.random() < 0.4}
        config = without_refused_nulls({"model_type": model_type, **SMALL, **chosen})
        for name in rng.sample(sorted(CHOICES.keys() - {"num_key_value_heads"}), 4):
            config.pop(name, None)
        if model_type == "mistral":
            config.pop("layer_types", None)  # refused above; transformers warns that it is ignored
        made = their_model(json.loads(json.dumps(config)))
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        if made is None and config.get("head_dim", 16) is None and model_type != "llama":
            continue  # newer transformers, and this server, divide hidden_size by the heads
        if made is None:
            with pytest.raises(StartError):
                program_of(config)
            continue
        model, want = made
        tensors = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            tensors.pop("lm_head.weight")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        got = Driver.of(folder).feed([(0, IDS)])[0]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max(), err_msg=str(config))
        served += 1
    assert served > 8


EXPERTS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    "config, words",
    [
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "3 experts are to be chosen"),
        ({"model_type": "qwen3_moe", "num_experts": 4}, "8 experts are to be chosen for each token, but there are 4"),
        ({"model_type": "qwen3_moe", "num_experts": 16, "num_local_experts": 8}, "`num_local_experts` 8"),
        ({"model_type": "qwen2_moe", "layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        ({"model_type": "glm4_moe", "n_group": 3}, "1 of 3 groups of 128 experts"),
        ({"model_type": "glm4_moe", "n_group": 64, "topk_group": 2}, "8 experts are to be chosen for each token"),
        ({"model_type": "dots1", "num_experts_per_tok": 1, "n_shared_experts": 1}, "n_routed_experts"),
        ({"model_type": "deepseek_v2"}, "num_experts_per_tok"),
        ({"model_type": "deepseek_v2", "num_experts_per_tok": 2, "mlp_bias": True}, "`mlp_bias` is true"),
        ({"model_type": "deepseek_v3", "n_group": 7}, "4 of 7 groups of 256 experts"),
        ({"model_type": "gpt_oss", "swiglu_alpha": 1.0}, "`swiglu_alpha` is 1.0"),
        ({"model_type": "gpt_oss", "num_experts_per_tok": 129}, "129 experts are to be chosen"),
        ({"model_type": "granitemoe", "num_experts_per_tok": 9}, "9 experts are to be chosen"),
        ({"model_type": "ernie4_5_moe", "use_bias": True}, "`use_bias` is true"),
        ({"model_type": "olmoe", "clip_qkv": -8.0}, "clip_qkv"),
        ({"model_type": "hunyuan_v1_moe", "moe_topk": [1]}, "1 numbers of moe_topk for 2 layers"),
    ],
)
def test_experts_that_cannot_be_had_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError) as found:
        program_of(EXPERTS | config)
    assert words in str(found.value)


@pytest.mark.parametrize(
    "model_type, field, value",
    [
        ("llama", "rms_norm_eps", float("nan")),
        ("llama", "rope_theta", float("inf")),
        ("granite", "logits_scaling", float("-inf")),
        ("mamba2", "num_hidden_layers", 1 << 20),
        ("qwen3_next", "partial_rotary_factor", 1e7),
        ("gemma4_text", "attention_k_eq_v", True),
        ("mamba", "expand", 1e308),
        ("jamba", "hidden_size", 0),
        ("jamba", "hidden_size", 1 << 40),
        ("jamba", "mamba_expand", float("nan")),
        ("jamba", "mamba_dt_rank", -1),
        ("falcon_h1", "mamba_expand", float("inf")),
        ("granitemoehybrid", "mamba_expand", -2.0),
        ("gpt_oss", "swiglu_limit", float("nan")),
    ],
)
def test_numbers_that_no_model_has_are_refused_by_the_name_of_their_field(
    model_type: str, field: str, value: float
) -> None:
    with pytest.raises(ModelError, match=rf"config.json of the {model_type} model cannot be used: .*`{field}`"):
        config_of({"model_type": model_type, field: value})
