"""Adapters of PEFT: merged into the base model while its weights are read, or refused by name."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support_models import Driver, make_checkpoint, reference, steps

from tokenmill import fetch
from tokenmill.config import Settings
from tokenmill.errors import MissingFiles, ModelError, StartError, Unsupported
from tokenmill.models.base import program_of
from tokenmill.server.digests import model_digest
from tokenmill.weights.checkpoint import model_config, open_checkpoint
from tokenmill.weights.source import ModelSource

torch.set_num_threads(1)
ABOUT = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"


def matrices(model: Any, *modules: str, rank: int = 4, turned: bool = False) -> dict[str, torch.Tensor]:
    """Return random A and B for each module, under peft's names."""
    made = {}
    for module in modules:
        rows, columns = model.get_submodule(module).weight.shape[:: -1 if turned else 1]
        made[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns) * 0.2
        made[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank) * 0.2
    return made


def write(folder: Path, base: Path, tensors: dict[str, torch.Tensor], **about: Any) -> Path:
    """Write an adapter to `folder`."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {**ABOUT, "base_model_name_or_path": str(base), **about}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def found(folder: Path) -> ModelSource:
    source = fetch.on_disk(Settings(model_id=str(folder)))
    assert source is not None
    return source


def add(model: Any, tensors: dict[str, torch.Tensor], module: str, scaling: float, turned: bool = False) -> None:
    """Add scaling · B·A to the weights of transformers' model."""
    name = f"base_model.model.{module}.lora_"
    product = tensors[f"{name}B.weight"] @ tensors[f"{name}A.weight"]
    model.get_submodule(module).weight.data += scaling * (product.T if turned else product)


def assert_served(model: Any, source: ModelSource) -> None:
    checkpoint = open_checkpoint(source)
    driver = Driver(program_of(checkpoint.config), checkpoint)
    for rows, want in zip(steps(), reference(model, steps()), strict=True):
        np.testing.assert_allclose(driver.feed(rows), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(
    "about, scalings",
    [
        ({}, (6 / 4, 6 / 4)),
        ({"use_rslora": True}, (6 / sqrt(4), 6 / sqrt(4))),
        ({"alpha_pattern": {"q_proj": 10}}, (10 / 4, 6 / 4)),
        ({"rank_pattern": {r"layers\.2\.mlp\.down_proj": 2}, "use_rslora": True}, (6 / sqrt(4), 6 / sqrt(2))),
        ({"alpha_pattern": {"proj": 10, "down": 3}}, (6 / 4, 6 / 4)),  # patterns match whole names of modules
        ({"init_lora_weights": "eva", "layers_to_transform": [1, 2]}, (6 / 4, 6 / 4)),
    ],
)
def test_an_adapter_adds_its_scaled_product(tmp_path: Path, about: dict[str, Any], scalings: tuple[float, ...]) -> None:
    model = make_checkpoint(tmp_path / "base")
    tensors = matrices(model, Q) | matrices(model, DOWN, rank=2 if "rank_pattern" in about else 4)
    source = found(write(tmp_path / "adapter", tmp_path / "base", tensors, **about))
    assert (source.path, source.given) == (str(tmp_path / "base"), str(tmp_path / "adapter"))
    for module, scaling in zip((Q, DOWN), scalings, strict=True):
        add(model, tensors, module, scaling)
    assert_served(model, source)


def test_transposed_matrices_are_merged_as_they_are_stored(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "base", "gpt2")
    tensors = matrices(model, "transformer.h.0.attn.c_attn", turned=True)
    source = found(write(tmp_path / "adapter", tmp_path / "base", tensors, fan_in_fan_out=True))
    add(model, tensors, "transformer.h.0.attn.c_attn", 1.5, turned=True)
    assert_served(model, source)


def test_a_magnitude_rescales_the_rows_of_the_sum(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "base")
    tensors = matrices(model, Q)
    magnitude = torch.rand(64) + 0.5
    tensors[f"base_model.model.{Q}.lora_magnitude_vector"] = magnitude
    source = found(write(tmp_path / "adapter", tmp_path / "base", tensors, use_dora=True))
    add(model, tensors, Q, 1.5)
    weight = model.get_submodule(Q).weight
    weight.data *= (magnitude / weight.data.norm(dim=1))[:, None]
    assert_served(model, source)


def test_whole_tensors_replace_the_bases_and_may_enlarge_the_vocabulary(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "base", "llama_tied_with_biases")
    model.resize_token_embeddings(130, mean_resizing=False)
    bias = torch.randn(64)
    tensors = {
        "base_model.model.model.embed_tokens.weight": torch.randn(130, 64),
        "base_model.model.lm_head.modules_to_save.default.weight": torch.randn(130, 64),
        f"base_model.model.{Q}.base_layer.bias": bias,
    }
    source = found(write(tmp_path / "adapter", tmp_path / "base", tensors))
    config = model_config(source)
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (130, False)
    model.lm_head.weight = torch.nn.Parameter(tensors["base_model.model.lm_head.modules_to_save.default.weight"])
    model.model.embed_tokens.weight.data = tensors["base_model.model.model.embed_tokens.weight"]
    model.get_submodule(Q).bias.data = bias
    assert_served(model, source)


@pytest.mark.parametrize("also_saved", [False, True])  # peft writes the unchanged table beside its change
def test_an_embeddings_change_is_stored_in_the_other_order(tmp_path: Path, also_saved: bool) -> None:
    model = make_checkpoint(tmp_path / "base")
    a, b, name = torch.randn(4, 128), torch.randn(64, 4), "base_model.model.model.embed_tokens"
    tensors = {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    if also_saved:
        tensors[f"{name}.base_layer.weight"] = model.model.embed_tokens.weight.data = torch.randn(128, 64)
    source = found(write(tmp_path / "adapter", tmp_path / "base", tensors))
    model.model.embed_tokens.weight.data += 1.5 * (b @ a).T
    assert_served(model, source)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_is_rounded_to_the_bases_type(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_checkpoint(tmp_path / "base", dtype=dtype)
    tensors = matrices(model, Q)
    merged = open_checkpoint(found(write(tmp_path / "adapter", tmp_path / "base", tensors)))
    add(model, tensors, Q, 1.5)
    stored = merged[f"{Q}.weight"]
    want = model.get_submodule(Q).weight.data.to(dtype)
    got = torch.from_numpy(stored.data.copy()).view(dtype)
    assert stored.kind == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-6)
    assert (got == want).float().mean() > 0.99  # the order of the product's sums may decide a tie


def test_an_adapters_digest_and_tokenizer_are_its_own(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "base")
    first = found(write(tmp_path / "a", tmp_path / "base", matrices(model, Q)))
    other = found(write(tmp_path / "b", tmp_path / "base", matrices(model, Q)))
    assert len({model_digest(first), model_digest(other), model_digest(found(tmp_path / "base"))}) == 3


@pytest.mark.parametrize(
    "about, words",
    [
        ({"peft_type": "IA3"}, r"peft_type of an adapter 'IA3' is not supported\. Supported: LORA.*merge_and_unload"),
        ({"peft_type": None}, r"peft_type of an adapter 'None'"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            r"'pissa_niter_4'.*changes the base model's weights",
        ),
        ({"target_parameters": ["experts.gate_up_proj"]}, r"option of an adapter 'target_parameters'"),
        ({"lora_bias": True}, r"'lora_bias'"),
        ({"base_model_name_or_path": ""}, r"adapter_config\.json names no base model"),
        ({"r": 0}, r"r 0, lora_alpha 6 for 'model\.layers\.1\.self_attn\.q_proj'"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, about: dict[str, Any], words: str) -> None:
    model = make_checkpoint(tmp_path / "base")
    folder = write(tmp_path / "adapter", tmp_path / "base", matrices(model, Q), **about)
    with pytest.raises(StartError, match=words):
        Driver(program_of(model_config(found(folder))), open_checkpoint(found(folder)))


@pytest.mark.parametrize(
    "change, words",
    [
        ({f"{Q}.lora_A.weight": torch.zeros(4, 32)}, r"shapes \(4, 32\) and \(64, 4\), the base's tensor \(64, 64\)"),
        ({f"{Q}.lora_B.weight": None}, r"change of 'model\.layers\.1\.self_attn\.q_proj\.weight' lacks one of its two"),
        ({"model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)}, r"changes 'model\.layers\.7\.mlp\.up_proj"),
        ({f"{Q}.lora_B.bias": torch.zeros(64)}, r"tensor of an adapter '.*lora_B\.bias'"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 64, dtype=torch.int8)}, r"type of an adapter's weights 'I8'"),
    ],
)
def test_an_adapter_that_does_not_fit_its_base_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    model = make_checkpoint(tmp_path / "base")
    tensors = matrices(model, Q) | {f"base_model.model.{name}": tensor for name, tensor in change.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises((ModelError, Unsupported), match=words):
        open_checkpoint(found(write(tmp_path / "adapter", tmp_path / "base", tensors)))


def test_the_output_layer_of_a_tied_base_is_not_changed_behind_its_back(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "base", "llama_tied_with_biases")
    with pytest.raises(ModelError, match=r"changes 'lm_head\.weight'.*Its output layer is its embedding"):
        open_checkpoint(found(write(tmp_path / "adapter", tmp_path / "base", matrices(model, "lm_head"))))


def test_an_adapter_to_an_adapter_and_one_that_lacks_a_file_are_refused(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "base")
    write(tmp_path / "a", tmp_path / "base", matrices(model, Q))
    write(tmp_path / "b", tmp_path / "a", matrices(model, Q))
    write(tmp_path / "c", tmp_path / "c", matrices(model, Q))
    for name in ("b", "c"):
        with pytest.raises(ModelError, match="is the base model of an adapter, but an adapter itself"):
            fetch.fetch(Settings(model_id=str(tmp_path / name)), print)
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(MissingFiles, match=r"is an adapter that lacks adapter_model\.safetensors"):
        found(tmp_path / "a")


def test_a_pickled_adapter_is_converted_first(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "base")
    tensors = matrices(model, Q)
    folder = write(tmp_path / "adapter", tmp_path / "base", tensors)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    assert fetch.on_disk(Settings(model_id=str(folder))) is None
    source = fetch.fetch(Settings(model_id=str(folder)), print)
    add(model, tensors, Q, 1.5)
    assert_served(model, source)
