"""Model types that another one's file builds: the defaults of their own classes, their own names of fields."""

from __future__ import annotations

import msgspec
import pytest
from support_models import SIZES

from tokenmill.errors import Unsupported
from tokenmill.models import base
from tokenmill.models._aliases import ALIASES
from tokenmill.models.base import config_of, find, program_of
from tokenmill.runtime import programs

NOT_COMPARED = {
    "dtype", "rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq", "rope_local_scaling",
    "first_k_dense_replace", "use_sliding_window", "sliding_window", "use_qk_norm", "global_head_dim",
    "max_window_layers",
}  # fmt: skip
"""Fields that the class has in another form, or that mean nothing there"""


REQUIRED = {"num_experts_per_tok": 1, "head_dim": 128}
"""Fields without a default in some class, or that only other ones make consistent"""


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_the_defaults_are_those_of_the_types_own_class(name: str) -> None:
    from transformers import CONFIG_MAPPING  # takes seconds

    if name not in CONFIG_MAPPING:
        pytest.skip("transformers has no class of its own for it")
    theirs = CONFIG_MAPPING[name]()
    theirs = getattr(theirs, "text_config", theirs)
    theirs.allow_global_per_layer_attribute_access = True  # of Gemma 4, whose heads have two sizes
    given = {name: getattr(theirs, name, None) or default for name, default in REQUIRED.items()}
    ours = config_of({"model_type": name, **given})
    compared = 0
    for field in msgspec.structs.fields(type(ours)):
        value = getattr(theirs, field.encode_name, None) if field.encode_name not in NOT_COMPARED else None
        if value is not None and getattr(ours, field.name) is not None:
            assert getattr(ours, field.name) == value, field.name
            compared += 1
    assert compared > 8
    rope = getattr(theirs, "rope_parameters", None) or {}
    if rope.get("rope_theta") and hasattr(ours, "rope_theta"):
        assert ours.rope.table.theta == rope["rope_theta"]


def test_every_alias_is_built_here_by_a_file_that_there_is() -> None:
    assert all(find(name) is find(alias.of) for name, alias in ALIASES.items())
    assert all(programs._is_here(name) for name in ALIASES)
    assert {*ALIASES} < {*base.names()}
    with pytest.raises(Unsupported, match="internlm3, iquestcoder, "):
        find("gemma9")


def test_fields_under_a_types_own_names_are_read() -> None:
    internlm = config_of({"model_type": "internlm3", **SIZES, "qkv_bias": True, "bias": True})
    assert (internlm.attention_bias, internlm.mlp_bias) == (True, True)
    exaone = {"model_type": "exaone", **SIZES, "num_layers": 2, "layer_norm_epsilon": 0.5}
    del exaone["num_hidden_layers"]
    assert (config_of(exaone).num_hidden_layers, config_of(exaone).rms_norm_eps) == (2, 0.5)
    sarvam = config_of({"model_type": "sarvam_mla", "num_experts": 32, "num_shared_experts": 2})
    assert (sarvam.n_routed_experts, sarvam.n_shared_experts) == (32, 2)


def test_falcon_before_transformers_had_it_is_read() -> None:
    same = {"hidden_size": 64, "vocab_size": 128}
    seven = same | {"n_layer": 2, "n_head": 4, "multi_query": True, "parallel_attn": True}
    falcon = same | {"model_type": "falcon", "num_hidden_layers": 2, "num_attention_heads": 4}
    assert str(program_of({"model_type": "RefinedWebModel", **seven})) == str(program_of(falcon))
    forty = {"model_type": "RefinedWeb", **seven, "n_head_kv": 2}
    grouped = falcon | {"new_decoder_architecture": True, "num_kv_heads": 2}
    assert str(program_of(forty)) == str(program_of(grouped))


def test_sections_of_rotations_for_images_change_nothing_of_a_text() -> None:
    plain = {"model_type": "qwen2", **SIZES, "rope_theta": 1e6, "rms_norm_eps": 1e-5}
    for scaling in (
        {"type": "mrope", "mrope_section": [4, 6, 6]},
        {"rope_type": "default", "mrope_section": [4, 6, 6], "mrope_interleaved": True},
    ):
        flat = plain | {"model_type": "qwen2_5_vl", "rope_scaling": scaling}
        assert str(program_of(flat)) == str(program_of(plain))
        nested = {"model_type": "qwen2_5_vl", "text_config": flat | {"model_type": "qwen2_5_vl_text"}}
        assert str(program_of(nested)) == str(program_of(plain))
        assert str(program_of({"model_type": "qwen2_5_omni", "thinker_config": nested})) == str(program_of(plain))
