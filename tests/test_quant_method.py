"""The method of a checkpoint: found from its configuration, against `--quantize`, by module."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from tokenmill.errors import ArgumentError, ModelError, Unsupported
from tokenmill.quant import _memo
from tokenmill.quant._memo import once
from tokenmill.quant._method import chosen, method_of
from tokenmill.quant._modules import listed, override
from tokenmill.quant._settings import described, settings
from tokenmill.weights.checkpoint import Safetensors


def checkpoint(folder: Path, file: dict[str, Any] | None = None, name: str = "", **config: Any) -> Safetensors:
    """Write and open a checkpoint. `file`: content of a second file of configuration, `name`."""
    save_file({"a": np.ones(2, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if file is not None:
        (folder / name).write_text(json.dumps(file))
    return Safetensors(folder)


@pytest.mark.parametrize(
    "config, method, place",
    [
        ({"quantization_config": {"quant_method": "GPTQ"}}, "gptq", "quantization_config in config.json"),
        ({"quantization_config": {"quant_method": "fbgemm-fp8"}}, "fbgemm_fp8", "quantization_config in config.json"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors", "compression_config"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes", "quantization_config in config.json"),
        (
            {"text_config": {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}},
            "awq",
            "quantization_config in config.json of the llama part",
        ),
        ({"quantization_config": None}, "none", ""),
        ({"quantization_config": {}}, "none", ""),
        ({}, "none", ""),
    ],
)
def test_the_method_is_found_in_config_json(tmp_path: Path, config: dict[str, Any], method: str, place: str) -> None:
    source = checkpoint(tmp_path, **config)
    found = described(source)
    assert method_of(source) == method
    assert (place in found.place) if found is not None else place == ""


def test_a_second_file_describes_what_config_json_does_not(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, {"bits": 4}, "quantize_config.json")
    assert described(source) == ("quantize_config.json", "gptq", {"quant_method": "gptq", "bits": 4})
    (tmp_path / "quantize_config.json").unlink()
    nvidias = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    assert method_of(checkpoint(tmp_path, nvidias, "hf_quant_config.json")) == "modelopt"
    (tmp_path / "hf_quant_config.json").unlink()
    source = checkpoint(tmp_path, {"w_bit": 4}, "quant_config.json", quantization_config={"quant_method": "fp8"})
    assert method_of(source) == "fp8"


@pytest.mark.parametrize(
    "given, why",
    [
        ([1], "is [1], no object"),
        ({"bits": 4}, "has no `quant_method`; it must be the name of the method"),
        ({"quant_method": 4}, "has `quant_method` 4; it must be the name"),
    ],
)
def test_a_description_without_a_method_is_refused(tmp_path: Path, given: Any, why: str) -> None:
    with pytest.raises(ModelError) as error:
        method_of(checkpoint(tmp_path, quantization_config=given))
    assert str(error.value).startswith("quantization_config in config.json ")
    assert why in str(error.value)


def test_a_field_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    class Fields(msgspec.Struct):
        bits: int
        desc_act: bool = False

    source = checkpoint(tmp_path, quantization_config={"quant_method": "gptq", "bits": "four"})
    with pytest.raises(ModelError, match=r"quantization_config in config.json cannot be used: `bits` must be .*four"):
        settings(source, Fields)
    source = checkpoint(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4, "desc_act": None})
    assert settings(source, Fields) == Fields(4)


def test_quantize_may_name_what_is_stored_and_contradict_nothing(tmp_path: Path) -> None:
    plain = checkpoint(tmp_path)
    assert chosen(plain, "int4").__name__.endswith("int4")
    with pytest.raises(ArgumentError, match=r"`quantize` is gguf, but the checkpoint is not quantized.*Leave"):
        chosen(plain, "gguf")
    unknown = checkpoint(tmp_path, quantization_config={"quant_method": "quip"})
    with pytest.raises(
        Unsupported, match=r"'quip' is not supported.*the quant_method of quantization_config in config"
    ):
        chosen(unknown, "quip")


def test_modules_are_named_whole_in_parts_and_by_regular_expressions() -> None:
    down, head = "model.layers.1.mlp.down_proj", "lm_head"
    for entry in (
        down,
        "mlp.down_proj",
        "layers.1",
        "down_proj",
        "model.layers.1.",
        "re:.*down_proj",
        "re:model.layers.1",
    ):
        assert listed(down, ["x", entry]), entry
    for entry in ("model.layers.11", "layers.1.mlp.down", "re:down_proj", "own_proj"):
        assert not listed(down, [entry]), entry
    assert listed(head, ["lm_head"])
    assert listed(down, ["language_model.model.layers.1.mlp"])
    assert listed(down, ["re:model.language_model.layers.1.mlp"])


def test_the_first_rule_that_matches_a_module_decides() -> None:
    rules = {"-:.*lm_head": {}, r"+:.*\.1\..*": {"bits": 8}, ".*down_proj": {"bits": 2}}
    assert override("lm_head", rules) is False
    assert override("model.layers.1.mlp.down_proj", rules) == {"bits": 8}
    assert override("model.layers.2.mlp.down_proj", rules) == {"bits": 2}
    assert override("model.layers.2.mlp.up_proj", rules) is None
    with pytest.raises(ModelError, match=r"'\(x', which is no regular expression"):
        override("lm_head", {"(x": {}})


def test_what_is_found_of_a_checkpoint_is_found_once_and_forgotten_with_it(tmp_path: Path) -> None:
    """A model of many experts asks for each matrix several times."""
    source = checkpoint(tmp_path, quantization_config={"quant_method": "fp8"})
    calls = list[int]()
    for _ in range(2):
        assert once(source, "key", lambda: calls.append(0) or 7) == 7
    other = checkpoint(tmp_path, quantization_config={"quant_method": "fp8"})
    assert once(other, "key", lambda: 8) == 8
    assert len(calls) == 1
    before = len(_memo._VALUES)
    del source
    gc.collect()
    assert len(_memo._VALUES) < before
