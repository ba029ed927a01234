"""GPTQ, AWQ and Marlin checkpoints against a dequantization by definition, and whole models of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from support_models import Driver, make_checkpoint, prompts, reference
from support_quant import Arrays, Quantized, awq, awq_gemv, gptq, marlin, quantized, rewrite

from tokenmill.errors import ArgumentError, ModelError, StartError, Unsupported
from tokenmill.program.ops import Part, Weight
from tokenmill.quant._packed import nibbles_of, nibbles_of_rows, packed, rows_of, unpack
from tokenmill.quant.base import check, load, reader_of
from tokenmill.quant.formats import nibbles
from tokenmill.weights.checkpoint import Safetensors

torch.set_num_threads(1)
M = "model.layers.0.mlp.down_proj"


def matrix(outputs: int = 64, inputs: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(outputs, inputs)).astype(np.float32)


def scattered(inputs: int, group: int, seed: int = 0) -> np.ndarray:
    """Return the groups of inputs after act-order."""
    return np.random.default_rng(seed).permutation(np.arange(inputs) // group)


def checkpoint(folder: Path, tensors: Arrays, **config: Any) -> Safetensors:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return Safetensors(folder)


def whole(q: Quantized, **more: Any) -> Weight:
    return Weight((Part(f"{M}.weight", len(q.codes)),), q.codes.shape[1], **more)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_read_as_defined_by_bits_and_format(tmp_path: Path, bits: int, sym: bool, v2: bool) -> None:
    q = quantized(matrix(), bits, sym=sym)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32} | ({"checkpoint_format": "gptq_v2"} if v2 else {})
    source = checkpoint(tmp_path, gptq(M, q, v2=v2), **config)
    check([whole(q)], source)
    got = load(whole(q), source, reader_of(source))
    assert not got.dense
    assert (got.zero is not None and got.zero.shape == (1, 1)) == sym
    np.testing.assert_array_equal(got.floats(), q.numbers())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("kind", ["act-order", "uneven", "reversed", "one group", "ragged"])
def test_any_assignment_of_inputs_to_groups_is_read(tmp_path: Path, kind: str, bits: int) -> None:
    index = {
        "act-order": scattered(128, 32), "uneven": np.random.default_rng(3).integers(0, 4, 128),
        "reversed": np.arange(128)[::-1] // 32, "one group": np.zeros(128, int), "ragged": np.arange(128) // 48,
    }[kind]  # fmt: skip
    group = {"one group": -1, "ragged": 48}.get(kind, 32)
    q = quantized(matrix(), bits, index=index.copy())
    source = checkpoint(tmp_path, gptq(M, q), quant_method="gptq", bits=bits, group_size=group, desc_act=True)
    check([whole(q)], source)
    got = load(whole(q), source, reader_of(source))
    if kind == "act-order":  # as some programs store it
        wide = gptq(M, q) | {f"{M}.g_idx": q.index.astype(np.int64)}
        other = checkpoint(tmp_path, wide, quant_method="gptq", bits=bits, group_size=group, desc_act=True)
        np.testing.assert_array_equal(load(whole(q), other, reader_of(other)).floats(), got.floats())
    assert (got.order is not None) == (kind not in ("one group", "ragged"))
    np.testing.assert_array_equal(got.floats(), q.numbers())


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("shard", ["row", "column"])
def test_ranks_get_their_part_also_where_a_group_straddles_a_border(tmp_path: Path, shard: Any, ordered: bool) -> None:
    q = quantized(matrix(64, 192), group=64, index=scattered(192, 64) if ordered else None)
    source = checkpoint(tmp_path, gptq(M, q), quant_method="gptq", bits=4, group_size=64, desc_act=ordered)
    for rank in range(2):
        got = load(whole(q, shard=shard, ranks=2), source, reader_of(source), rank)
        rows, columns = (slice(None), slice(96 * rank, 96 * rank + 96))
        if shard == "column":
            rows, columns = slice(32 * rank, 32 * rank + 32), slice(None)
        assert got.dense == (ordered and shard == "row")
        np.testing.assert_array_equal(got.floats(), q.numbers()[rows, columns])


def test_fused_parts_with_orders_of_their_own_stay_right(tmp_path: Path) -> None:
    qs = [quantized(matrix(32, 128, n), index=scattered(128, 32, min(n, 1))) for n in range(3)]
    names = [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]
    tensors = {name: array for n, q in zip(names, qs, strict=True) for name, array in gptq(n, q).items()}
    source = checkpoint(tmp_path, tensors, quant_method="gptq", bits=4, group_size=32, desc_act=True)
    both = Weight((Part(f"{names[1]}.weight", 32), Part(f"{names[2]}.weight", 32)), 128)
    got = load(both, source, reader_of(source))
    assert got.order is not None
    np.testing.assert_array_equal(got.floats(), np.concatenate([q.numbers() for q in qs[1:]]))
    three = Weight(tuple(Part(f"{name}.weight", 32) for name in names), 128)
    check([three], source)
    np.testing.assert_array_equal(
        load(three, source, reader_of(source)).floats(), np.concatenate([q.numbers() for q in qs])
    )


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_awq_is_read_as_defined_by_version(tmp_path: Path, version: str, group: int) -> None:
    q = quantized(matrix(48, 256), group=group)
    tensors = awq(M, q) if version == "gemm" else awq_gemv(M, q, group)
    source = checkpoint(tmp_path, tensors, quant_method="awq", w_bit=4, q_group_size=group, version=version.upper())
    check([whole(q)], source)
    np.testing.assert_array_equal(load(whole(q), source, reader_of(source)).floats(), q.numbers())
    for rank in range(3):
        got = load(whole(q, shard="column", unit=4, ranks=3), source, reader_of(source), rank)
        np.testing.assert_array_equal(got.floats(), q.numbers()[16 * rank : 16 * rank + 16])


@pytest.mark.parametrize("group", [128, -1])
@pytest.mark.parametrize(
    "config, names",
    [
        ({"quant_method": "marlin", "bits": 4}, ("B", "s")),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, ("B", "s")),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True, "desc_act": False}, ("B", "s")),
        ({"quant_method": "awq", "bits": 4, "version": "marlin"}, ("qweight", "scales")),
    ],
)
def test_marlins_permutation_is_undone(tmp_path: Path, config: Any, names: tuple[str, str], group: int) -> None:
    q = quantized(matrix(128, 256), group=group, sym=True)
    source = checkpoint(tmp_path, marlin(M, q, *names), **config, group_size=group)
    check([whole(q)], source)
    got = load(whole(q), source, reader_of(source))
    assert not got.dense
    np.testing.assert_array_equal(got.floats(), q.numbers())


def test_modules_have_bits_and_groups_of_their_own_and_some_are_plain(tmp_path: Path) -> None:
    up, head, plain = "model.layers.1.mlp.up_proj", "lm_head", matrix(32, 64, 3)
    a, b, c = quantized(matrix(), 4, 32), quantized(matrix(), 8, 64), quantized(matrix(), 2, -1)
    tensors = gptq(M, a) | gptq(up, b) | gptq(head, c) | {"model.layers.0.mlp.gate.weight": plain}
    dynamic = {
        r"+:.*\.1\..*up_proj": {"bits": 8, "group_size": 64},
        "lm_head": {"bits": 2, "group_size": -1},
        "-:.*gate": {},
    }
    source = checkpoint(tmp_path, tensors, quant_method="gptq", bits=4, group_size=32, lm_head=True, dynamic=dynamic)
    weights = [Weight((Part(f"{n}.weight", 64),), 128) for n in (M, up, head)]
    weights.append(Weight((Part("model.layers.0.mlp.gate.weight", 32),), 64))
    check(weights, source)
    for weight, want in zip(weights, (a.numbers(), b.numbers(), c.numbers(), plain), strict=True):
        np.testing.assert_array_equal(load(weight, source, reader_of(source)).floats(), want)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = GPTQ | {"quant_method": "awq"}
FAULTS: dict[str, tuple[Callable[[Arrays], None], dict[str, Any], str]] = {
    "no scales": (lambda t: t.pop(f"{M}.scales"), GPTQ, rf"no tensor '{M}.scales', which `bits` 4 .* shape \(4, 64\)"),
    "no zeros": (lambda t: t.pop(f"{M}.qzeros"), GPTQ, rf"no tensor '{M}.qzeros'.*Download the model again"),
    "no codes": (lambda t: t.pop(f"{M}.qweight"), GPTQ, rf"no tensor '{M}.weight'.* There are {M}.g_idx"),
    "no order": (lambda t: t.pop(f"{M}.g_idx"), GPTQ | {"desc_act": True}, r"g_idx'.* `desc_act` of quant"),
    "scales of another shape": (
        lambda t: t.update({f"{M}.scales": t[f"{M}.scales"][:3].copy()}), GPTQ, r"scales' has shape \(3, 64\);.*\(4, 64"
    ),
    "zeros of another shape": (
        lambda t: t.update({f"{M}.qzeros": t[f"{M}.qzeros"].T.copy()}), GPTQ, r"qzeros' has shape \(8, 4\);.*\(4, 8\)"
    ),
    "scales of integers": (
        lambda t: t.update({f"{M}.scales": t[f"{M}.scales"].astype(np.int8)}), GPTQ, r"'I8' is not supported.*BF16, F16"
    ),
    "an order of floats": (
        lambda t: t.update({f"{M}.g_idx": t[f"{M}.g_idx"].astype(np.float32)}), GPTQ, r"'F32' is not supported.*I32"
    ),
    "another group": (lambda t: None, GPTQ | {"group_size": 64}, r"scales' has shape \(4, 64\);.*`group_size` 64"),
    "other bits": (lambda t: None, GPTQ | {"bits": 8}, r"qweight' has shape \(16, 64\): 64 inputs by `bits` 8.*Set"),
    "other bits, no order": (
        lambda t: t.pop(f"{M}.g_idx"), GPTQ | {"bits": 8, "group_size": -1}, r"scales' has shape \(4, 64\);.*`bits` 8"
    ),
    "a flat matrix": (
        lambda t: t.update({f"{M}.qweight": t[f"{M}.qweight"].reshape(-1)}), GPTQ, r"qweight' has shape \(1024,\)"
    ),
    "bits 5": (lambda t: None, GPTQ | {"bits": 5}, r"config.json: `bits` is 5; supported: 2, 3, 4, 8. Serve"),
    "bits four": (lambda t: None, GPTQ | {"bits": "four"}, r"config.json cannot be used: `bits` must be .*Given: four"),
    "no bits": (lambda t: None, {"quant_method": "gptq"}, r"`bits` is missing; it must be an integer"),
    "group 0": (lambda t: None, GPTQ | {"group_size": 0}, r"`group_size` is 0; supported: -1, a positive number"),
    "another format": (
        lambda t: None, GPTQ | {"checkpoint_format": "bitblas"}, r"`checkpoint_format` is bitblas; supported: gptq,"
    ),
    "sparse Marlin": (lambda t: None, GPTQ | {"checkpoint_format": "marlin_24"}, r"is marlin_24; supported"),
    "words of 16 bits": (lambda t: None, GPTQ | {"pack_dtype": "int16"}, r"`pack_dtype` is int16; supported: int32"),
    "override of bits": (
        lambda t: None, GPTQ | {"dynamic": {".*down": {"bits": 7}}}, rf"`dynamic of {M}: bits` is 7; supported: 2, 3"
    ),
    "both": (lambda t: t.update({f"{M}.weight": matrix()}), GPTQ, rf"tensor '{M}.weight', which .* does not read"),
    "AWQ": (lambda t: None, AWQ, r"16 inputs are no whole groups by version gemm"),
    "AWQ of 3 bits": (lambda t: None, AWQ | {"bits": 3}, r"`bits` is 3; supported: 4"),
    "AWQ, no group": (lambda t: None, AWQ | {"group_size": None}, r"`group_size` is None; supported: -1"),
    "AWQ, fast": (
        lambda t: None, AWQ | {"version": "gemv_fast"},
        "`version` is gemv_fast; supported: gemm, gemv, marlin",
    ),
    "Marlin of 64": (
        lambda t: None, GPTQ | {"quant_method": "marlin", "group_size": 64}, "`group_size` is 64; supported: -1, 128"
    ),
    "EXL2": (lambda t: None, {"quant_method": "exl2"}, "'exl2' is not supported.*GPTQ or AWQ.*Q4_K_M"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_one_error_that_names_it(tmp_path: Path, fault: str) -> None:
    q = quantized(matrix())
    change, config, why = FAULTS[fault]
    tensors = gptq(M, q)
    change(tensors)
    source = checkpoint(tmp_path, tensors, **config)
    with pytest.raises((ModelError, Unsupported), match=why):
        check([whole(q)], source)


@pytest.mark.parametrize("wrong", [4, -1])
def test_a_group_that_is_not_there_is_refused(tmp_path: Path, wrong: int) -> None:
    q = quantized(matrix())
    tensors = gptq(M, q)
    tensors[f"{M}.g_idx"][5] = wrong
    source = checkpoint(tmp_path, tensors, **GPTQ)
    with pytest.raises(ModelError, match=rf"'{M}.g_idx' names group {wrong}; '{M}.scales' has groups 0 to 3"):
        load(whole(q), source, reader_of(source))


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["gptq", "awq", "marlin"])
def test_scales_that_are_no_numbers_are_refused(tmp_path: Path, method: str, number: float) -> None:
    q = quantized(matrix(128, 256), group=128, sym=True)
    tensors = {"gptq": gptq, "awq": awq, "marlin": marlin}[method](M, q)
    name = f"{M}.s" if method == "marlin" else f"{M}.scales"
    tensors[name][1, 3] = number
    source = checkpoint(tmp_path, tensors, quant_method=method, bits=4, group_size=128)
    with pytest.raises(ModelError, match=f"'{name}' has scales that are no finite numbers. Download"):
        load(whole(q), source, reader_of(source))


def test_quantize_names_what_is_stored_or_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, gptq(M, quantized(matrix())), **GPTQ)
    assert reader_of(source, "gptq") is reader_of(source)
    for wrong in ("awq", "marlin", "fp8", "bitsandbytes-nf4", "int4", "exl2"):
        with pytest.raises(ArgumentError, match=f"`quantize` is {wrong}, but.*stored as 'gptq'. Leave.*give gptq"):
            reader_of(source, wrong)
    awq_source = checkpoint(tmp_path, awq(M, quantized(matrix())), quant_method="awq", bits=4, group_size=32)
    assert reader_of(awq_source, "gptq") is reader_of(awq_source, "awq")
    marlin_source = checkpoint(tmp_path, {}, **GPTQ | {"checkpoint_format": "marlin"})
    assert reader_of(marlin_source, "marlin") is reader_of(marlin_source)
    plain = checkpoint(tmp_path, {})
    with pytest.raises(Unsupported, match=r"'exl2' is not supported.*GPTQ or AWQ"):
        reader_of(plain, "exl2")
    for stored in ("gptq", "awq", "marlin"):
        with pytest.raises(StartError, match=f"`quantize` is {stored}, but the checkpoint is not quantized"):
            reader_of(plain, stored)


def model_of(folder: Path, method: str, **sizes: Any) -> Any:
    """Write a quantized llama and return transformers' model with the numbers that its codes stand for."""
    model = make_checkpoint(folder, "llama", **sizes)
    group = {"awq": 32, "gptq": 32, "act-order": 32}.get(method, -1)

    def write(module: str, w: np.ndarray) -> tuple[Arrays, np.ndarray]:
        index = scattered(w.shape[1], 32) if method == "act-order" else None
        q = quantized(w, 4, group, sym=method == "marlin", index=index)
        stored = {"awq": awq, "marlin": marlin}.get(method, gptq)(module, q)
        return stored, q.numbers()

    name = "gptq" if method == "act-order" else method
    numbers = rewrite(
        folder, write, {"quant_method": name, "bits": 4, "group_size": group, "desc_act": "act" in method}
    )
    state = model.state_dict()
    for name, w in numbers.items():
        state[name].copy_(torch.from_numpy(w))
    return model


@pytest.mark.parametrize("method", ["gptq", "act-order", "awq", "marlin"])
def test_a_whole_models_logits_are_those_of_its_dequantized_weights(tmp_path: Path, method: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32} if method == "marlin" else {}
    model = model_of(tmp_path, method, **sizes)
    want = reference(model, [[(0, prompts()[1])]])[0]
    got = Driver.of(tmp_path).feed([(0, prompts()[1])])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("method", ["gptq", "act-order", "awq"])
def test_the_cpu_backend_multiplies_in_the_stored_codes(tmp_path: Path, method: str) -> None:
    pytest.importorskip("numba")
    from support_cpu import CpuDriver

    model = model_of(tmp_path, method)
    want = reference(model, [[(0, prompts()[1])]])[0]
    with closing(CpuDriver.of(tmp_path)) as backend:
        kernels = {line.kernel for line in backend._lines}
        assert {kernel for kernel in kernels if kernel.startswith("linear")} == {"linear_int4"}
        assert ("ordered_quantize" in kernels) == (method == "act-order")
        got = backend.feed([(0, prompts()[1])])
    backend.close()
    np.testing.assert_allclose(got, want, atol=0.04 * np.abs(want).max())


def test_packed_nibbles_are_those_of_the_codes_however_they_are_made() -> None:
    codes = np.random.default_rng(1).integers(0, 16, (200, 64), dtype=np.uint8)
    want = nibbles(codes.reshape(200, 2, 32))
    stored = packed(codes, 4)
    np.testing.assert_array_equal(unpack(stored, 4), codes)
    np.testing.assert_array_equal(nibbles_of(stored.T), want)
    np.testing.assert_array_equal(nibbles_of_rows(codes.T), want)
    np.testing.assert_array_equal(rows_of(stored.T), codes.T)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "act-order", "awq"])
def test_experts_in_codes_of_their_own_have_the_logits_of_their_numbers(tmp_path: Path, method: str) -> None:
    pytest.importorskip("numba")
    from safetensors.numpy import load_file
    from support_cpu import CpuDriver

    def write(module: str, w: np.ndarray) -> tuple[Arrays, np.ndarray] | None:
        if module.endswith("gate"):
            return None
        q = quantized(w, 4, 32, index=scattered(w.shape[1], 32) if method == "act-order" else None)
        return (awq if method == "awq" else gptq)(module, q), q.numbers()

    coded, plain = tmp_path / "coded", tmp_path / "plain"
    for folder in (coded, plain):
        make_checkpoint(folder, "mixtral")
    config = {"quant_method": "awq" if method == "awq" else "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    numbers = rewrite(coded, write, config)
    save_file(load_file(plain / "model.safetensors") | numbers, plain / "model.safetensors", {"format": "pt"})
    steps = [(0, prompts()[1])]
    want = Driver.of(plain).feed(steps)
    np.testing.assert_allclose(Driver.of(coded).feed(steps), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    backend = CpuDriver.of(coded)
    kernels = {line.kernel for line in backend._lines}
    assert ("experts_f16" if method == "act-order" else "experts_int4") in kernels
    got = backend.feed(steps)
    backend.close()
    np.testing.assert_allclose(got, want, atol=0.05 * np.abs(want).max())
