"""Quantized matrices against the programs that write them, where they are installed and run on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_quant_stored import BNB4, BNB8, COLUMNS, ROWS, compressed, folder_of  # noqa: E402

from tokenmill.program.ops import Part, Weight  # noqa: E402
from tokenmill.quant.base import check, load, reader_of  # noqa: E402

pytestmark = pytest.mark.slow

WEIGHT = Weight((Part("l.0.a.weight", ROWS),), COLUMNS)


@pytest.fixture(autouse=True)
def _eager() -> Any:
    """Compile nothing: bitsandbytes would, for a minute."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def loaded(folder: Path, about: dict[str, Any], tensors: dict[str, Any]) -> np.ndarray:
    """Return the numbers that are read of a module's tensors."""
    source = folder_of(folder, about, {f"l.0.a.{name}": tensor for name, tensor in tensors.items()})
    check([WEIGHT], source)
    return load(WEIGHT, source, reader_of(source)).floats()


INTEGERS = [
    (bits, group, symmetric) for bits in (2, 3, 4, 5, 6, 7, 8) for group in (32, None) for symmetric in (True, False)
]


def scheme_of(**weights: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def described(scheme: Any, stored: str) -> dict[str, Any]:
    """Return what compressed-tensors writes to config.json."""
    from compressed_tensors.quantization import QuantizationConfig

    whole = QuantizationConfig(config_groups={"group_0": scheme}, format=stored).model_dump(mode="json")
    return compressed(stored) | whole


@pytest.mark.parametrize("bits, group, symmetric", INTEGERS)
def test_packed_integers_are_those_of_compressed_tensors(
    bits: int, group: int | None, symmetric: bool, tmp_path: Path
) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    strategy = "group" if group else "channel"
    scheme = scheme_of(num_bits=bits, type="int", strategy=strategy, group_size=group, symmetric=symmetric)
    w = torch.randn(ROWS, COLUMNS)
    groups = w.reshape(ROWS, -1, group or COLUMNS)
    scale = groups.abs().amax(-1) / (2 ** (bits - 1))
    state = {"weight": w, "weight_scale": scale}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-1, 1, scale.shape, dtype=torch.int8)
    compressor = compressors.PackedQuantizationCompressor
    made = compressor.compress(state, scheme)
    want = compressor.decompress(made, scheme)["weight"]
    got = loaded(tmp_path, described(scheme, "pack-quantized"), made)
    np.testing.assert_allclose(got, want.float().numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int8", "fp8", "fp8 in blocks"])
def test_other_formats_are_those_of_compressed_tensors(name: str, tmp_path: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    w = torch.randn(ROWS, COLUMNS)
    most = {width: w.reshape(ROWS, -1, width).abs().amax(-1) for width in (16, 32, COLUMNS)}
    state, more = {"weight": w}, dict[str, Any]()
    if name == "nvfp4":
        whole = 448 * 6 / w.abs().max().reshape(1)
        more = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
        state |= {"weight_scale": (most[16] / 6 * whole).to(torch.float8_e4m3fn).float(), "weight_global_scale": whole}
        compressor, stored = compressors.NVFP4PackedCompressor, "nvfp4-pack-quantized"
    elif name == "mxfp4":
        more = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
        state["weight_scale"] = (most[32] / 6).log2().ceil().exp2()
        compressor, stored = compressors.MXFP4PackedCompressor, "mxfp4-pack-quantized"
    elif name == "int8":
        more = {"num_bits": 8, "type": "int", "strategy": "channel"}
        state["weight_scale"] = most[COLUMNS] / 127
        compressor, stored = compressors.IntQuantizationCompressor, "int-quantized"
    else:
        block = name.endswith("blocks")
        more = {"num_bits": 8, "type": "float", "strategy": "block" if block else "channel"}
        more |= {"block_structure": [64, 128]} if block else {}
        state["weight_scale"] = torch.rand(3, 2) * 0.01 + 0.01 if block else most[COLUMNS] / 448
        compressor, stored = compressors.FloatQuantizationCompressor, "float-quantized"
    scheme = scheme_of(**more)
    made = compressor.compress(state, scheme)
    want = compressor.decompress(made, scheme)["weight"].float().numpy()
    got = loaded(tmp_path, described(scheme, stored), made)
    np.testing.assert_allclose(got, want, rtol=1e-2 if "4" in name else 1e-6)  # its scales of FP4 are in bfloat16


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [64, 4096])
def test_four_bits_are_those_of_bitsandbytes(kind: str, nested: bool, block: int, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(ROWS, COLUMNS)
    codes, state = functional.quantize_4bit(w, blocksize=block, quant_type=kind, compress_statistics=nested)
    tensors = {"weight": codes} | {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    want = functional.dequantize_4bit(codes, state).numpy()
    np.testing.assert_allclose(loaded(tmp_path, BNB4, tensors), want, rtol=1e-5, atol=1e-6)


def test_int8_is_that_of_bitsandbytes(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(ROWS, COLUMNS).half()
    codes, most, _ = functional.int8_vectorwise_quant(w)
    want = functional.int8_vectorwise_dequant(codes, most).float().numpy()
    np.testing.assert_allclose(loaded(tmp_path, BNB8, {"weight": codes, "SCB": most}), want, rtol=1e-5)


@pytest.mark.parametrize("block", [[128, 128], [64, 32], None])
def test_fp8_is_that_of_transformers(block: list[int] | None, tmp_path: Path) -> None:
    fine = pytest.importorskip("transformers.integrations.finegrained_fp8")
    shape = (ROWS, COLUMNS) if block != [128, 128] else (256, COLUMNS)
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(shape[0] // block[0], shape[1] // block[1]) if block else torch.rand(())
    want = fine.Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32).numpy()
    about = {"quant_method": "fp8", "weight_block_size": block}
    source = folder_of(tmp_path, about, {"l.0.a.weight": codes, "l.0.a.weight_scale_inv": scale})
    got = load(Weight((Part("l.0.a.weight", shape[0]),), COLUMNS), source, reader_of(source))
    np.testing.assert_allclose(got.floats(), want, rtol=1e-6)


def test_mxfp4_is_that_of_transformers(tmp_path: Path) -> None:
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    blocks = torch.randint(0, 256, (3, 12, 4, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 12, 4), dtype=torch.uint8)
    source = folder_of(tmp_path, {"quant_method": "mxfp4"}, {"l.0.w_blocks": blocks, "l.0.w_scales": scales})
    want = convert(blocks, scales, dtype=torch.float32).transpose(1, 2).numpy()
    for index in range(3):
        got = load(Weight((Part("l.0.w", 12, index=index),), 128, transposed=True), source, reader_of(source))
        np.testing.assert_array_equal(got.floats(), want[index])
