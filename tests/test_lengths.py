"""Maximum lengths of sequences and prompts: rope scaling extends them, tokenizers and users limit them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_models import SIZES, Driver, make_checkpoint, reference

from tokenmill.backends.base import StepLimits
from tokenmill.backends.kind import BackendOptions
from tokenmill.errors import ModelError
from tokenmill.models.base import config_of
from tokenmill.parallel.group import Group
from tokenmill.runtime import lengths
from tokenmill.runtime.assembly import EngineOptions, assemble
from tokenmill.weights.source import local_source
from tokenmill.wire.messages import EngineInfo

torch.set_num_threads(1)
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


def info_of(folder: Path, **wants: Any) -> EngineInfo:
    """Return the `EngineInfo` of an engine with the torch backend."""
    chosen = EngineOptions(backend=BackendOptions(backend="torch", device="cpu"), memory_limit=64 << 20, **wants)
    assembled = assemble(local_source(folder), chosen, Group(), lambda progress: None)
    assembled.close()
    return assembled.info


def small(folder: Path, scaling: dict[str, Any] | None, tokenizer: float | None = None, **changes: Any) -> Any:
    made = make_checkpoint(
        folder,
        "llama",
        num_hidden_layers=1,
        max_position_embeddings=64,
        rope_scaling=scaling and dict(scaling),
        **changes,
    )
    if tokenizer is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": tokenizer}))
    return made


@pytest.mark.parametrize("scaling", [YARN, LINEAR, DYNAMIC])
def test_a_stretched_context_is_the_limit_without_being_asked_and_no_warning_follows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, scaling: dict[str, Any]
) -> None:
    small(tmp_path, scaling)
    with caplog.at_level(logging.INFO, "tokenmill.runtime.lengths"):
        assert info_of(tmp_path).max_total_tokens == 256
        assert info_of(tmp_path, max_total_tokens=256).max_total_tokens == 256
    assert "stretches its 64 tokens to 256" in caplog.text
    assert not [r for r in caplog.records if r.name.startswith("tokenmill") and r.levelno > logging.INFO]
    assert info_of(tmp_path, max_total_tokens=300).max_total_tokens == 300
    assert "max_total_tokens is 300, but the model was made for 256 tokens" in caplog.text


@pytest.mark.parametrize(
    "scaling, tokenizer, total",
    [
        (None, None, 64), (None, 1e30, 64), (None, 32, 32), (None, 128, 64),
        (YARN, None, 256), (YARN, 1e30, 256), (YARN, 200, 200),
        (YARN, 64, 256), (LINEAR, 64, 256), (LINEAR, 32, 256),  # the tokenizer's length is from before the scaling
    ],
)  # fmt: skip
def test_a_tokenizers_length_counts_unless_it_is_that_of_the_unstretched_model(
    tmp_path: Path, scaling: dict[str, Any] | None, tokenizer: float | None, total: int
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", **SIZES, "max_position_embeddings": 64, "rope_scaling": scaling})
    )
    (tmp_path / "x.safetensors").touch()
    if tokenizer is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": tokenizer}))
    source = local_source(tmp_path)
    assert lengths.longest(source, lengths.of_mock(source), None) == total


def test_dynamic_scaling_takes_prompts_of_the_unstretched_length_and_longer_ones_if_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small(tmp_path, DYNAMIC)
    with caplog.at_level(logging.INFO, "tokenmill.runtime.lengths"):
        info = info_of(tmp_path)
        assert (info.max_input_tokens, info.max_total_tokens) == (64, 256)
        assert "Prompts may have 64 tokens, of the 256 of a sequence" in caplog.text
        caplog.clear()
        assert info_of(tmp_path, max_input_tokens=200).max_input_tokens == 200
    assert "max_input_tokens is 200, but of prompts of more than 64 tokens" in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING


@pytest.mark.parametrize("scaling", [YARN, LINEAR])
def test_logits_of_every_length_up_to_the_stretched_one_equal_transformers(
    tmp_path: Path, scaling: dict[str, Any]
) -> None:
    model = small(tmp_path, scaling)
    ids = np.random.default_rng(4).integers(0, 128, 250).tolist()
    driver = Driver.of(tmp_path, limits=StepLimits(256, 4, 256, 16))
    rows = [[(0, ids[:60])], [(0, ids[60:70]), (1, ids[:200])], [(1, ids[200:]), (0, [3])], [(1, [9])]]
    for some, want in zip(rows, reference(model, rows), strict=True):
        np.testing.assert_allclose(driver.feed(some), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("count", [5, 63, 64])
def test_dynamic_scaling_behind_a_prompt_of_the_allowed_length_equals_transformers(tmp_path: Path, count: int) -> None:
    model = small(tmp_path, DYNAMIC)
    ids = np.random.default_rng(4).integers(0, 128, 140).tolist()
    driver = Driver.of(tmp_path, limits=StepLimits(256, 4, 256, 16))
    cache = None
    for chunk in (ids[:count], *[[token] for token in ids[count:]]):
        with torch.no_grad():
            out = model(torch.tensor([chunk]), past_key_values=cache, use_cache=True)
        cache, want = out.past_key_values, out.logits[0, -1].numpy()
        np.testing.assert_allclose(driver.feed([(0, chunk)])[0], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_a_length_that_is_left_out_or_null_is_the_default_of_the_models_class() -> None:
    for model_type, length in {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}.items():
        config = {"model_type": model_type, **SIZES}
        del config["max_position_embeddings"]
        for more in ({}, {"max_position_embeddings": None}):
            assert lengths.of_model(config_of(config | more)).total == length


def test_a_mock_takes_the_length_of_a_model_that_is_not_known_and_of_none(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    (tmp_path / "config.json").write_text('{"model_type": "unheard", "max_position_embeddings": 77}')
    assert lengths.of_mock(local_source(tmp_path)).total == 77
    (tmp_path / "config.json").write_text('{"model_type": "unheard", "max_position_embeddings": null}')
    assert lengths.of_mock(local_source(tmp_path)).total == lengths.MOCK_LENGTH
    scaled = {"model_type": "llama", **SIZES, "max_position_embeddings": 78, "rope_scaling": {"rope_type": "new"}}
    (tmp_path / "config.json").write_text(json.dumps(scaled))
    assert lengths.of_mock(local_source(tmp_path)).total == 78
    for wrong in ('"77"', "1", "true", "7.5"):
        (tmp_path / "config.json").write_text(f'{{"max_position_embeddings": {wrong}}}')
        with pytest.raises(ModelError, match="expected a number of at least 2"):
            lengths.of_mock(local_source(tmp_path))
