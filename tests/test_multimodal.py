"""Multimodal checkpoints: the language part is served, with the facts of its own configuration."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support_models import SIZES, Driver, prompts, reference, steps
from support_multimodal import MULTIMODAL

from tokenmill.backends.kind import BackendOptions
from tokenmill.errors import ModelError, Unsupported
from tokenmill.models.base import config_of, facts_of, programs_of
from tokenmill.parallel.group import Group
from tokenmill.runtime import lengths
from tokenmill.runtime.assembly import EngineOptions, assemble
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source

torch.set_num_threads(1)
TEXT = {"model_type": "llama", **SIZES, "max_position_embeddings": 96}


def make_llava(folder: Path, text: dict[str, Any] = TEXT) -> Any:
    """Write a tiny random LLaVA to `folder`. Return transformers' model."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(vision_config=vision, text_config=dict(text), image_token_id=100)
    model = LlavaForConditionalGeneration(config).float().eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.2 + (0.5 if p.dim() == 1 else 0.0)
    model.save_pretrained(folder)
    return model


def renamed(folder: Path, rule: Any) -> None:
    """Rename the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    save_file({rule(name): t.clone() for name, t in tensors.items()}, folder / "model.safetensors")


def assert_equal_logits(folder: Path, model: Any) -> None:
    backend = Driver.of(folder)
    for rows, want in zip(steps(), reference(model, steps()), strict=True):
        np.testing.assert_allclose(backend.feed(rows), want, rtol=1e-4, atol=1e-4 * np.abs(want).max() / 10)
    backend.close()


@pytest.mark.parametrize(
    "text", [TEXT, {**TEXT, "model_type": "mistral", "sliding_window": None}, {**TEXT, "model_type": "qwen2"}]
)
def test_the_language_part_has_the_logits_of_the_whole_model(tmp_path: Path, text: dict[str, Any]) -> None:
    assert_equal_logits(tmp_path, make_llava(tmp_path, text))


def made(folder: Path, name: str) -> Any:
    """Write a tiny random multimodal model. Return the part of it that reads texts."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    text, vision = (dict(part) for part in MULTIMODAL[name])
    tied = text.get("tie_word_embeddings", False)
    config = AutoConfig.for_model(name, text_config=text, vision_config=vision, tie_word_embeddings=tied)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float().eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.2 + (0.5 if p.dim() == 1 else 0.0)
    model.save_pretrained(folder)
    return model.language_model if name == "llama4" else model  # its class fails without an image


def assert_equal_text(folder: Path, model: Any) -> None:
    """Compare a prompt and a token more with the whole model, which is called with texts as a user calls it."""
    backend, ids = Driver.of(folder), prompts()[1]
    for rows, known in (([(0, ids[:-1])], ids[:-1]), ([(0, ids[-1:])], ids)):
        with torch.no_grad():
            want = model(input_ids=torch.tensor([known])).logits[0, -1].float().numpy()
        np.testing.assert_allclose(backend.feed(rows)[0], want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    backend.close()


QUICK = ("qwen2_5_vl", "qwen3_vl_moe", "llama4")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in MULTIMODAL if n not in QUICK)]
)
def test_texts_of_a_model_of_images_equal_transformers(tmp_path: Path, name: str) -> None:
    assert_equal_text(tmp_path, made(tmp_path, name))


def test_experts_in_transposed_tensors_of_qwen_3_vl_are_read(tmp_path: Path) -> None:
    model = made(tmp_path, "qwen3_vl_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    fused = [name for name in tensors if "experts." in name]
    assert len(fused) == 6
    turned = {name: tensors[name].transpose(1, 2).contiguous() for name in fused}
    save_file(tensors | turned, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal_text(tmp_path, model)


@pytest.mark.parametrize("prefix", ["model.language_model.", "model.text_model.", "text_model."])
def test_prefixes_of_other_versions_and_models_are_removed(tmp_path: Path, prefix: str) -> None:
    model = make_llava(tmp_path)

    def rule(name: str) -> str:
        return name.replace("language_model.model.", prefix).replace("language_model.lm_head", "lm_head")

    renamed(tmp_path, rule)
    assert any(name.startswith(prefix) for name in load_file(tmp_path / "model.safetensors"))
    assert_equal_logits(tmp_path, model)


def test_a_language_part_that_was_saved_alone_beside_the_whole_configuration_is_read(tmp_path: Path) -> None:
    model = make_llava(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    own = {name.removeprefix("language_model."): t for name, t in tensors.items() if name.startswith("language_model.")}
    save_file(own, tmp_path / "model.safetensors")
    assert_equal_logits(tmp_path, model)


def test_an_engine_has_the_nested_length_and_the_dtype_of_the_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_llava(tmp_path)
    options = EngineOptions(backend=BackendOptions(backend="torch", device="cpu"), memory_limit=64 << 20)
    with caplog.at_level(logging.WARNING, "tokenmill"):
        assembled = assemble(local_source(tmp_path), options, Group(), lambda progress: None)
    assembled.close()
    assert assembled.info.max_total_tokens == 96
    assert "The llava model is multimodal. Its language part, a llama model, is served" in caplog.text
    assert "does not read" not in caplog.text
    assert lengths.of_mock(local_source(tmp_path)).total == 96


@pytest.mark.parametrize(
    "outer, nested, dtype",
    [
        ({"torch_dtype": "float16"}, {}, "float16"),
        ({}, {"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16"}, {"torch_dtype": "float32"}, "bfloat16"),
        ({"dtype": "auto"}, {"torch_dtype": None}, None),
    ],
)
def test_the_dtype_is_that_of_the_whole_model_else_of_its_language_part(
    outer: dict[str, Any], nested: dict[str, Any], dtype: str | None
) -> None:
    assert config_of({"model_type": "llava", **outer, "text_config": {**TEXT, **nested}}).dtype == dtype


def test_tied_embeddings_are_stated_by_the_language_part_or_the_whole() -> None:
    for outer, nested, tied in (({}, True, True), (True, None, True), (True, False, False), (False, True, True)):
        text = {**TEXT, "tie_word_embeddings": nested}
        if nested is None:
            del text["tie_word_embeddings"]
        config = {"model_type": "llava", "tie_word_embeddings": outer, "text_config": text}
        assert config_of(config).tie_word_embeddings == tied


def test_a_language_part_of_an_unknown_type_is_refused_by_name_and_its_length_known_to_a_mock() -> None:
    config = {"model_type": "gemma9", "text_config": {"model_type": "gemma9_text", "max_position_embeddings": 77}}
    with pytest.raises(Unsupported, match="gemma9_text"):
        programs_of(config)
    assert facts_of(config).max_positions == 77


def test_a_text_config_without_a_type_is_not_guessed() -> None:
    with pytest.raises(Unsupported, match="llava"):
        programs_of({"model_type": "llava", "text_config": {"hidden_size": 64}})
    with pytest.raises(ModelError, match="model_type"):
        programs_of({"text_config": {"hidden_size": 64}})


def test_only_the_language_part_is_named_in_the_checkpoint(tmp_path: Path) -> None:
    make_llava(tmp_path)
    names = set(open_checkpoint(local_source(tmp_path)).names())
    assert {"model.embed_tokens.weight", "lm_head.weight"} < names
    assert not [name for name in names if "vision" in name or "projector" in name]
