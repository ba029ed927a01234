"""Unused and missing tensors of a checkpoint: reported or refused as by transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support_models import Driver, make_checkpoint, prompts, reference, steps

from tokenmill.backends.accounts import stored_dtype
from tokenmill.backends.cuda import KIND as CUDA
from tokenmill.errors import ModelError
from tokenmill.models.base import config_of, program_of
from tokenmill.program.cost import weights_of
from tokenmill.quant._unread import warn_of_unread
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source

torch.set_num_threads(1)


def changed(folder: Path, tensors: Any = None, **fields: Any) -> None:
    """Rewrite a checkpoint. `tensors`: makes the new tensors from the old. `fields`: change config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    if tensors is not None:
        made = {name: t.contiguous().clone() for name, t in tensors(load_file(folder / "model.safetensors")).items()}
        save_file(made, folder / "model.safetensors", metadata={"format": "pt"})


def warnings_of(folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Return the warnings of a start about the checkpoint's tensors."""
    caplog.clear()
    source = open_checkpoint(local_source(folder))
    with caplog.at_level(logging.WARNING, "tokenmill.quant"):
        warn_of_unread(weights_of(program_of(source.config)), source)
    return caplog.text


def of_transformers(folder: Path) -> np.ndarray:
    """Return the logits of transformers' model of the same folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    return reference(model, [[(0, prompts()[1])]])[0]


def assert_loads_as_transformers(folder: Path) -> None:
    want = of_transformers(folder)
    got = Driver.of(folder).feed([(0, prompts()[1])])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "mistral"])
def test_a_bare_models_names_are_read_as_those_of_the_whole_one(tmp_path: Path, family: str) -> None:
    make_checkpoint(tmp_path, family, tie_word_embeddings=True)
    changed(tmp_path, lambda old: {name.removeprefix("model."): t for name, t in old.items()})
    assert_loads_as_transformers(tmp_path)


def test_a_bare_model_in_parts_and_one_with_its_head_beside_it_are_read_too(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "head", "llama")
    changed(tmp_path / "head", lambda old: {name.removeprefix("model."): t for name, t in old.items()})
    base = make_checkpoint(tmp_path / "parts", "llama", tie_word_embeddings=True)
    base.model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    (tmp_path / "parts" / "model.safetensors").unlink()
    changed(tmp_path / "parts", architectures=["LlamaModel"], tie_word_embeddings=True)
    for folder, made in ((tmp_path / "head", model), (tmp_path / "parts", base)):
        backend = Driver.of(folder)
        for rows, want in zip(steps(), reference(made, steps()), strict=True):
            np.testing.assert_allclose(backend.feed(rows), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_no_head_where_the_model_is_not_tied_is_refused_with_the_cure(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    changed(tmp_path, lambda old: {name: t for name, t in old.items() if name != "lm_head.weight"})
    for field in (False, None):
        changed(tmp_path, tie_word_embeddings=field)
        with pytest.raises(ModelError, match=r"no tensor 'lm_head.weight'.*set tie_word_embeddings to true"):
            Driver.of(tmp_path)
    changed(tmp_path, tie_word_embeddings=True)
    assert_loads_as_transformers(tmp_path)


def test_a_tied_models_own_head_is_not_read_and_that_it_differs_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_checkpoint(tmp_path, "llama")
    changed(tmp_path, tie_word_embeddings=True)
    got = Driver.of(tmp_path).feed([(0, prompts()[1])])  # transformers 5 does not tie then, against config.json
    assert "lm_head.weight differs from the embedding and is not read" in warnings_of(tmp_path, caplog)
    changed(tmp_path, lambda old: old | {"lm_head.weight": old["model.embed_tokens.weight"]})
    assert_loads_as_transformers(tmp_path)
    np.testing.assert_array_equal(Driver.of(tmp_path).feed([(0, prompts()[1])]), got)
    assert warnings_of(tmp_path, caplog) == ""
    changed(tmp_path, tie_word_embeddings=False)
    assert_loads_as_transformers(tmp_path)


@pytest.mark.parametrize("prefix", ["base_model.model.", "language_model.", "module.", "_orig_mod."])
def test_names_behind_a_wrappers_prefix_are_named(tmp_path: Path, prefix: str) -> None:
    make_checkpoint(tmp_path, "llama")
    changed(tmp_path, lambda old: {prefix + name: t for name, t in old.items()})
    with pytest.raises(ModelError, match=rf"There is '{prefix}model.embed_tokens.weight'.*begin with '{prefix}'"):
        Driver.of(tmp_path)


@pytest.mark.parametrize(
    "family, name",
    [
        ("llama", "model.layers.0.self_attn.q_norm.weight"),
        ("llama", "model.layers.2.self_attn.q_proj.bias"),
        ("llama", "model.layers.1.mlp.gate.weight"),
        ("mistral", "model.layers.0.self_attn.k_proj.bias"),
        ("qwen2", "model.layers.0.self_attn.o_proj.bias"),
        ("qwen3", "model.layers.0.mlp.down_proj.bias"),
        ("llama", "model.norm.bias"),
        ("llama", "lm_head.bias"),
        ("llama", "model.embed_tokens.lora_A"),
    ],
)
def test_a_tensor_of_what_is_computed_that_is_not_read_is_refused_by_name(
    tmp_path: Path, family: str, name: str
) -> None:
    make_checkpoint(tmp_path, family)
    changed(tmp_path, lambda old: old | {name: torch.ones(16)})
    with pytest.raises(ModelError, match=rf"have a tensor '{name}', which the {family} model .* does not read"):
        Driver.of(tmp_path)


def test_tensors_beside_what_is_computed_are_told_and_those_that_change_nothing_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_checkpoint(tmp_path, "llama")
    harmless = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "model.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.k_proj.bias": torch.zeros(32), "model.layers.1.self_attn.k_scale": torch.ones(1),
    }  # fmt: skip
    changed(tmp_path, lambda old: old | harmless)
    assert_loads_as_transformers(tmp_path)
    assert warnings_of(tmp_path, caplog) == ""
    changed(tmp_path, lambda old: old | {"v_head.weight": torch.ones(4), "model.layers.3.mlp.x.weight": torch.ones(4)})
    assert_loads_as_transformers(tmp_path)
    text = warnings_of(tmp_path, caplog)
    assert "does not read 2 of the tensors in its files: model.layers.3.mlp.x.weight, v_head.weight" in text
    changed(tmp_path, num_hidden_layers=2)
    assert_loads_as_transformers(tmp_path)
    assert "does not read 11 of the tensors" in warnings_of(tmp_path, caplog)


@pytest.mark.parametrize(
    "fields, stored, dtype",
    [
        ({"torch_dtype": "float16"}, torch.bfloat16, "float16"),
        ({"dtype": "float16"}, torch.bfloat16, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, torch.float16, "bfloat16"),  # the newer name takes precedence
        ({"dtype": None, "torch_dtype": "float16"}, torch.bfloat16, "float16"),
        ({"torch_dtype": "torch.float16"}, torch.bfloat16, "float16"),
        ({"torch_dtype": "float32"}, torch.float16, "bfloat16"),
        ({"torch_dtype": None}, torch.float16, "float16"),
        ({"torch_dtype": "auto"}, torch.float16, "float16"),
        ({}, torch.float16, "float16"),
        ({}, torch.bfloat16, "bfloat16"),
        ({}, torch.float32, "bfloat16"),
    ],
)
def test_a_gpus_dtype_is_the_configs_in_either_spelling_else_that_of_the_weights(
    tmp_path: Path, fields: dict[str, Any], stored: torch.dtype, dtype: str
) -> None:
    save_file(
        {"a": torch.zeros(2, dtype=torch.int8), "b": torch.zeros(2, dtype=stored)}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    source = open_checkpoint(local_source(tmp_path))
    assert CUDA.dtype(stored_dtype(config_of(source.config).dtype, source), "") == dtype


def test_keys_of_layers_that_share_those_of_others_are_left_out_and_no_other_ones(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "gemma3n_text")
    kept = {name: t for name, t in load_file(tmp_path / "model.safetensors").items() if ".layers.1.self_attn.k" in name}
    assert len(kept) == 2

    def of_layer(layer: int) -> dict[str, torch.Tensor]:
        return {name.replace(".layers.1.", f".layers.{layer}."): t for name, t in kept.items()}

    changed(tmp_path, lambda tensors: tensors | of_layer(2) | of_layer(3))
    want = reference(model, [[(0, prompts()[1])]])[0]
    got = Driver.of(tmp_path).feed([(0, prompts()[1])])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    changed(tmp_path, lambda tensors: tensors | {"model.layers.2.self_attn.k_bias": torch.ones(4)})
    with pytest.raises(ModelError, match=r"model\.layers\.2\.self_attn\.k_bias"):
        Driver.of(tmp_path)
