"""Products with matrices of e4m3 codes, against float64 on the dequantized matrix, and on x's codes if it has some."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support_cuda import DEVICE, ON_GPU, CudaDriver, torch, write_random
from support_fp8 import INEXACT, assert_near, coded, decoded, made, rows_of, wanted
from support_models import FAMILIES, SIZES

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda import backend
from tokenmill.backends.cuda import quantized as quantized_in
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.kernels.fp8_rows import gate_codes, norm_codes
from tokenmill.backends.cuda.pack import pack
from tokenmill.backends.cuda.prepare import fused
from tokenmill.backends.cuda.products import fp8
from tokenmill.backends.cuda.products.base import Operands, Scratch
from tokenmill.backends.cuda.products.dense import Dense
from tokenmill.backends.cuda.products.fp8 import Fp8
from tokenmill.backends.cuda.products.fp8_codes import interleaved, quantized
from tokenmill.backends.cuda.quantized import ActivationCodes
from tokenmill.models.base import program_of
from tokenmill.parallel.group import Group
from tokenmill.program import ops
from tokenmill.quant.base import Coded, reader_of
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source


@pytest.mark.parametrize("kind, columns", [("tensor", 128), ("row", 200), ("block", 256)])
def test_few_rows_are_multiplied_in_16_bits(kind: str, columns: int) -> None:
    x, bias = rows_of(9, columns), rows_of(1, 130)[0]
    matrix = coded(130, columns, kind)
    for rows, given in ((9, bias), (1, None)):
        product, out = made(matrix, x, bias=given)
        product._words = None  # so that one row takes the same kernel
        product.run(rows)
        assert_near(out[:rows], wanted(matrix, x[:rows].double().cpu().numpy(), given))
        assert bool((out[rows:] == 7).all())


@pytest.mark.parametrize("kind", ["row", "block"])
def test_a_gated_product_of_few_rows_applies_its_activation(kind: str) -> None:
    x, matrix = rows_of(3, 128), coded(256, 128, kind)
    product, out = made(matrix, x, act="silu")
    assert product.applies_act(3)
    product.run(3)
    assert_near(out, wanted(matrix, x.double().cpu().numpy(), act=True))


@pytest.mark.parametrize("kind", ["row", "block"])
def test_one_row_is_normed_multiplied_and_added_in_one_launch(kind: str) -> None:
    x, norm, residual = rows_of(1, 256), rows_of(1, 256, 2)[0], rows_of(1, 140, 3)
    matrix, total = coded(140, 256, kind), torch.empty(1, 140, dtype=torch.float16, device=DEVICE)
    product, _ = made(matrix, rows_of(1, 256, 4))
    assert product.fuses_one
    product.one((x, norm, 1e-5), (residual, total))
    wide = x.double().cpu().numpy()
    normed = wide / np.sqrt(np.square(wide).mean() + 1e-5) * norm.double().cpu().numpy()
    assert_near(total, wanted(matrix, normed) + residual.double().cpu().numpy())


def test_one_row_of_a_gated_product_applies_its_activation_to_the_scaled_halves() -> None:
    x, bias, matrix = rows_of(1, 256), rows_of(1, 256, 2)[0], coded(256, 256, "block")
    product, out = made(matrix, x, bias=bias, act="silu")
    product.run(1)
    assert_near(out, wanted(matrix, x.double().cpu().numpy(), bias, act=True))


@pytest.mark.parametrize(
    "kind, input_scale, columns", [("row", None, 200), ("tensor", 0.004, 128), ("block", None, 256)]
)
def test_more_rows_are_quantized(kind: str, input_scale: float | None, columns: int) -> None:
    x, bias = rows_of(33, columns), rows_of(1, 130)[0]
    matrix = coded(130, columns, kind, input_scale=input_scale)
    product, out = made(matrix, x, bias=bias)
    product.run(33)
    assert_near(out, wanted(matrix, decoded(x, kind, input_scale), bias), INEXACT if ON_GPU else 1.5e-3)


def test_the_products_of_many_rows_are_the_librarys_with_scales_behind_them() -> None:
    x, matrix = rows_of(34, 128), coded(144, 128, "row")
    product, out = made(matrix, x)
    product.leaves = True
    assert product.raw(34)
    assert not product.raw(16), "few rows are not quantized"
    product.run(34)
    by_rows, by_columns = product.raw_scales
    scaled = out.float() * by_rows[:34, None] * by_columns
    assert_near(scaled, wanted(matrix, decoded(x, "row")), INEXACT if ON_GPU else 1.5e-3)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("kind", ["row", "block"])
def test_a_row_with_a_nan_or_an_infinity_leaves_the_others_alone(kind: str) -> None:
    x, matrix = rows_of(34, 128), coded(64, 128, kind)
    product, out = made(matrix, x)
    product.run(34)
    clean = out.clone()
    x[3, 5], x[7, 100] = float("nan"), float("inf")
    product.run(34)
    assert not bool(torch.isfinite(out[[3, 7]]).any())
    others = [i for i in range(34) if i not in (3, 7)]
    assert torch.equal(out[others], clean[others])


def test_batch_invariant_products_of_a_row_do_not_depend_on_the_number_of_rows() -> None:
    x, matrix = rows_of(40, 256), coded(64, 256, "row")
    product, out = made(matrix, x, invariant=True)
    product.run(40)
    many = out.clone()
    for rows in (1, 20):
        product.run(rows)
        assert torch.equal(out[:rows], many[:rows])
    assert not product.fuses_one


def test_a_matrix_is_quantized_by_rows_on_the_device() -> None:
    matrix = rows_of(5, 256)
    matrix[2] = 0
    codes, scale = quantized(matrix)
    found = Coded(codes.cpu().numpy(), "e4m3", scale.cpu().numpy(), (1, 0)).floats()
    wide = matrix.float().cpu().numpy()
    assert np.abs(found - wide).max(1).tolist() <= (np.abs(wide).max(1) / 28).tolist()
    assert (np.abs(codes.view(torch.float8_e4m3fn).float().cpu().numpy()).max(1) == [448, 448, 0, 448, 448]).all()


def test_columns_of_a_block_are_interleaved_and_padded() -> None:
    codes = torch.arange(130, dtype=torch.uint8)[None].repeat(2, 1)
    found = interleaved(codes)
    assert found.shape == (2, 256)
    assert found[1, :6].tolist() == [0, 64, 1, 65, 2, 66]
    assert found[1, 128:134].tolist() == [128, 0, 129, 0, 0, 0]


def test_stacked_matrices_are_packed_if_all_are_fp8_with_scales_that_can_be_stacked() -> None:
    device = torch.device(DEVICE)

    def made_of(*parts: Coded, dtype: Any = torch.float16) -> Fp8 | None:
        return fp8.packed(parts, lambda array: torch.from_numpy(array.copy()).to(DEVICE), dtype, device)

    x = rows_of(2, 256)
    parts = coded(128, 256, "block"), coded(40, 256, "block", 1)
    for some in (parts, (coded(8, 256, "tensor", input_scale=0.1), coded(24, 256, "row", 1, input_scale=0.2))):
        matrix = made_of(*some)
        assert matrix is not None
        assert matrix.input_scale == (None if some is parts else 0.2)
        out = torch.empty(2, matrix.rows, dtype=torch.float16, device=DEVICE)
        matrix.product(Operands(x, out), Scratch(matrix.rows, device), False).run(2)
        assert_near(out, np.concatenate([wanted(part, x.double().cpu().numpy()) for part in some], 1))
    assert made_of(*parts[::-1]) is None, "a block would belong to two matrices"
    assert made_of(parts[0], coded(8, 256, "row")) is None
    assert made_of(replace(parts[0], format="e5m2")) is None
    assert made_of(parts[0].by_rows()) is None, "scales of 1 × 128"
    assert made_of(parts[0], dtype=torch.float32) is None


def test_the_device_makes_the_codes_that_the_host_would_make_of_a_plain_checkpoint(tmp_path: Path) -> None:
    write_random(tmp_path, "llama", num_hidden_layers=1, dtype=torch.float16)
    source = open_checkpoint(local_source(tmp_path))
    given = program_of(source.config), source, reader_of(source, "fp8"), Group(), torch.float16, Device(DEVICE), None
    device, host = pack(*given, "fp8").matrices, pack(*given, "").matrices
    for weight, matrix in device.items():
        if weight.shard == "vocab":
            assert isinstance(matrix, Dense)
            continue
        assert isinstance(matrix, Fp8)
        assert torch.equal(matrix.codes, host[weight].codes)
        assert torch.equal(matrix.scale, host[weight].scale)


def planned(
    family: str, outputs: Any = lambda program: {}, dense: str = "lm_head", dtype: Any = torch.float16
) -> Any:
    """Return the plan of a tiny model's activations. `outputs`: more of its program; `dense`: in 16 bits."""
    model_type, own = FAMILIES[family]
    program = fused(program_of(SIZES | {"model_type": model_type, "num_hidden_layers": 2} | own))
    program = replace(program, outputs=program.outputs | outputs(program))
    linears = [op for op in program.ops if isinstance(op, ops.Linear)]
    zeros = {shape: torch.zeros(shape, dtype=torch.uint8) for op in linears for shape in [(op.out.width, op.x.width)]}
    matrices = {
        op.weight: Fp8(zeros[op.out.width, op.x.width], torch.ones(1, 1), (0, 0), dtype)
        for op in linears
        if dense not in op.weight.name
    }
    memory = SimpleNamespace(program=program, rows={"tokens": 64, "samples": 4})
    gates = {op.gate.buffer: op for op in program.ops if isinstance(op, ops.GatedAct)}
    return ActivationCodes(memory, matrices, lambda op: gates.get(op.out.buffer)), program


def test_norms_and_activations_store_codes_where_fp8_products_alone_read_them() -> None:
    plan, program = planned("llama")
    kinds = [type(op).__name__ for op in program.ops if id(op) in plan._stored]
    assert kinds == ["Norm", "AddNorm", "GatedAct", "AddNorm", "AddNorm", "GatedAct"], "but not before the head"
    rescaling = [type(op).__name__ for op in program.ops if id(op) in plan._raw]
    assert rescaling == ["AddNorm", "GatedAct", "AddNorm"] * 2
    plan, program = planned("llama", dense="down_proj")
    assert "GatedAct" not in [type(op).__name__ for op in program.ops if id(op) in plan._stored]
    for kind, stored, raw in ((ops.AddNorm, 5, 6), (ops.Linear, 6, 6), (ops.GatedAct, 5, 5)):
        first = lambda program, kind=kind: {"first": next(op.out for op in program.ops if isinstance(op, kind))}  # noqa: E731
        plan, _ = planned("llama", first)
        assert (len(plan._stored), len(plan._raw)) == (stored, raw), "a result of the program is stored itself"
    output = lambda program: {"o": [op.out for op in program.ops if isinstance(op, ops.Linear)][1]}  # noqa: E731
    assert len(planned("llama", output)[0]._raw) == 5


def test_a_product_with_a_bias_multiplies_by_its_scales_itself() -> None:
    plan, _ = planned("llama_tied_with_biases")
    assert plan._stored
    assert not plan._raw


@pytest.mark.parametrize("family", ["llama", "stablelm_parallel", "gpt_neox", "phi", "gemma2"])
def test_codes_that_are_in_use_at_the_same_time_have_memory_of_their_own(family: str) -> None:
    plan, program = planned(family)
    lives = list({id(life): life for life in plan._lives.values()}.values())
    assert len(lives) >= 6
    for i, one in enumerate(lives):
        for other in lives[:i]:
            if one.first <= other.last and other.first <= one.last:
                assert one.codes.codes.data_ptr() != other.codes.codes.data_ptr()
    assert plan.nbytes <= 4 * 64 * 4 * 128 * 2
    for op in program.ops:
        if isinstance(op, ops.Linear) and id(op) in plan._matrices:
            at = program.ops.index(op)
            life = plan._lives[id(op)]
            assert life.first <= at <= life.last


@pytest.mark.parametrize("rows", [8, 17, 40, 600])
def test_kernels_beside_a_product_agree_with_it_on_scales_and_codes(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[dict[str, Any]] = []
    monkeypatch.setattr(quantized_in, "Site", lambda kernel: lambda grid, *given, **sizes: launched.append(sizes))
    plan, program = planned("llama", dtype=torch.bfloat16)
    plan._memory.value, plan._memory.dtype = lambda v: torch.empty(8, v.width, dtype=torch.bfloat16), torch.bfloat16
    gates = {op.gate.buffer: op for op in program.ops if isinstance(op, ops.GatedAct)}
    sizes: Any = SimpleNamespace(of=lambda v: rows, early=False)
    raws = list[bool]()
    for op in program.ops:
        if id(op) not in plan._stored and id(op) not in plan._raw:
            continue
        launched.clear()
        plain = [op.gate.buffer] if isinstance(op, ops.GatedAct) else []
        if isinstance(op, ops.GatedAct):
            run = plan.gated(op, plain.append, lambda rows: False)
        else:
            run = plan.norm(op, plain.append, None, None)
        run(sizes)
        before = plan._raw.get(id(op))
        raw = False
        if before is not None:  # as the lowering makes it
            x, out = torch.empty(8, before.x.width), torch.empty(8, before.out.width, dtype=torch.bfloat16)
            act = gates[before.out.buffer].act if before.out.buffer in gates else ""
            product = plan._matrices[id(before)].product(Operands(x.bfloat16(), out, None, act, out), None, False)
            plan.attach(before, product)
            raw = product.raw(rows)
        assert bool(launched) == (rows > 16)
        if launched:
            assert launched[0]["RAW"] == raw
            assert launched[0]["SCALES"] == ("row" if id(op) in plan._stored else "")
            assert launched[0].get("KEEP", False) == (id(op) not in plan._stored)
        raws.append(raw)
    assert raws.count(True) == {8: 0, 17: 6, 40: 6, 600: 4}[rows], "many rows of a gated product are scaled in it"


class Whole:
    """A tiny model with all its matrices in FP8; and with the dequantized ones."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        sizes = {"hidden_size": 128, "intermediate_size": options.pop("inner", 144)}
        write_random(folder, "llama", num_hidden_layers=1, spread=0.1, **sizes)
        self.folder, self.options = folder, options
        self._monkeypatch = monkeypatch

    def driver(self, make: Any) -> CudaDriver:
        """Return a driver whose matrices `make` makes of (codes, scales of rows)."""

        def stored(*given: Any) -> Any:
            weights = pack(*given)
            for weight, dense in weights.matrices.items():
                weights.matrices[weight] = make(*quantized(dense._matrix))
            return weights

        self._monkeypatch.setattr(backend, "pack", stored)
        limits = StepLimits(64, 40, 64, 16)
        return CudaDriver(self.folder, dtype="float16", limits=limits, num_blocks=48, **self.options)

    def fp8(self) -> CudaDriver:
        return self.driver(lambda codes, scale: Fp8(codes, scale, (1, 0), torch.float16))

    def dense(self) -> CudaDriver:
        return self.driver(lambda codes, scale: Dense((codes.view(torch.float8_e4m3fn).float() * scale).half()))


@pytest.mark.slow
def test_a_models_activations_are_quantized_within_the_kernels_that_compute_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Whole(tmp_path, monkeypatch)
    fused, dense = whole.fp8(), whole.dense()
    codes = fused._lowering._codes
    assert len(codes._stored) == 4, "two norms and an activation, and the norm before the head"
    assert len(codes._raw) == 3, "all products of the layer but the first leave their scales to the next kernel"
    monkeypatch.setattr(ActivationCodes, "attach", lambda *_: None)
    monkeypatch.setattr(ActivationCodes, "norm", lambda self, op, plain, *_: plain)
    monkeypatch.setattr(ActivationCodes, "gated", lambda self, op, plain, applied: plain)
    apart = whole.fp8()
    for rows in ([(0, list(range(1, 36)))], [(0, [7])]):
        made, alone, want = fused.feed(rows), apart.feed(rows), dense.feed(rows)
        assert np.abs(made - alone).max() < 2e-2 * np.abs(alone).max(), "codes differ where sums are rounded otherwise"
        assert np.linalg.norm(made - want) < 8e-2 * np.linalg.norm(want)  # rounding of codes gives 5e-2


@pytest.mark.parametrize(
    "up, down, rows",
    [
        ("block", "row", 20),
        pytest.param("block", "block", 40, marks=pytest.mark.slow),
        pytest.param("row", "block", 40, marks=pytest.mark.slow),
    ],
)
def test_an_activation_that_its_product_applies_is_quantized_behind_it(
    up: str, down: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Whole(tmp_path, monkeypatch, inner=128, graphs=())

    def blocked(codes: Any, scale: Any) -> bool:
        return {128: down, 256: up}.get(len(codes), "row") == "block"

    def scales(codes: Any, scale: Any) -> Any:
        return scale.view(-1, 128).amax(1, keepdim=True) if blocked(codes, scale) else scale

    def wide(codes: Any, scale: Any) -> Any:
        found = scales(codes, scale)
        return codes.view(torch.float8_e4m3fn).float() * found.repeat_interleave(len(codes) // len(found), 0)

    fp8 = whole.driver(
        lambda c, s: Fp8(c, scales(c, s), (128, 128) if blocked(c, s) else (1, 0), torch.float16)
        if len(c) in (128, 256) else Dense(wide(c, s).half())
    )  # fmt: skip
    dense = whole.driver(lambda c, s: Dense(wide(c, s).half()))
    step = [(slot, [slot + 1]) for slot in range(rows)]  # the last layer computes the rows that sample
    made, want = fp8.feed(step), dense.feed(step)
    assert np.linalg.norm(made - want) < 8e-2 * np.linalg.norm(want)  # rounding of codes gives 5e-2


def quantized_apart(x: Any) -> tuple[Any, Any]:
    """Return codes and scales as the launch that only quantizes makes them."""
    product, _ = made(coded(16, x.shape[1], "row"), x)
    found = product._read_codes()
    product.quantize(len(x), False)
    return found.codes[: len(x)].view(torch.uint8), found.scale[: len(x)]


def test_a_norm_stores_the_codes_of_its_result_and_multiplies_by_the_scales_of_the_product_before() -> None:
    x, y, weight = rows_of(5, 200), rows_of(5, 200, 2), rows_of(1, 200, 3)[0]
    by_rows, by_columns = (torch.rand(n, device=DEVICE) for n in (5, 200))
    total, out = torch.empty_like(x), torch.empty_like(x)
    codes = torch.empty(5, 256, dtype=torch.float8_e4m3fn, device=DEVICE)
    scale = torch.empty(5, device=DEVICE)
    norm_codes[(5,)](
        x, y, by_rows, by_columns, weight, x, total, out, codes, scale, 200, 200, 1e-5, 8, WIDTH=200, BLOCK=256, KP=256,
        ADD=True, RAW=True, CENTER=False, WEIGHT=True, BIAS=False, KEEP=True, SCALES="row", PDL=False,
    )  # fmt: skip
    summed = (x.float() + y.float() * by_rows[:, None] * by_columns).half()
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-5) * weight.float()
    assert torch.allclose(total.float(), summed.float(), rtol=2e-3, atol=1e-3), "sums may be rounded once or twice"
    assert_near(out, normed.double().cpu().numpy(), 1e-3)
    want_codes, want_scale = quantized_apart(out)
    assert torch.equal(codes.view(torch.uint8), want_codes)
    assert torch.equal(scale, want_scale)


def test_a_gated_activation_stores_the_codes_of_its_result() -> None:
    both, codes = rows_of(5, 400), torch.empty(5, 256, dtype=torch.float8_e4m3fn, device=DEVICE)
    by_rows, by_columns = (torch.rand(n, device=DEVICE) for n in (5, 400))
    scale = torch.empty(5, device=DEVICE)
    gate, up = both[:, :200], both[:, 200:]
    gate_codes[(5,)](
        gate, up, by_rows, by_columns, codes, scale, 400, 400, 8, WIDTH=200, KP=256, BLOCK=256, RAW=True, ACT="silu",
        HALF=True, SCALES="row", PDL=False,
    )  # fmt: skip
    gate, up = (both.float() * by_rows[:, None] * by_columns).chunk(2, 1)
    want_codes, want_scale = quantized_apart((gate / (1 + torch.exp(-gate)) * up).half())
    assert torch.allclose(scale, want_scale, rtol=1e-3)
    assert (codes.view(torch.uint8) == want_codes).float().mean() > 0.98, "but where exp is rounded otherwise"
