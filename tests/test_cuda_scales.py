"""Scales of an FP8 cache, read from real files under every name in use."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support_backends import choice_of, make
from support_cpu import kernel_folder
from support_cuda import CudaDriver, torch, write_random
from support_models import steps

from tokenmill.backends.cuda.scales import kv_scales
from tokenmill.models.base import program_of
from tokenmill.weights.checkpoint import Safetensors, open_checkpoint
from tokenmill.weights.source import local_source


def checkpoint(folder: Path, **scales: object) -> Safetensors:
    """Write a checkpoint of scales alone. `scales`: by name, with `__` for a dot."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tensors = {name.replace("__", "."): torch.as_tensor(value) for name, value in scales.items()}
    save_file(tensors | {"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    return Safetensors(folder)


@pytest.mark.parametrize("of_keys, of_values", [
    ("self_attn.k_scale", "self_attn.v_scale"),
    ("self_attn.attn.k_scale", "self_attn.attn.v_scale"),
    ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
    ("self_attn.qkv_proj.k_scale", "self_attn.qkv_proj.v_scale"),
])  # fmt: skip
def test_every_name_in_use_is_found(of_keys: str, of_values: str, tmp_path: Path) -> None:
    scales = {f"model.layers.1.{of_keys}": 0.25, f"model.layers.1.{of_values}": torch.tensor([0.5])}
    assert kv_scales(checkpoint(tmp_path, **scales), range(3)) == {0: (1, 1), 1: (0.25, 0.5), 2: (1, 1)}


@pytest.mark.parametrize("name", ["model.layers.12.self_attn.kv_scale", "transformer.h.12.attn.attn.kv_scale"])
def test_one_scale_for_both_serves_both_unless_one_has_its_own(name: str, tmp_path: Path) -> None:
    own = {name.rpartition(".")[0] + ".v_scale": 3.0}
    assert kv_scales(checkpoint(tmp_path, **{name: 2.0}), [12]) == {12: (2, 2)}
    assert kv_scales(checkpoint(tmp_path, **{name: 2.0}, **own), [12]) == {12: (2, 3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_scale_may_be_stored_in_any_format_and_the_largest_of_a_layers_heads_fits_all(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    made = torch.tensor([[0.125], [0.75], [0.5]], dtype=dtype)
    assert kv_scales(checkpoint(tmp_path, model__layers__0__self_attn__k_scale=made), [0]) == {0: (0.75, 1)}


def test_other_scales_and_other_layers_are_not_taken_for_it(tmp_path: Path) -> None:
    names = ("self_attn.k_proj.weight_scale", "self_attn.k_proj.input_scale", "self_attn.q_proj.output_scale",
             "self_attn.v_proj.k_scale", "mlp.k_scale", "self_attn.k_scale.extra")  # fmt: skip
    scales = {f"model.layers.0.{name}": 9.0 for name in names} | {"model.layers.7.self_attn.k_scale": 9.0}
    assert kv_scales(checkpoint(tmp_path, **scales), [0, 1]) == {0: (1, 1), 1: (1, 1)}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_counts_as_1_and_is_told(
    value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert kv_scales(checkpoint(tmp_path, model__layers__0__self_attn__v_scale=value), [0]) == {0: (1, 1)}
    assert "self_attn.v_scale is" in caplog.text


def test_a_format_of_wide_range_has_no_scales(tmp_path: Path) -> None:
    stored = checkpoint(tmp_path, model__layers__0__self_attn__k_scale=0.25)
    assert kv_scales(stored, [0], "fp8_e5m2") == {0: (1, 1)}
    assert kv_scales(stored, [0], "fp8_e4m3fn") == {0: (0.25, 1)}


def test_a_checkpoint_with_scales_is_served_by_every_backend_without_a_complaint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_random(tmp_path, "llama", num_hidden_layers=2)
    plain = CudaDriver(tmp_path).feed(steps()[0])
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        tensors |= {f"model.layers.{layer}.self_attn.{name}_scale": torch.tensor(0.5) for name in ("k", "v")}
    save_file(tensors, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        source = open_checkpoint(local_source(tmp_path))
        for name in ("cpu", "torch"):
            folder = str(kernel_folder())
            make(choice_of(name), program_of(source.config), source, kernel_cache=folder, cpu_threads=1).close()
        assert (CudaDriver(tmp_path).feed(steps()[0]) == plain).all()
    assert caplog.text == ""
