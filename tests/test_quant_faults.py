"""Checkpoints whose quantized weights do not fit their description, and methods that are not read: one error each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from support_quantized import Writer, four_bits, fp8, int8, mx, mxfp4, packed, pairs  # noqa: E402
from test_quant_stored import (  # noqa: E402
    BLOCKS,
    BNB4,
    BNB8,
    CASES,
    COLUMNS,
    FP8,
    INT8,
    MODELOPT,
    ROWS,
    compressed,
    folder_of,
    grouped,
    written,
)

from tokenmill.errors import ArgumentError, ModelError, Unsupported  # noqa: E402
from tokenmill.program.ops import Part, Weight  # noqa: E402
from tokenmill.quant import _refused  # noqa: E402
from tokenmill.quant.base import check, load, reader_of  # noqa: E402

WEIGHT = Weight((Part("l.0.a.weight", ROWS),), COLUMNS)


def changed(write: Writer, **tensors: Any) -> Writer:
    """Return a writer whose tensors are replaced; None: left out; a function: of the tensor. `__` stands for a dot."""

    def made(w: Any) -> Any:
        parts, numbers = write(w)
        for name, change in tensors.items():
            name = name.replace("__", ".")
            if change is None:
                del parts[name]
            else:
                parts[name] = change(parts[name]) if callable(change) else change
        return parts, numbers

    return made


def state(text: str) -> Any:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


NVFP4 = CASES["nvfp4"][0]
BITS_3 = compressed("pack-quantized", num_bits=9, type="int", strategy="channel")
FAULTS: dict[str, tuple[dict[str, Any], Writer, str]] = {
    "no scale": (BLOCKS, changed(fp8((128, 128)), weight_scale_inv=None), r"no tensor 'l.0.a.weight_scale_inv' or"),
    "scales of other blocks": (
        BLOCKS,
        fp8((64, 64)),
        r"'l.0.a.weight_scale_inv' has shape \(3, 4\).*192 × 256 in blocks of 128 × 128 requires \(2, 2\)",
    ),
    "scales of half the rows": (
        FP8,
        changed(fp8((1, 0)), weight_scale_inv=lambda s: s[:96]),
        r"requires \(\), \(192,\)",
    ),
    "integers as scales": (
        BLOCKS,
        changed(fp8((128, 128)), weight_scale_inv=lambda s: s.int()),
        "as I32; scales must be",
    ),
    "a block of three": (
        BLOCKS | {"weight_block_size": [1, 2, 3]},
        fp8((128, 128)),
        r"`weight_block_size` is \[1, 2, 3\]",
    ),
    "a block of words": (BLOCKS | {"weight_block_size": ["a", 2]}, fp8((128, 128)), "`weight_block_size.*must be"),
    "an unknown fmt": (FP8 | {"fmt": "e3m4"}, fp8((0, 0)), "`fmt` is e3m4; supported: e4m3, e5m2"),
    "an unknown scheme": (FP8 | {"activation_scheme": "often"}, fp8((0, 0)), "supported: dynamic, static"),
    "a bound of zero": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 0.0},
        fp8((1, 0)),
        "`activation_scale_ub`",
    ),
    "bits that do not fit": (
        grouped(8, 32),
        packed(4, 32),
        r"weight_packed' has shape \(192, 32\).*8 bits \(num_bits\)",
    ),
    "groups that do not fit": (grouped(4, 64), packed(4, 32), r"weight_scale' has shape \(192, 8\).*blocks of 1 × 64"),
    "nine bits": (BITS_3, packed(4), r"weights.num_bits of int` is 9; supported: 2, 3, 4, 5, 6, 7, 8"),
    "no shape": (grouped(4, 32), changed(packed(4, 32), weight_shape=None), "no tensor 'l.0.a.weight_shape'"),
    "zeros of another shape": (
        grouped(4, 32),
        changed(packed(4, 32, zeros="packed"), weight_zero_point=lambda z: z[:5]),
        r"weight_zero_point' has shape \(5, 8\).*requires \(24, 8\)",
    ),
    "an uneven order": (
        grouped(4, 32),
        changed(packed(4, 32, order=True), weight_g_idx=lambda g: g.clamp(max=3)),
        "weight_g_idx.*32 columns in each of 8 groups",
    ),
    "an order of half the columns": (
        grouped(4, 32),
        changed(packed(4, 32, order=True), weight_g_idx=lambda g: g[:9]),
        r"requires \(256,\)",
    ),
    "floats that config.json has as integers": (INT8, fp8((1, 0), "weight_scale"), "stored as float, but .* says int"),
    "no group": (
        compressed("pack-quantized")
        | {"config_groups": {n: {"targets": [n], "weights": {"num_bits": 4}} for n in ("re:x", "b")}},
        packed(4, 32),
        "no group of config_groups in config.json has it among its targets: b, re:x",
    ),
    "a bad expression": (
        compressed("pack-quantized") | {"config_groups": {"g": {"targets": ["re:("], "weights": {"num_bits": 4}}}},
        packed(4, 32),
        r"'\(', which is no regular expression",
    ),
    "2:4": (compressed("sparse-24-bitmask"), packed(4, 32), "`format` is sparse-24-bitmask; supported: dense, fake"),
    "marlin 2:4": (compressed("marlin-24"), packed(4, 32), "`format` is marlin-24"),
    "a compressed sparsity": (
        INT8 | {"sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}},
        int8(),
        "`sparsity_config.format` is sparse-24-bitmask; supported: dense",
    ),
    "a rotation of activations": (
        INT8 | {"transform_config": {"config_groups": {"R4": {"apply": [{"location": "input"}]}}}},
        int8(),
        "`transform_config.config_groups.R4.apply.location` is input",
    ),
    "no global scale": (
        NVFP4,
        changed(CASES["nvfp4"][1], weight_global_scale=None),
        "weight_scale' is stored as F8_E4M3",
    ),
    "two global scales": (
        NVFP4,
        changed(CASES["nvfp4"][1], weight_global_scale=torch.ones(2)),
        r"weight_global_scale' has shape \(2,\).*a single number",
    ),
    "mxfp4 with scales of floats": (NVFP4, changed(mxfp4, weight_scale=lambda s: s.float()), "as F32; .*must be U8"),
    "int8 without scales": (INT8, changed(int8(), weight_scale=None), "no tensor 'l.0.a.weight_scale'"),
    "int8 with zeros of floats": (INT8, changed(int8(), weight_zero_point=torch.zeros(ROWS, 1)), "zero points of int8"),
    "SCB of another size": (BNB8, changed(int8("SCB", 127.0), SCB=lambda s: s[:7]), r"SCB' has shape \(7,\).*\(192,\)"),
    "no SCB": (BNB8, changed(int8("SCB", 127.0), SCB=None), "no tensor 'l.0.a.SCB'"),
    "a layout of columns": (
        BNB8,
        int8("SCB", 127.0, weight_format=torch.tensor(2).byte()),
        "weight_format' is 2; only 0",
    ),
    "an absmax of another size": (
        BNB4,
        changed(four_bits("nf4"), weight__absmax=lambda a: a[:5]),
        r"weight.absmax' has shape \(5,\).*49152 codes in blocks of 64",
    ),
    "no nested absmax": (BNB4, changed(four_bits("nf4", nested=True), weight__nested_absmax=None), "nested_absmax"),
    "codes cut off": (BNB4, changed(four_bits("nf4"), weight=lambda c: c[:100]), "requires 24576 bytes"),
    "an unknown algorithm": (MODELOPT | {"quant_algo": "W4A8_AWQ"}, fp8((0, 0)), "`quant_algo` is W4A8_AWQ; supported"),
}


def checked_and_loaded(source: Any) -> None:
    check([WEIGHT], source)
    load(WEIGHT, source, reader_of(source))


@pytest.mark.parametrize("name", FAULTS)
def test_weights_that_do_not_fit_their_description_are_refused(name: str, tmp_path: Path) -> None:
    about, write, words = FAULTS[name]
    source, _ = written(tmp_path, about, write)
    with pytest.raises(ModelError, match=words) as error:
        checked_and_loaded(source)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is no JSON of a quant_state"),
        ('{"quant_type": "int4", "blocksize": 64, "shape": [192, 256]}', "quant_type 'int4'.*supported: nf4 and fp4"),
        ('{"quant_type": "nf4", "blocksize": 0, "shape": [192, 256]}', "blocksize 0"),
        ('{"quant_type": "nf4", "blocksize": 64, "shape": [192]}', r"shape \[192\]"),
        ('{"quant_type": "nf4", "blocksize": 64}', "`shape`"),
    ],
)
def test_a_bad_quant_state_is_refused(text: str, words: str, tmp_path: Path) -> None:
    write = changed(four_bits("nf4"))
    parts, _ = write(torch.randn(ROWS, COLUMNS))
    parts["weight.quant_state.bitsandbytes__nf4"] = state(text)
    source = folder_of(tmp_path, BNB4, {f"l.0.a.{suffix}": part for suffix, part in parts.items()})
    with pytest.raises(ModelError, match=words):
        check([WEIGHT], source)


def test_four_bits_without_their_state_are_refused(tmp_path: Path) -> None:
    codes = torch.zeros(ROWS * COLUMNS // 2, 1, dtype=torch.uint8)
    with pytest.raises(ModelError, match=r"no tensor 'l.0.a.weight.quant_state.bitsandbytes__nf4'"):
        check([WEIGHT], folder_of(tmp_path, BNB4, {"l.0.a.weight": codes}))


def test_experts_of_mxfp4_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    codes, exponents, _ = mx(torch.randn(12, 96))
    blocks, scales = pairs(codes).reshape(1, 12, 3, 16), exponents[None]
    weight = Weight((Part("l.0.w", 12, index=0),), 96, transposed=True)
    for tensors, words in (
        ({"w_blocks": blocks}, "'l.0.w_scales' is missing"),
        ({"w_blocks": blocks, "w_scales": scales[:, :5]}, r"has shape \(1, 5, 3\).*requires \(1, 12, 3\)"),
        ({"w_blocks": blocks, "w_scales": scales.float()}, "as F32; scales of MXFP4 must be U8"),
        ({"w_blocks": blocks.reshape(1, 12, 6, 8), "w_scales": scales}, r"requires \(…, rows, blocks, 16\)"),
        ({"w_blocks": blocks[:, :, :2], "w_scales": scales[:, :, :2]}, r"has shape \(1, 12, 64\)"),
    ):
        named = {f"l.0.{name}": tensor for name, tensor in tensors.items()}
        with pytest.raises(ModelError, match=words):
            check([weight], folder_of(tmp_path, {"quant_method": "mxfp4"}, named))


@pytest.mark.parametrize("method", sorted(set(_refused.METHODS) - {"gguf"}))
def test_a_known_method_that_is_not_read_is_refused_with_an_alternative(method: str, tmp_path: Path) -> None:
    source = folder_of(tmp_path, {"quant_method": method.replace("_", "-")}, {"a": torch.ones(2)})
    with pytest.raises(Unsupported, match=r"not supported.*Supported:.*compressed-tensors.*Serve ") as error:
        reader_of(source)
    assert error.value.name == method.replace("_", "-")
    assert "int4" not in error.value.known


def test_quantize_that_contradicts_the_checkpoint_is_refused(tmp_path: Path) -> None:
    source, _ = written(tmp_path, *CASES["nf4"])
    assert reader_of(source, "bitsandbytes-nf4") is reader_of(source)
    for given in ("fp8", "bitsandbytes", "eetq"):
        with pytest.raises(ArgumentError, match=rf"`quantize` is {given}.*stored as 'bitsandbytes'.*bitsandbytes-nf4"):
            reader_of(source, given)
    source, _ = written(tmp_path, *CASES["fp8 in blocks"])
    assert reader_of(source, "fp8") is reader_of(source)
    plain = folder_of(tmp_path, {}, {"a": torch.ones(2)})
    with pytest.raises(ArgumentError, match="mxfp4 weights are not made while loading"):
        reader_of(plain, "mxfp4")
