"""Products with packed codes against float64 products with the dequantized matrix."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_cuda import DEVICE, ON_GPU, CudaDriver, torch, write_random
from support_slow import mostly_slow

from tokenmill.backends.cuda.products import coded as cuda_coded
from tokenmill.backends.cuda.products import pack as cuda_pack
from tokenmill.backends.cuda.products.base import Operands, Scratch
from tokenmill.backends.cuda.products.coded import CodedMatrix
from tokenmill.backends.cuda.products.forms import Unpackable, form_of
from tokenmill.backends.cuda.products.pack import packed
from tokenmill.quant import formats, gguf
from tokenmill.quant.base import Coded, dense
from tokenmill.quant.formats import FORMATS
from tokenmill.weights.gguf_header import BLOCKS

DTYPES = [torch.float16, *([torch.bfloat16] if ON_GPU else [])]  # Triton's interpreter multiplies bfloat16 wrongly.


def upload(array: np.ndarray) -> Any:
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


def drawn(
    name: str, rows: int, columns: int, group: int, zero: str = "", *, height: int = 1, packs: bool = False
) -> Coded:
    """Return a random matrix. `zero`: none, one of all, integers of groups, others of groups, or a low of groups."""
    draw, form = np.random.default_rng(0), FORMATS[name]
    least = 0 if form.table is not None or not name.startswith("i") else -(1 << form.bits - 1)
    codes = draw.integers(least, least + (1 << form.bits), (rows, columns)).astype(form.dtype)
    if name in ("e4m3", "e5m2"):
        codes &= 0xB7 if name == "e4m3" else 0xC3 | 0x38  # neither NaN nor far from 1
    shape = (-(-rows // height) if height else 1, -(-columns // group) if group else 1)
    scale = (draw.random(shape) + 0.5).astype(np.float32) * 2 / ((FORMATS[name].bits == 8 and 127) or 8)
    if zero in ("low", "") and group:
        scale = scale.astype(np.float16)
    zeros = {
        "": None, "low": None, "one": np.full((1, 1), least + (1 << form.bits - 1), np.uint8),
        "integers": draw.integers(least, least + (1 << form.bits), shape).astype(np.int16),
        "others": (draw.random(shape) * 6).astype(np.float32),
    }  # fmt: skip
    low = -(draw.random(shape) * 3).astype(np.float16) if zero == "low" else None
    if packs:
        codes = formats.nibbles(codes.reshape(rows, -1, 32))
    return Coded(codes, name, scale, (height, group), zero=zeros[zero], low=low)


def product(matrix: CodedMatrix, x: Any, act: str = "", bias: Any = None, batch_invariant: bool = False) -> Any:
    rows, outputs = len(x), matrix.shape[0]
    out = torch.empty(rows, outputs, dtype=x.dtype, device=DEVICE)
    gated = torch.empty(rows, outputs // 2, dtype=x.dtype, device=DEVICE) if act else None
    scratch = Scratch(outputs, torch.device(DEVICE), matrix.needs(rows), x.dtype)
    made = matrix.product(Operands(x, out, bias, act, gated), scratch, batch_invariant)
    made.run(rows)
    return out if gated is None or not made.applies_act(rows) else gated


def off(found: Any, want: Any) -> float:
    return float(np.linalg.norm(found.double().cpu().numpy() - want) / np.linalg.norm(want))


def x_of(rows: int, columns: int, dtype: Any) -> Any:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)


FORMS = {
    "int4, groups of 128": ("u4", 128, "one", {}),
    "int4, groups of 32, as GGUF packs them": ("u4", 32, "one", {"packs": True}),
    "int4, groups of 64 with zero points": ("u4", 64, "integers", {}),
    "int4, groups of 32 with zero points that are no integers": ("u4", 32, "others", {}),
    "int4, groups of 32 with minima": ("u4", 32, "low", {"packs": True}),
    "int4, groups of 512": ("u4", 512, "one", {}),
    "int4, a scale a row": ("u4", 0, "one", {}),
    "int4, a scale and a zero point a row": ("u4", 0, "integers", {}),
    "2 bits, groups of 16 with minima": ("u2", 16, "low", {}),
    "3 bits, groups of 16": ("i3", 16, "", {}),
    "5 bits, groups of 32 with minima": ("u5", 32, "low", {}),
    "6 bits, groups of 16": ("i6", 16, "", {}),
    "int8, groups of 32": ("i8", 32, "", {}),
    "int8, a scale a row": ("i8", 0, "", {}),
    "int8, groups of 128": ("i8", 128, "", {}),
    "e4m3, a scale": ("e4m3", 0, "", {"height": 0}),
    "e4m3, blocks of 128 × 128": ("e4m3", 128, "", {"height": 128}),
    "e5m2, a scale a row": ("e5m2", 0, "", {}),
    "nf4, groups of 64": ("nf4", 64, "", {}),
    "iq4, groups of 32": ("iq4", 32, "", {"packs": True}),
    "e2m1, groups of 32": ("e2m1", 32, "", {}),
    "e2m1 doubled, groups of 16": ("e2m1x2", 16, "", {}),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_every_form_are_those_of_the_dequantized_matrix(name: str, dtype: Any) -> None:
    kind, group, zero, more = FORMS[name]
    coded = drawn(kind, 32, 512, group, zero, **more)
    matrix, x = packed([coded], upload, dtype), x_of(3, 512, dtype)
    want = x.double().cpu().numpy() @ coded.floats().astype(np.float64).T
    assert off(product(matrix, x), want) < (1.5e-3 if dtype == torch.float16 else 5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["int4", "int8"])
def test_a_quantized_model_has_the_logits_of_its_dequantized_matrices(method: str, tmp_path: Path) -> None:
    write_random(tmp_path, "llama_tied_with_biases", num_hidden_layers=1, tie_word_embeddings=False)
    coded, dense = CudaDriver(tmp_path, dtype="float16", quantize=method), CudaDriver(tmp_path, dtype="float16")
    for weight, matrix in coded._weights.matrices.items():
        assert isinstance(matrix, CodedMatrix)
        matrix.unpack(dense._weights.matrices[weight]._matrix)
    (table,) = (weight for weight in coded._weights.tensors if weight.name.endswith("embed_tokens.weight"))
    dense._weights.tensors[table].copy_(coded._weights.tensors[table])
    assert coded._weights.nbytes < 0.7 * dense._weights.nbytes
    # One row: norms and sums belong to the products, but for the first norm, behind which there is no product.
    assert len(coded._batch_one) == len(dense._batch_one) + 1
    for rows in ([(0, [1, 2, 3]), (1, [7])], [(0, [6])]):
        want = dense.feed(rows)
        np.testing.assert_allclose(coded.feed(rows), want, rtol=1e-2, atol=1e-2 * np.abs(want).max())


@pytest.mark.parametrize("rows", [1, 9, 70])
@pytest.mark.parametrize("name", ["int4, groups of 128", "int8, a scale a row"])
def test_a_gated_product_adds_its_bias_and_applies_its_activation(rows: int, name: str) -> None:
    kind, group, zero, more = FORMS[name]
    coded = drawn(kind, 56, 320, group, zero, **more)  # neither rows nor columns are whole tiles
    matrix, x, bias = (
        packed([coded], upload, torch.float16),
        x_of(rows, 320, torch.float16),
        x_of(1, 56, torch.float16)[0],
    )
    y = x.double().cpu().numpy() @ coded.floats().astype(np.float64).T + bias.double().cpu().numpy()
    found = product(matrix, x, "silu", bias)
    assert off(found, y[:, :28] / (1 + np.exp(-y[:, :28])) * y[:, 28:]) < 3e-3


@pytest.mark.parametrize(
    "name",
    mostly_slow(["int4, groups of 128", "int4, groups of 32 with minima", "e4m3, a scale"], ["int4, groups of 128"]),
)
def test_a_row_is_added_and_stored_for_the_products_behind_a_norm(name: str) -> None:
    kind, group, zero, more = FORMS[name]
    parts = [drawn(kind, 160, size, group, zero, **more) for size in (1024, 160)]
    first, second = (packed([part], upload, torch.float16) for part in parts)
    x, other, weight = x_of(1, 1024, torch.float16) * 8, x_of(2, 160, torch.float16)[1:], x_of(1, 160, torch.float16)[0]
    total, row, out = (torch.empty(1, 160, dtype=torch.float16, device=DEVICE) for _ in range(3))
    scratch = Scratch(256, torch.device(DEVICE))
    before = first.product(Operands(x, torch.empty_like(total)), scratch, False)
    behind = second.product(Operands(row, out), scratch, False)
    assert before.fuses_one
    assert not before.norms_one
    given = before.normed(row, weight, 1e-5)
    before.one(residual=(other, total), makes=given)
    behind.one(given=given)
    wide = [part.floats().astype(np.float64).T for part in parts]
    want = x.double().cpu().numpy() @ wide[0] + other.double().cpu().numpy()
    assert off(total, want) < 2e-3
    normed = want / np.sqrt((want**2).mean() + 1e-5) * weight.double().cpu().numpy()
    assert off(out, normed @ wide[1]) < 4e-3


def test_columns_in_another_order_meet_their_columns_of_x() -> None:
    plain, order = drawn("u4", 32, 512, 128, "integers"), np.random.default_rng(5).permutation(512)
    coded = replace(plain, order=order)
    matrix, x = packed([coded], upload, torch.float16), x_of(3, 512, torch.float16)
    want = x.double().cpu().numpy() @ coded.floats().astype(np.float64).T
    assert off(product(matrix, x), want) < 1.5e-3
    assert off(product(matrix, x), x.double().cpu().numpy() @ plain.floats().astype(np.float64).T) > 0.5


def test_a_matrix_is_unpacked_for_more_rows_than_its_kernel_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_coded, "crossover", lambda form, outputs: 2)
    for name in ("u4", "i8"):
        coded = drawn(name, 40, 320, 64, "integers" if name == "u4" else "")
        matrix, x = packed([coded], upload, torch.float16), x_of(3, 320, torch.float16)
        assert matrix.needs(3).unpacked == 40 * 320
        want = x.double().cpu().numpy() @ coded.floats().astype(np.float64).T
        assert off(product(matrix, x), want) < 1.5e-3


def test_batch_invariant_products_do_not_depend_on_the_number_of_rows() -> None:
    matrix, x = packed([drawn("u4", 32, 512, 64, "integers")], upload, torch.float16), x_of(70, 512, torch.float16)
    few, many = (product(matrix, rows, batch_invariant=True) for rows in (x[:3], x))
    assert torch.equal(few, many[:3])


@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_a_scale_that_is_not_finite_is_packed_as_it_is(wrong: float) -> None:
    coded = drawn("u4", 16, 64, 32, "one")
    assert coded.scale is not None
    coded.scale[3, 1] = wrong
    found = torch.empty(16, 64, dtype=torch.float16, device=DEVICE)
    packed([coded], upload, torch.float16).unpack(found)
    finite = found.isfinite().all(1).cpu().numpy()
    assert not finite[3]
    assert finite.sum() == 15


def test_matrices_are_packed_in_parts_that_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [drawn("u4", rows, 64, 64, "integers") for rows in (24, 5, 43)]
    whole = packed(parts, upload, torch.float16)
    monkeypatch.setattr(cuda_pack, "_AT_ONCE", 64)
    again = packed(parts, upload, torch.float16)
    assert torch.equal(whole.codes, again.codes)
    found = torch.empty(72, 64, dtype=torch.float16, device=DEVICE)
    again.unpack(found)
    assert off(found, np.concatenate([part.floats() for part in parts]).astype(np.float64)) < 4e-4


STACKS = {
    "one format": [("u4", 32, "low"), ("u4", 32, "low")],
    "GGUF's Q4_K and Q6_K": [("u4", 32, "low"), ("i6", 16, "")],
    "other groups and zero points": [("u4", 128, "one"), ("u4", 64, "integers")],
    "a table of integers beside integers": [("iq4", 32, ""), ("i6", 16, "")],
}


@pytest.mark.parametrize("name", STACKS)
def test_parts_of_unlike_integers_are_stacked_exactly(name: str) -> None:
    parts = [
        drawn(kind, rows, 512, group, zero) for rows, (kind, group, zero) in zip((24, 8), STACKS[name], strict=True)
    ]
    matrix, x = packed(parts, upload, torch.float16), x_of(2, 512, torch.float16)
    want = x.double().cpu().numpy() @ np.concatenate([part.floats() for part in parts]).astype(np.float64).T
    assert off(product(matrix, x), want) < 1.5e-3


@pytest.mark.parametrize(
    "parts, reason",
    [
        ([drawn("i8", 16, 96, 24)], "groups of 24 columns"),
        ([drawn("nf4", 16, 64, 64), drawn("e4m3", 16, 64, 64)], "unlike formats, e4m3, nf4"),
        ([drawn("nf4", 16, 64, 64), dense(np.zeros((16, 64), np.float32))], "a part of it is not quantized"),
        ([replace(drawn("u4", 16, 64, 64), order=np.arange(64)), drawn("u4", 16, 64, 64)], "unlike orders"),
    ],
)
def test_a_matrix_without_a_form_has_a_reason(parts: list[Coded], reason: str) -> None:
    with pytest.raises(Unpackable, match=reason):
        form_of(parts)


def test_the_form_of_a_matrix_has_the_bytes_that_it_takes() -> None:
    for kind, group, zero, more in FORMS.values():
        matrix = packed([drawn(kind, 40, 544, group, zero, **more)], upload, torch.float16)
        assert matrix.nbytes == matrix.form.nbytes(40, 544)


def stored(kind: str, rows: int) -> Coded:
    """Return a matrix (rows, 512) of a GGUF type: random codes in the file's own places, with random scales."""
    columns, each = BLOCKS[kind]
    draw = np.random.default_rng(7)
    with np.errstate(invalid="ignore"):  # Random bytes are no scales; they are replaced.
        coded = gguf.UNPACK[kind](draw.integers(0, 256, (rows, 512 // columns, each), np.uint8))
    assert coded.scale is not None
    scale = ((draw.random(coded.scale.shape) + 0.5) / 16).astype(coded.scale.dtype)
    low = None if coded.low is None else (-draw.random(coded.low.shape) / 2).astype(coded.low.dtype)
    return replace(coded, scale=scale, low=low, levels=None)


@pytest.mark.parametrize("kind", mostly_slow(gguf.UNPACK, ("Q4_1", "Q4_K", "Q6_K", "IQ4_XS", "TQ2_0")))
def test_every_type_of_gguf_stays_quantized(kind: str) -> None:
    coded = stored(kind, 16)
    matrix = packed([coded], upload, torch.float16)
    assert (matrix.form.slices == 4) is (FORMATS[coded.format].bits <= 4)
    found = torch.empty(16, 512, dtype=torch.float16, device=DEVICE)
    matrix.unpack(found)
    assert off(found, coded.floats().astype(np.float64)) < 4e-4


def test_no_kernel_has_an_instruction_that_older_gpus_lack() -> None:
    """Sums and products of two bfloat16 need compute capability 9.0, fma 8.0 alone."""
    folder = Path(cuda_coded.__file__).parents[1] / "kernels"
    found = [path.name for path in folder.glob("*.py") if re.search(r"(add|sub|mul)(\.\w+)*\.bf16", path.read_text())]
    assert not found
