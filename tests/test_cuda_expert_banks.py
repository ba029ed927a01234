"""Experts whose matrices stay quantized on a GPU, against float64 products with the dequantized matrices."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_cuda import DEVICE, CudaDriver, torch, write_random
from support_models import Driver, steps
from support_quantized import plain_folder, quantize_gpt_oss
from test_cuda_coded import FORMS, drawn
from test_cuda_experts import MORE, Layer, tiny

from tokenmill.backends.cuda import expert_banks, expert_shapes
from tokenmill.backends.cuda.expert_banks import CodedStack
from tokenmill.backends.cuda.expert_shapes import RowShape, TileShape
from tokenmill.backends.cuda.products.forms import Form
from tokenmill.backends.torch.experts import mixed
from tokenmill.backends.torch.kinds import activation
from tokenmill.quant import none
from tokenmill.quant.base import Coded, Piece, load
from tokenmill.weights.checkpoint import Checkpoint

WIDTH, INNER = 64, 32
SOME = {"int4, groups of 64 with zero points": "bounded"}
MANY = {
    "int4, groups of 32, as GGUF packs them": "bare", "int4, groups of 32 with minima": "scaled inputs",
    "int4, a scale a row": "biased", "6 bits, groups of 16": "bare", "int8, groups of 32": "biased",
    "int8, a scale a row": "bounded", "e4m3, a scale": "bare", "e4m3, blocks of 128 × 128": "without gates",
    "nf4, groups of 64": "biased", "e2m1, groups of 32": "bounded", "e5m2, a scale a row": "without gates",
}  # fmt: skip


def reader(name: str, unlike: str = "", *, ordered: bool = False) -> Any:
    """Return a reader of random matrices in a form. `unlike`: that of others, or "none"; `ordered`: with act-order."""

    def read(source: Checkpoint, piece: Piece) -> Coded:
        stored = none.read(source, piece)
        if len(stored.shape) < 2 or piece.weight.exact or stored.shape[0] < 24:
            return stored
        number, whole = (zlib.crc32(part.name.encode()) for part in (piece, piece.weight.parts[0]))
        if unlike == "none" and whole % 2:
            return Coded(stored.floats() * np.float32(0.15), "f32")
        kind, group, zero, more = FORMS[unlike if unlike and whole % 2 else name]
        made = drawn(kind, *stored.shape, group, zero, **more)
        order = np.random.default_rng(whole).permutation(stored.shape[1]) if ordered else None
        made = replace(made, codes=np.roll(made.codes, number % 97, 0), order=order)
        assert made.scale is not None
        factor = 0.15 / made.floats().std()
        low = None if made.low is None else (made.low * factor).astype(made.low.dtype)
        return replace(made, scale=(made.scale * factor).astype(made.scale.dtype), low=low)

    return read


def coded(
    read: Any, more: str, *, dtype: Any = torch.float16, deterministic: bool = False, width: int = WIDTH,
    inner: int = INNER,
) -> Layer:  # fmt: skip
    """Return a layer of five experts that are read so, with its reference in float64."""
    program, source = tiny(2, MORE[more], width=width, inner=inner)
    made = Layer(program, source, dtype, deterministic=deterministic, read=read)
    made.plain = {w: torch.from_numpy(load(w, source, read).floats()).double().to(DEVICE) for w in made.plain}  # type: ignore[arg-type]
    return made


def wanted(made: Layer, x: Any, ids: Any, factors: Any) -> Any:
    return mixed(made.experts, x.double(), ids.long(), factors.double(), made.plain, activation(made.experts.act))


def off(got: Any, want: Any) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in MANY)])
def test_coded_experts_are_multiplied_as_their_numbers(name: str) -> None:
    made = coded(reader(name), (SOME | MANY)[name])
    for ws in (made.experts.gate_up, made.experts.down):
        assert isinstance(made.weights.stacks[ws[0]], CodedStack)
    for count in (1, 19) if name in SOME else (1, 19, 45):
        x = made.rows(count)
        ids, factors = made.chosen(count)
        assert off(made.summed(count), wanted(made, x, ids, factors)) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4, groups of 64 with zero points", "int8, groups of 128", "e2m1, groups of 32"])
def test_tiles_of_any_size_that_scale_weights_or_sums_give_the_same_result(name: str) -> None:
    made = coded(reader(name), "bounded")
    x = made.rows(19)
    ids, factors = made.chosen(19)
    products, want = made.lowering.products(made.experts), wanted(made, x, ids, factors)
    for depth, on_weights in ((64, True), (32, True), (16, False)) if "e2m1" not in name else ((32, True), (16, True)):
        shape = TileShape(16, 64, depth, 3, 2, on_weights=on_weights)
        assert off(made.summed(19, lambda shape=shape: products.run(19, shape, shape, False)), want) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8, a scale a row", "nf4, groups of 64"])
def test_experts_whose_rows_fill_no_whole_groups_are_packed_one_by_one(name: str) -> None:
    made = coded(reader(name), "biased", width=72, inner=36)
    for ws in (made.experts.gate_up, made.experts.down):
        stack = made.weights.stacks[ws[0]]
        assert isinstance(stack, CodedStack)
        for i, w in enumerate(ws):
            out = torch.empty(w.rows, w.columns, dtype=torch.float16, device=DEVICE)
            stack.matrix(i, (w.rows, w.columns)).unpack(out)
            assert off(out, made.plain[w]) < 2e-3
    for count in (1, 19):
        x = made.rows(count)
        ids, factors = made.chosen(count)
        assert off(made.summed(count), wanted(made, x, ids, factors)) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("more, splits", [("bounded", 2), ("without gates", 4)])
@pytest.mark.parametrize("ordered", [False, True])
def test_a_row_whose_columns_are_split_in_a_tile_has_the_same_result(more: str, splits: int, ordered: bool) -> None:
    made = coded(reader("int8, groups of 32", ordered=ordered), more, width=320, inner=192)  # 5 and 3 blocks
    x = made.rows(1)
    ids, factors = made.chosen(1)
    one, shape = made.lowering.one_row(made.experts), RowShape(16, 0, 3, 2, splits=splits)

    def run() -> None:
        one.gate_up(shape, False)
        one.down(shape, False)

    assert off(made.summed(1, run), wanted(made, x, ids, factors)) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4, groups of 64 with zero points", "int4, a scale a row"])
def test_experts_whose_columns_are_in_orders_of_their_own_take_those_of_x(name: str) -> None:
    made = coded(reader(name, ordered=True), "bounded")
    stack = made.weights.stacks[made.experts.gate_up[0]]
    assert isinstance(stack, CodedStack)
    assert stack.order is not None
    for count in (1, 19):
        x = made.rows(count)
        ids, factors = made.chosen(count)
        assert off(made.summed(count), wanted(made, x, ids, factors)) < 2e-3


@pytest.mark.slow
def test_with_deterministic_a_row_of_coded_experts_is_the_same_to_the_bit_alone_and_in_a_batch() -> None:
    made, together = coded(reader("e2m1, groups of 32"), "biased", deterministic=True), []
    for count in (40, 1):
        made.rows(40)
        ids, factors = made.chosen(count)
        together.append((ids[:1], factors[:1], made.summed(count)[:1]))
    assert all(torch.equal(a, b) for a, b in zip(*together, strict=True))


@pytest.mark.parametrize(
    "read, why, at_once",
    [
        pytest.param(reader("int4, a scale a row", "none", ordered=True), "not quantized", 1, marks=pytest.mark.slow),
        (reader("int8, groups of 32", "e2m1, groups of 32"), "unlike formats", 1 << 25),
        (reader("int8, groups of 32", "e2m1, groups of 32"), "several forms", 1),
        (reader("int4, a scale a row", "none"), "not quantized", 1 << 25),
    ],
)
def test_experts_that_are_not_all_in_one_form_are_converted_and_logged(
    read: Any, why: str, at_once: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_banks, "_AT_ONCE", at_once)
    made = coded(read, "bare")
    (line,) = (record.message for record in caplog.records if "experts" in record.message)
    assert why in line
    for ws in (made.experts.gate_up, made.experts.down):
        stack = made.weights.stacks[ws[0]]
        assert isinstance(stack, torch.Tensor)
        for w, numbers in zip(ws, stack, strict=True):
            np.testing.assert_allclose(numbers.double().cpu(), made.plain[w].cpu(), atol=1e-3)


def test_quantized_experts_are_converted_for_a_computation_in_float32() -> None:
    made = coded(reader("int8, a scale a row"), "bare", dtype=torch.float32)
    assert all(isinstance(stack, torch.Tensor) for stack in made.weights.stacks.values())


def test_many_items_of_an_expert_take_larger_tiles() -> None:
    for kind, first in (("int4", 12), ("e2m1", 4)):
        form = Form(kind, "scale", 32, 32)
        sizes = [expert_shapes.tile_items(mean, form) for mean in (0.1, first, first + 1, 24, 25, 128, 129)]
        assert sizes == [16, 16, 32, 32, 64, 64, 128]


@pytest.mark.slow
def test_gpt_oss_in_mxfp4_has_the_logits_of_its_numbers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    write_random(tmp_path, "gpt_oss", dtype=torch.float16, **sizes)
    plain = plain_folder(tmp_path, quantize_gpt_oss(tmp_path))
    made, want = CudaDriver(tmp_path, dtype="float16"), Driver.of(plain)
    assert sum(isinstance(stack, CodedStack) for stack in made._weights.stacks.values()) == 2
    for rows in steps():
        wanted = want.feed(rows)
        assert np.linalg.norm(made.feed(rows) - wanted) < 2e-2 * np.linalg.norm(wanted)
