"""Matrices that checkpoints store quantized, against a plain dequantizing written from the formats' definitions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402
from support_quantized import (  # noqa: E402
    Writer,
    four_bits,
    fp8,
    int8,
    mx,
    mxfp4,
    mxfp8,
    nvfp4,
    packed,
    pairs,
)
from support_shares import held  # noqa: E402

from tokenmill.program.ops import Part, Weight  # noqa: E402
from tokenmill.program.share import Axis  # noqa: E402
from tokenmill.quant.base import check, load, load_parts, reader_of, stored_names  # noqa: E402
from tokenmill.weights.checkpoint import Safetensors  # noqa: E402

ONE = torch.tensor(0.02)


def compressed(stored: str, more: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """compressed-tensors' description of one group of all linear layers."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    groups = {"config_groups": {"group_0": group}}
    return {"quant_method": "compressed-tensors", "format": stored, "ignore": ["lm_head"], **groups, **(more or {})}


def grouped(bits: int, width: int, **more: Any) -> dict[str, Any]:
    fields = {"num_bits": bits, "type": "int", "strategy": "group" if width else "channel", "group_size": width or None}
    return compressed("pack-quantized", **fields, **more)


def floating(strategy: str, **more: Any) -> dict[str, Any]:
    return compressed("float-quantized", num_bits=8, type="float", strategy=strategy, **more)


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
INT8 = compressed("int-quantized", num_bits=8, type="int", strategy="channel")

CASES: dict[str, tuple[dict[str, Any], Writer]] = {
    "fp8 in blocks": (BLOCKS, fp8((128, 128))),
    "fp8 in other blocks": (BLOCKS | {"weight_block_size": [64, 32]}, fp8((64, 32))),
    "mxfp8": (BLOCKS | {"quant_method": "mxfp8", "weight_block_size": [1, 32]}, mxfp8("weight_scale_inv")),
    "fp8, a scale": (FP8, fp8((0, 0), shape=(), activation_scale=ONE)),
    "fp8, a scale of AutoFP8": (FP8, fp8((0, 0), "weight_scale", shape=(1,), input_scale=ONE)),
    "fp8, e5m2": (FP8 | {"fmt": "e5m2"}, fp8((0, 0), "weight_scale", torch.float8_e5m2, shape=())),
    "fp8, scales of rows": (FP8, fp8((1, 0), "weight_scale")),
    "fbgemm": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        fp8((1, 0), "weight_scale", input_scale_ub=torch.tensor([1200.0])),
    ),
    "modelopt fp8": (MODELOPT, fp8((0, 0), "weight_scale", shape=(), input_scale=ONE)),
    "modelopt nvfp4": (MODELOPT | {"quant_algo": "NVFP4"}, nvfp4("weight", "weight_scale_2", divides=False)),
    "int4, groups of 32": (grouped(4, 32), packed(4, 32)),
    "int4, groups of 16, zeros": (grouped(4, 16, symmetric=False), packed(4, 16, zeros="packed")),
    "int4, rows": (grouped(4, 0), packed(4)),
    "int4, plain zeros": (grouped(4, 32, symmetric=False), packed(4, 32, zeros="plain", dtype=torch.bfloat16)),
    "int4, act-order": (grouped(4, 32, actorder="group"), packed(4, 32, order=True)),
    "int4, act-order, zeros": (grouped(4, 16, symmetric=False), packed(4, 16, order=True, zeros="packed")),
    "int8 in words": (grouped(8, 32), packed(8, 32)),
    "int8 in words, rows, zeros": (grouped(8, 0, symmetric=False), packed(8, zeros="packed")),
    "int2": (grouped(2, 32), packed(2, 32)),
    "int3": (grouped(3, 32), packed(3, 32)),
    "int3, a stream, zeros": (grouped(3, 32, symmetric=False), packed(3, 32, zeros="packed", stream=True)),
    "int5, a stream": (grouped(5, 32), packed(5, 32, stream=True)),
    "int6": (grouped(6, 32), packed(6, 32)),
    "int7, a stream": (grouped(7, 32), packed(7, 32, stream=True)),
    "w8a8": (INT8, int8()),
    "w8a8, static, zeros": (INT8, int8(zeros=True, input_scale=ONE, input_zero_point=torch.tensor(3).char())),
    "int8, groups": (compressed("naive-quantized", strategy="group", group_size=32), int8(width=32)),
    "w8a8 fp8": (floating("channel"), fp8((1, 0), "weight_scale")),
    "w8a8 fp8, static": (floating("tensor"), fp8((0, 0), "weight_scale", shape=(1,), input_scale=ONE.reshape(1))),
    "w8a8 fp8, blocks": (floating("block", block_structure=[64, 64]), fp8((64, 64), "weight_scale")),
    "nvfp4": (
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        nvfp4("weight_packed", "weight_global_scale", divides=True, input_global_scale=ONE.reshape(1)),
    ),
    "mxfp4": (compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32), mxfp4),
    "mxfp8 of compressed-tensors": (
        compressed("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32), mxfp8("weight_scale"),
    ),
    "a preset": (compressed("pack-quantized") | {"config_groups": {"W4A16": ["Linear"]}}, packed(4, 128)),
    "bitsandbytes int8": (BNB8, int8("SCB", 127.0, weight_format=torch.tensor(0, dtype=torch.uint8))),
    "nf4": (BNB4, four_bits("nf4")),
    "nf4, double": (BNB4, four_bits("nf4", nested=True)),
    "nf4 stored as bfloat16": (BNB4, four_bits("nf4", storage=torch.bfloat16)),
    "fp4": (BNB4 | {"bnb_4bit_quant_type": "fp4"}, four_bits("fp4")),
    "nf4 across rows": (BNB4, four_bits("nf4", 4096)),
}
"""Name -> (quantization_config, writer of a matrix)"""
DENSE = ("nf4 across rows",)
"""Cases that no matrix of codes and scales describes."""

ROWS, COLUMNS = 192, 256


def folder_of(folder: Path, about: dict[str, Any], tensors: dict[str, Any], **config: Any) -> Safetensors:
    """Write and open a checkpoint of a layer."""
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": about, **config}))
    return Safetensors(folder)


def written(folder: Path, about: dict[str, Any], write: Writer, modules: tuple[str, ...] = ("l.0.a",)) -> Any:
    """Return a checkpoint of these modules and their numbers."""
    torch.manual_seed(0)
    tensors, numbers = dict[str, Any](), dict[str, np.ndarray]()
    for module in modules:
        parts, floats = write(torch.randn(ROWS, COLUMNS))
        tensors |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
        numbers[module] = floats.numpy()
    return folder_of(folder, about, tensors), numbers


@pytest.mark.parametrize("name", CASES)
def test_a_stored_matrix_has_the_numbers_of_its_definition(name: str, tmp_path: Path) -> None:
    source, numbers = written(tmp_path, *CASES[name])
    weight = Weight((Part("l.0.a.weight", ROWS),), COLUMNS)
    check([weight], source)
    assert set(stored_names([weight], source)) == set(source.names())
    got = load(weight, source, reader_of(source))
    assert got.dense == (name in DENSE)
    np.testing.assert_allclose(got.floats(), numbers["l.0.a"], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_ranks_read_their_shares_of_a_stored_matrix_and_zeros_beyond_it(name: str, tmp_path: Path) -> None:
    """Three ranks have borders of rows within blocks; eight have those of columns within groups of 128."""
    source, numbers = written(tmp_path, *CASES[name], modules=("l.0.a", "l.0.b"))
    ways: list[tuple[Any, int, int]] = [("column", 1, 3), ("column", 32, 4), ("row", 1, 8), ("row", 16, 3)]
    for shard, unit, ranks in ways:
        size, dim = (ROWS, 0) if shard == "column" else (COLUMNS, 1)
        heads = (size // unit, size // unit) if unit > 1 else (0, 0)
        parts = Part("l.0.a.weight", ROWS), Part("l.0.b.weight", ROWS)
        weight, layouts = Weight(parts, COLUMNS, shard, unit, heads=heads, ranks=ranks), set()
        for rank in (0, ranks - 1):
            got = load(weight, source, reader_of(source), rank)
            want = np.concatenate([held(part, weight.axis(size), ranks, rank, dim) for part in numbers.values()])
            np.testing.assert_allclose(got.floats(), want, rtol=2e-6, atol=1e-7)
            layouts.add((got.format, got.block, got.group))
        assert len(layouts) == 1, "all ranks have the same form"


def test_static_scales_of_activations_are_read(tmp_path: Path) -> None:
    for name in ("fp8, a scale", "fp8, a scale of AutoFP8", "modelopt fp8", "w8a8, static, zeros", "w8a8 fp8, static"):
        source, _ = written(tmp_path, *CASES[name])
        (matrix,) = load_parts(Weight((Part("l.0.a.weight", ROWS),), COLUMNS), source, reader_of(source))
        assert matrix.input_scale == pytest.approx(0.02)


def test_a_module_that_stayed_plain_is_read_as_stored(tmp_path: Path) -> None:
    plain = torch.randn(ROWS, COLUMNS).bfloat16()
    for about, _ in CASES.values():
        source = folder_of(tmp_path, about, {"l.0.a.weight": plain, "l.0.a.bias": plain[0]})
        weight, bias = Weight((Part("l.0.a.weight", ROWS),), COLUMNS), Weight((Part("l.0.a.bias", COLUMNS),))
        check([weight, bias], source)
        np.testing.assert_array_equal(load(weight, source, reader_of(source)).floats(), plain.float().numpy())
        np.testing.assert_array_equal(load(bias, source, reader_of(source)).floats(), plain[0].float().numpy())


def test_modelopts_own_file_describes_its_weights(tmp_path: Path) -> None:
    for algorithm, name in (("FP8", "modelopt fp8"), ("NVFP4", "modelopt nvfp4")):
        about = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm}}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(about))
        source, numbers = written(tmp_path, {}, CASES[name][1])
        weight = Weight((Part("l.0.a.weight", ROWS),), COLUMNS)
        check([weight], source)
        got = load(weight, source, reader_of(source)).floats()
        np.testing.assert_allclose(got, numbers["l.0.a"], rtol=2e-6, atol=1e-7)


def test_formats_may_differ_by_module(tmp_path: Path) -> None:
    """Groups are chosen by regular expression, by name and by class."""
    about = compressed("mixed-precision")
    about["config_groups"] = {
        "group_0": {"targets": ["re:.*down_proj$"], "weights": {"num_bits": 8, "strategy": "group", "group_size": 32}},
        "group_1": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 16}},
        "group_2": {"targets": ["l.0.c"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
    }
    writers = {"l.0.down_proj": packed(8, 32), "l.0.a": packed(4, 16), "l.0.c": fp8((1, 0), "weight_scale")}
    tensors, numbers = dict[str, Any](), dict[str, Any]()
    for module, write in writers.items():
        parts, numbers[module] = write(torch.randn(64, 128))
        tensors |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
    source = folder_of(tmp_path, about, tensors)
    weights = [Weight((Part(f"{module}.weight", 64),), 128) for module in writers]
    check(weights, source)
    for weight, want in zip(weights, numbers.values(), strict=True):
        np.testing.assert_allclose(load(weight, source, reader_of(source)).floats(), want, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_mxfp4_experts_have_the_numbers_of_their_definition(ranks: int, tmp_path: Path) -> None:
    """Stacked, gate and up in alternate rows; three ranks share a block of columns."""
    torch.manual_seed(0)
    codes, exponents, numbers = zip(*(mx(torch.randn(12, 96)) for _ in range(3)), strict=True)
    blocks = torch.stack([pairs(each).reshape(12, 3, 16) for each in codes])
    source = folder_of(
        tmp_path, {"quant_method": "mxfp4"}, {"l.0.w_blocks": blocks, "l.0.w_scales": torch.stack(exponents)}
    )
    for index, want in enumerate(numbers):
        halves = tuple(Part("l.0.w", 6, start, run=1, step=2, index=index) for start in (0, 1))
        gate_up = Weight(halves, 96, "column", transposed=True, ranks=ranks)
        down = Weight((Part("l.0.w", 12, index=index),), 96, "row", transposed=True, ranks=ranks)
        stacks = [replace(gate_up, ranks=1), replace(down, ranks=1)]
        check([replace(w, parts=(replace(p, index=2),)) for w in stacks for p in w.parts], source)
        n = 6 // ranks
        for rank in range(ranks):
            got = load(gate_up, source, reader_of(source), rank)
            assert not got.dense
            rows = [want[start::2][rank * n : rank * n + n] for start in (0, 1)]
            np.testing.assert_array_equal(got.floats(), torch.cat(rows).numpy())
            got = load(down, source, reader_of(source), rank)
            assert not got.dense
            np.testing.assert_array_equal(got.floats(), held(want.numpy(), Axis(96), ranks, rank, 1))


def test_fp8_experts_stacked_by_transformers_have_the_numbers_of_their_definition(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = [fp8((32, 32), "scale_inv")(torch.randn(64, 96)) for _ in range(3)]
    tensors = {
        "l.0.w": torch.stack([parts["weight"] for parts, _ in made]),
        "l.0.w_scale_inv": torch.stack([parts["scale_inv"] for parts, _ in made]),
        "l.0.w_activation_scale": torch.tensor([0.1, 0.2, 0.3]),
    }
    source = folder_of(tmp_path, FP8 | {"weight_block_size": [32, 32]}, tensors)
    weights = [Weight((Part("l.0.w", 64, index=index),), 96) for index in range(3)]
    check(weights, source)
    for index, weight in enumerate(weights):
        got = load(weight, source, reader_of(source))
        np.testing.assert_allclose(got.floats(), made[index][1].numpy(), rtol=1e-6)
        assert got.input_scale == pytest.approx(0.1 * (index + 1))


def test_llama_4s_experts_of_fbgemm_have_the_numbers_of_their_definition(tmp_path: Path) -> None:
    """Stored (inputs, outputs): scales of gate and up are a row, those of down a column."""
    torch.manual_seed(0)
    up, down = ([fp8((1, 0), "scale")(torch.randn(*shape)) for _ in range(2)] for shape in ((64, 32), (32, 48)))
    tensors = {
        "l.0.up": torch.stack([parts["weight"].T for parts, _ in up]),
        "l.0.up_scale": torch.stack([parts["scale"].T for parts, _ in up]),
        "l.0.down": torch.stack([parts["weight"].T for parts, _ in down]),
        "l.0.down_scale": torch.stack([parts["scale"] for parts, _ in down]),
    }
    source = folder_of(tmp_path, {"quant_method": "fbgemm_fp8"}, tensors)
    ups = [Weight((Part("l.0.up", 64, index=i),), 32, transposed=True) for i in range(2)]
    downs = [Weight((Part("l.0.down", 32, index=i),), 48, transposed=True) for i in range(2)]
    check([*ups, *downs], source)
    for weight, (_, numbers) in zip([*ups, *downs], [*up, *down], strict=True):
        got = load(weight, source, reader_of(source))
        assert got.format == "e4m3"
        np.testing.assert_allclose(got.floats(), numbers.numpy(), rtol=1e-6)
