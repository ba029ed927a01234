"""Quantization while loading: error bounds, and the weights that stay as they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support_shares import held

from tokenmill.program.ops import Part, Weight
from tokenmill.quant import bitsandbytes, fp8, int4, int8
from tokenmill.quant.base import Coded, load, reader_of
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source


def folder_of(tmp_path: Path, tensors: dict[str, np.ndarray]):
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    return open_checkpoint(local_source(tmp_path))


def relative_error(made: Coded, x: np.ndarray) -> float:
    away = made.floats().reshape(x.shape) - x
    return float(np.sqrt(np.square(away).mean() / np.square(x).mean()))


def test_the_error_on_normally_distributed_weights_is_what_the_documentation_says() -> None:
    x = np.random.default_rng(1).standard_normal((64, 32, 32)).astype(np.float32) * 0.02
    assert 0.004 < relative_error(int8.blocks(x), x) < 0.006
    assert 0.06 < relative_error(int4.blocks(x), x) < 0.077


def test_no_number_of_int8_moves_by_more_than_half_a_step() -> None:
    x = np.random.default_rng(2).standard_normal((16, 8, 32)).astype(np.float32)
    made = int8.blocks(x)
    step = made.scale.astype(np.float32)[..., None]
    assert (np.abs(made.floats().reshape(x.shape) - x) <= step * 0.5 + np.abs(x).max() * 2e-3).all()


@pytest.mark.parametrize("method", [int4, int8])
@pytest.mark.parametrize("value", [0.0, 3.0, -1e-9, 6e4])
def test_blocks_of_one_number_keep_it(method, value) -> None:
    x = np.full((2, 3, 32), value, np.float32)
    np.testing.assert_allclose(method.blocks(x).floats().reshape(x.shape), x, rtol=4e-3, atol=1e-7)


def test_a_scale_that_float16_does_not_hold_leaves_numbers_finite() -> None:
    x = np.random.default_rng(3).standard_normal((2, 2, 32)).astype(np.float32) * np.float32(1e9)
    assert np.isfinite(int8.blocks(x).floats()).all()
    assert np.isfinite(int4.blocks(x).floats()).all()


def test_vectors_and_odd_sizes_stay_and_tables_get_8_bits(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in (("a", (6, 64)), ("b", (6, 40)), ("c", (6,)))}
    source = folder_of(tmp_path, tensors)
    read = reader_of(source, "int4")
    a = load(Weight((Part("a", 6),), 64), source, read)
    assert (a.format, a.shape) == ("u4", (6, 64))
    np.testing.assert_array_equal(a.floats(), int4.blocks(tensors["a"].reshape(6, 2, 32)).floats())
    table = load(Weight((Part("a", 6),), 64, table=True), source, read)
    assert table.format == "i8"
    for name, columns in (("b", 40), ("c", 0)):
        kept = load(Weight((Part(name, 6),), columns), source, read)
        assert kept.dense
        np.testing.assert_array_equal(kept.floats(), tensors[name])


@pytest.mark.parametrize("method", ["int4", "int8", "fp8", "eetq", "bitsandbytes", "bitsandbytes-nf4"])
def test_ranks_hold_the_numbers_that_one_rank_makes(method: str, tmp_path: Path) -> None:
    """A scale is that of a whole row or block, whatever columns a rank holds; the last of three has zeros."""
    source = folder_of(tmp_path, {"w": np.random.default_rng(6).standard_normal((4, 1088)).astype(np.float32)})
    whole = Weight((Part("w", 4),), 1088, "row", 64, heads=(17, 17))
    want = load(whole, source, reader_of(source, method))
    for rank in range(3):
        got = load(replace(whole, ranks=3), source, reader_of(source, method), rank)
        assert (got.format, got.dense) == (want.format, False)
        np.testing.assert_array_equal(got.floats(), held(want.floats(), whole.axis(1088), 3, rank, 1))


def test_a_rank_quantizes_its_own_rows_and_columns(tmp_path: Path) -> None:
    a = np.random.default_rng(5).standard_normal((8, 128)).astype(np.float32)
    source = folder_of(tmp_path, {"a": a})
    whole = int8.blocks(a.reshape(8, 4, 32)).floats()
    read = reader_of(source, "int8")
    for rank in range(2):
        row = load(Weight((Part("a", 8),), 128, "row", ranks=2), source, read, rank).floats()
        np.testing.assert_array_equal(row, whole[:, 64 * rank : 64 * rank + 64])
        column = load(Weight((Part("a", 8),), 128, "column", ranks=2), source, read, rank).floats()
        np.testing.assert_array_equal(column, whole[4 * rank : 4 * rank + 4])


def products(folder: Path) -> tuple[np.ndarray, dict[str, Weight], Any]:
    """Return a matrix, its weights by how a program uses it, and the checkpoint."""
    a = np.random.default_rng(6).standard_normal((24, 128)).astype(np.float32) * 0.02
    part = (Part("a", 24),)
    weights = {
        "product": Weight(part, 128, "column"), "table": Weight(part, 128, "vocab", table=True),
        "head": Weight(part, 128, "vocab"), "router": Weight(part, 128, exact=True),
    }  # fmt: skip
    return a, weights, folder_of(folder, {"a": a})


MADE = {
    "fp8": ("e4m3", (1, 0), 0.028),
    "eetq": ("i8", (1, 0), 0.008),
    "bitsandbytes": ("i8", (1, 0), 0.008),
    "bitsandbytes-nf4": ("nf4", (1, 64), 0.1),
    "bitsandbytes-fp4": ("fp4", (1, 64), 0.13),
}
"""Name that --quantize has -> format, block and the most relative error on normally distributed weights"""


@pytest.mark.parametrize("name", MADE)
def test_products_are_quantized_and_tables_heads_and_routers_stay(name: str, tmp_path: Path) -> None:
    a, weights, source = products(tmp_path)
    format_, block, error = MADE[name]
    read = reader_of(source, name)
    for use, weight in weights.items():
        made = load(weight, source, read)
        if use == "product":
            assert (made.format, made.block) == (format_, block)
            assert error / 2 < relative_error(made, a) < error
        else:
            np.testing.assert_array_equal(made.floats(), a)
    for rank in range(2):
        halves = load(replace(weights["product"], ranks=2), source, read, rank).floats()
        np.testing.assert_array_equal(halves, load(weights["product"], source, read).floats()[12 * rank :][:12])


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("value", [0.0, 3.0, -1e-9, 6e4])
def test_a_matrix_of_one_number_keeps_it(name: str, value: float, tmp_path: Path) -> None:
    source = folder_of(tmp_path, {"a": np.full((3, 64), value, np.float32)})
    made = load(Weight((Part("a", 3),), 64), source, reader_of(source, name)).floats()
    narrow = {"rtol": 4e-3, "atol": 1e-7} if name == "eetq" else {"rtol": 1e-6, "atol": 1e-30}  # scales in float16
    np.testing.assert_allclose(made, value, **narrow)


def test_numbers_round_to_the_nearest_of_e4m3_as_by_torch() -> None:
    torch = pytest.importorskip("torch")
    every = np.arange(0, 1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    every = every[np.abs(every) <= 464]  # those beyond are NaN to torch
    want = torch.from_numpy(every).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(fp8.to_e4m3(every), want)
    assert fp8.to_e4m3(np.array([1e9, -1e9], np.float32)).tolist() == [0x7E, 0xFE]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bits_are_those_of_bitsandbytes(name: str) -> None:
    """Which computes them on a CPU."""
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(6, 256)
    packed, state = functional.quantize_4bit(x, blocksize=64, quant_type=name)
    made = bitsandbytes.four_bit_blocks(x.numpy().reshape(6, 4, 64), name)
    np.testing.assert_allclose(made.floats(), functional.dequantize_4bit(packed, state).numpy(), rtol=1e-5, atol=1e-6)
