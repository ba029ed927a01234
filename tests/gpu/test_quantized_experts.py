"""Experts with quantized weights on a GPU: layers of real sizes against torch, checkpoints against their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_cuda import ON_GPU, CudaDriver, torch, write_random
from support_models import Driver, steps
from support_quantized import plain_folder, quantize_folder, quantize_gpt_oss
from test_experts import check_layer
from test_quant_stored import CASES

from tokenmill.backends.cuda.expert_banks import CodedStack

if ON_GPU:
    from bench.gpu.coded_stacks import FORMS
    from bench.gpu.experts import Layer, Shape
    from tokenmill.backends.cuda.device import Device

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
GPT_OSS = (2880, 2880, 32, 4, "quick_gelu", True, {"limit": 7.0, "up_offset": 1.0})


@pytest.mark.parametrize(
    "sizes, form",
    [
        (GPT_OSS, "mxfp4"), ((2048, 768, 128, 8), "int4"), ((4096, 2048, 8, 2), "awq"), ((1024, 1408, 60, 4), "q4_k"),
        ((7168, 256, 256, 8), "fp8-block"), ((2048, 768, 128, 8), "fp8"), ((1024, 704, 60, 4), "q8_0"),
        ((1024, 512, 16, 2), "nf4"), ((512, 96, 512, 10), "int4-32"), ((1000, 360, 8, 3), "int8"),
    ],
)  # fmt: skip
def test_layers_of_real_sizes_equal_torch_and_repeat_to_the_bit(sizes: tuple[Any, ...], form: str) -> None:
    layer = Layer(Shape(*sizes), 0, 1500, Device("cuda"), FORMS[form])
    check_layer(layer)


def compared(folder: Path, numbers: dict[str, Any], most: float, **options: Any) -> None:
    """Compare the logits of every step with those of the numbers. A near tie of experts may go another way."""
    gpu, want = CudaDriver(folder, dtype="bfloat16", **options), Driver.of(plain_folder(folder, numbers))
    assert all(isinstance(s, CodedStack) or s.dim() == 2 for s in gpu._weights.stacks.values()), "biases have 2"
    for rows in steps():
        made, wanted = np.asarray(gpu.feed(rows), np.float32), want.feed(rows)
        assert np.median(np.linalg.norm(made - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)) < most


@pytest.mark.parametrize("name", ["fp8 in blocks", "w8a8 fp8", "int4, groups of 16, zeros", "nf4", "mxfp4"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_checkpoints_logits_are_those_of_its_numbers(name: str, deterministic: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    write_random(tmp_path, "mixtral", dtype=torch.bfloat16, spread=0.06, **sizes)
    about, write = CASES[name]
    numbers = quantize_folder(tmp_path, about, lambda module: write if module.endswith(("w1", "w2", "w3")) else None)
    compared(tmp_path, numbers, 0.03, deterministic=deterministic)


def test_gpt_oss_in_mxfp4_has_the_logits_of_its_numbers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 2}
    write_random(tmp_path, "gpt_oss", dtype=torch.bfloat16, spread=0.06, **sizes)
    compared(tmp_path, quantize_gpt_oss(tmp_path), 0.03)
