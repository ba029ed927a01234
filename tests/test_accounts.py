"""Forms of a model's matrices, as the log, `/info` and doctor report them: stored how, run how, and how many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from support_models import make_checkpoint  # noqa: E402
from support_quantized import Writer, fp8, packed, quantize_folder  # noqa: E402
from test_quant_stored import CASES, compressed  # noqa: E402

from tokenmill.backends.accounts import forms_of_weights  # noqa: E402
from tokenmill.backends.cpu.kind import KIND as CPU  # noqa: E402
from tokenmill.backends.torch.kind import KIND as TORCH  # noqa: E402
from tokenmill.models.base import program_of  # noqa: E402
from tokenmill.quant.base import reader_of  # noqa: E402
from tokenmill.weights.checkpoint import Safetensors  # noqa: E402

MIXED = compressed("mixed-precision") | {
    "config_groups": {
        "a": {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}},
        "b": {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
    },
}


def mixed(module: str) -> Writer | None:
    if "layers.1.mlp" in module:
        return None
    if "self_attn" in module:
        return packed(4, 32, zeros="packed")
    return fp8((1, 0), "weight_scale") if "mlp" in module else None


def forms(folder: Path, kind: Any, dtype: str, quantize: str = "") -> set[str]:
    source = Safetensors(folder)
    return set(forms_of_weights(program_of(source.config), source, reader_of(source, quantize), kind.form, dtype))


def test_matrices_are_counted_by_how_they_are_stored_and_run(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    quantize_folder(tmp_path, MIXED, mixed)
    assert forms(tmp_path, TORCH, "float32") == {
        "6 × u4 with groups of 32, zero points: converted to float32 at load",
        "4 × e4m3 with a scale a row: converted to float32 at load",
        "3 × bfloat16: float32",
    }
    assert forms(tmp_path, CPU, "float32") == {
        "6 × u4 with groups of 32, zero points: int4wide",
        "4 × e4m3 with a scale a row: converted to f16 at load: no kernel multiplies its codes",
        "3 × bfloat16: bf16",
    }


def test_matrices_on_a_gpu_are_counted_by_how_they_are_stored_and_run(tmp_path: Path) -> None:
    pytest.importorskip("support_cuda")  # before any kernel, so that other tests run them under the interpreter
    from tokenmill.backends.cuda.kind import KIND as CUDA

    make_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    quantize_folder(tmp_path, MIXED, mixed)
    assert forms(tmp_path, CUDA, "bfloat16") == {
        "6 × u4 with groups of 32, zero points: packed as int4, groups of 32 with zero points",
        "4 × e4m3 with a scale a row: FP8; up to 16 rows activations stay in bfloat16",
        "3 × bfloat16: bfloat16",
    }
    lines = forms(tmp_path, CUDA, "float32")
    assert sum("converted to float32 at load: products in float32 are" in line for line in lines) == 2


@pytest.mark.parametrize("name", ["", "int8", "fp8", "bitsandbytes-nf4"])
def test_matrices_made_while_loading_are_counted_as_made(name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    lines = forms(tmp_path, CPU, "float32", name)
    if name == "":
        assert lines == {"13 × float32: f32"}
    elif name == "int8":
        assert lines == {"13 × i8 with groups of 32: int8"}
    else:
        stored = "e4m3 with a scale a row" if name == "fp8" else "nf4 with groups of 64"
        assert {line.split(": ")[0] for line in lines} == {f"12 × {stored}", "1 × float32"}


def test_a_cpus_bytes_are_those_of_the_packed_forms(tmp_path: Path) -> None:
    """FP8 takes 16 bits a weight there; int4 made while loading takes five."""
    make_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    source = Safetensors(tmp_path)
    program = program_of(source.config)
    plain = CPU.weight_bytes(program, source, "float32")
    assert plain == sum(map(source.nbytes, source.names()))
    head, tables = 2 * 128 * 64, 2 * 2 * 128 * 64
    vectors = 2 * 64 * 7
    matrices = plain - tables - vectors
    assert CPU.weight_bytes(program, source, "float32", "int4") == (matrices + head) * 5 // 16 + head + vectors
    about, write = CASES["fp8 in blocks"]
    quantize_folder(tmp_path, about, lambda module: write if "proj" in module else None)
    assert CPU.weight_bytes(program, Safetensors(tmp_path), "float32") == plain


@pytest.mark.parametrize(
    "name, note",
    [
        ("w8a8", "the checkpoint's quantization of activations, int8, is not applied"),
        ("w8a8 fp8", ""),
        ("int4, rows", ""),
        ("modelopt nvfp4", "the checkpoint's quantization of activations, float4, is not applied"),
        ("bitsandbytes int8", "bitsandbytes' quantization of activations, int8 but for outliers, is not applied"),
        ("nf4", ""),
    ],
)
def test_activations_that_are_not_quantized_here_are_told(name: str, note: str, tmp_path: Path) -> None:
    about, write = CASES[name]
    if "config_groups" in about and name != "int4, rows":
        kind = "float" if "fp8" in name else "int"
        activations = {"input_activations": {"num_bits": 8, "type": kind, "dynamic": True}}
        about = about | {"config_groups": {"group_0": about["config_groups"]["group_0"] | activations}}
    make_checkpoint(tmp_path, "llama")
    quantize_folder(tmp_path, about, lambda module: write if "proj" in module else None)
    lines = [line for line in forms(tmp_path, TORCH, "float32") if "×" not in line]
    assert len(lines) == bool(note)
    assert note in "".join(lines)


def test_experts_are_counted_by_one_of_each_layer(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3_moe")
    about, write = CASES["fp8 in blocks"]
    quantize_folder(tmp_path, about, lambda module: write if ".experts." in module else None)
    assert "48 × e4m3 with blocks of 128 × 128: converted to float32 at load" in forms(tmp_path, TORCH, "float32")
