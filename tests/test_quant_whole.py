"""Whole models with quantized weights, against transformers with the numbers that the weights stand for."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402
from support_models import Driver, make_checkpoint, reference, steps  # noqa: E402
from support_quantized import Writer, fp8, int8, packed, plain_folder, quantize_folder, quantize_gpt_oss  # noqa: E402
from test_quant_stored import CASES, compressed  # noqa: E402

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def mixed(module: str) -> Writer | None:
    """Attention in int4, feed-forward in FP8 but for one layer's, and the head in int8."""
    if module == "lm_head":
        return int8()
    if not module.endswith(LINEAR) or "layers.1.mlp" in module:
        return None
    return packed(4, 32, zeros="packed") if "self_attn" in module else fp8((1, 0), "weight_scale")


MIXED = compressed("mixed-precision") | {
    "config_groups": {
        "a": {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}},
        "b": {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
        "c": {"targets": ["re:lm_head"], "weights": {"num_bits": 8, "strategy": "channel"}},
    },
    "ignore": ["re:.*layers.1.mlp.*"],
}
OFTEN = ("fp8 in blocks", "int4, act-order", "nf4, double", "mixed")
MODELS: dict[str, tuple[dict[str, Any], Any]] = {
    name: (about, lambda module, write=write: write if module.endswith(LINEAR) else None)
    for name, (about, write) in CASES.items()
} | {"mixed": (MIXED, mixed)}


def compared(folder: Path, model: Any, numbers: dict[str, Any]) -> None:
    """Check the logits of every step against transformers' with these numbers."""
    missing = model.load_state_dict({name: n.float() for name, n in numbers.items()}, strict=False)
    assert not missing.unexpected_keys
    driver = Driver.of(folder)
    for rows, want in zip(steps(), reference(model, steps()), strict=True):
        np.testing.assert_allclose(driver.feed(rows), want, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow) for name in MODELS]
)
def test_a_quantized_models_logits_are_those_of_its_numbers(name: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama")
    compared(tmp_path, model, quantize_folder(tmp_path, *MODELS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama_tied_with_biases"])
@pytest.mark.parametrize("name", ["fp8, a scale of AutoFP8", "int4, groups of 16, zeros", "w8a8", "nf4", "mxfp4"])
def test_a_quantized_embedding_and_head_are_those_of_their_numbers(name: str, family: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, family)
    about, write = CASES[name]
    whole = about | {"ignore": [], "modules_to_not_convert": []}
    compared(tmp_path, model, quantize_folder(tmp_path, whole, lambda module: write))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fp8 in blocks", "int4, plain zeros", "w8a8", "mxfp4", "mixed"]
)
def test_the_cpu_backends_logits_are_near_those_of_the_numbers(name: str, tmp_path: Path) -> None:
    """Its activations have 8 bits where weights are integers."""
    pytest.importorskip("numba")
    from support_cpu import CpuDriver

    model = make_checkpoint(tmp_path, "llama")
    numbers = quantize_folder(tmp_path, *MODELS[name])
    model.load_state_dict({name: n.float() for name, n in numbers.items()}, strict=False)
    with closing(CpuDriver.of(tmp_path)) as driver:
        for rows, want in zip(steps(), reference(model, steps()), strict=True):
            got = np.asarray(driver.feed(rows))[:, : want.shape[1]]
            assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


@pytest.mark.parametrize(
    "family, name",
    [
        ("qwen3_moe", "fp8 in blocks"),
        pytest.param("mixtral", "int4, groups of 16, zeros", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "fp8 in blocks", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "w8a8 fp8", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "nvfp4", marks=pytest.mark.slow),
    ],
)
def test_quantized_experts_of_modules_of_their_own_are_those_of_their_numbers(
    family: str, name: str, tmp_path: Path
) -> None:
    """As every checkpoint of these formats has them, under the names of transformers' older modules."""
    model = make_checkpoint(tmp_path, family)
    about, write = CASES[name]
    modules = (*LINEAR, "w1", "w2", "w3", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
    numbers = quantize_folder(tmp_path, about, lambda module: write if module.endswith(modules) else None)
    plain = plain_folder(tmp_path, numbers)
    reloaded = type(model).from_pretrained(plain, dtype=torch.float32, attn_implementation="eager")
    compared(tmp_path, reloaded.eval(), {})


def test_gpt_oss_in_mxfp4_has_the_logits_of_its_numbers(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "gpt_oss", hidden_size=64, intermediate_size=96)
    compared(tmp_path, model, quantize_gpt_oss(tmp_path))


def test_fused_experts_in_fp8_are_those_of_modules_of_their_own(tmp_path: Path) -> None:
    """Two tensors of a layer, each with one of the scales of blocks, as transformers holds them."""
    make_checkpoint(tmp_path, "qwen3_moe", num_hidden_layers=1)
    about = CASES["fp8 in other blocks"][0] | {"weight_block_size": [16, 32]}
    quantize_folder(tmp_path, about, lambda module: fp8((16, 32)) if ".experts." in module else None)
    separate, path = Driver.of(tmp_path), tmp_path / "model.safetensors"
    expected = [separate.feed(rows) for rows in steps()]
    tensors, prefix = load_file(path), "model.layers.0.mlp.experts"
    for kind, suffix in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
        parts = [[tensors.pop(f"{prefix}.{i}.{name}_proj.{kind}") for i in range(8)] for name in ("gate", "up", "down")]
        dtype, (gate, up, down) = parts[0][0].dtype, ([part.view(torch.uint8) for part in each] for each in parts)
        gate_up = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        tensors[f"{prefix}.gate_up_proj{suffix}"] = torch.stack(gate_up).view(dtype)
        tensors[f"{prefix}.down_proj{suffix}"] = torch.stack(down).view(dtype)
    save_file(tensors, path, {"format": "pt"})
    fused = Driver.of(tmp_path)
    for rows, logits in zip(steps(), expected, strict=True):
        np.testing.assert_array_equal(fused.feed(rows), logits)
