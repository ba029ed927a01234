"""Checkpoints of every stored form and method of --quantize on the CUDA backend, against the torch backend's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file
from support_cuda import ON_GPU, CudaDriver, torch, write_random
from support_models import Driver, steps
from support_quantized import quantize_folder
from test_quant_stored import CASES

from tokenmill.backends.accounts import forms_of_weights
from tokenmill.backends.cuda.kind import KIND
from tokenmill.models.base import program_of
from tokenmill.program.cost import weights_of
from tokenmill.quant.base import load, reader_of
from tokenmill.weights.checkpoint import Safetensors

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")

DTYPE = "bfloat16"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MADE = ("int8", "int4", "fp8", "eetq", "bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4")
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}


def off(found: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


def compared(folder: Path, plain: Path, most: float, quantize: str = "") -> None:
    """Check the logits of every step against those of a folder with the numbers. Print the forms that run."""
    source = Safetensors(folder)
    forms = forms_of_weights(
        program_of(source.config), source, reader_of(source, quantize), KIND.form, "bfloat16"
    )
    print("; ".join(forms))
    gpu, want = CudaDriver(folder, dtype=DTYPE, quantize=quantize), Driver.of(plain)
    for rows in steps():
        assert off(np.asarray(gpu.feed(rows), np.float32), want.feed(rows)) < most


def written(folder: Path, numbers: dict[str, Any], config: dict[str, Any]) -> Path:
    """Write a plain checkpoint."""
    folder.mkdir()
    tensors = {name: torch.as_tensor(n).contiguous().float() for name, n in numbers.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    return folder


def made_numbers(folder: Path, quantize: str) -> dict[str, Any]:
    """Return the numbers that a method makes of a checkpoint's weights."""
    source = Safetensors(folder)
    read, numbers = reader_of(source, quantize), dict[str, Any]()
    for weight in weights_of(program_of(source.config)):
        for part in weight.parts:
            numbers[part.name] = load(replace(weight, parts=(part,), add=0.0), source, read).floats()
    return numbers


@pytest.mark.parametrize("name", CASES)
def test_a_stored_checkpoints_logits_are_those_of_its_numbers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_random(tmp_path, "llama", dtype=torch.bfloat16, spread=0.06, **SIZES)
    about, write = CASES[name]
    numbers = quantize_folder(tmp_path, about, lambda module: write if module.endswith(LINEAR) else None)
    plain = written(tmp_path / "plain", numbers, Safetensors(tmp_path).config)
    compared(tmp_path, plain, 0.1 if "fp8" in name or name == "fbgemm" else 0.03)  # FP8 quantizes activations


@pytest.mark.parametrize("quantize", MADE)
def test_a_made_models_logits_are_those_of_its_numbers(quantize: str, tmp_path: Path) -> None:
    write_random(tmp_path, "llama", dtype=torch.bfloat16, spread=0.06, **SIZES)
    plain = written(tmp_path / "plain", made_numbers(tmp_path, quantize), Safetensors(tmp_path).config)
    compared(tmp_path, plain, 0.1 if quantize == "fp8" else 0.03, quantize)
