"""Products of the CPU backend against integers in numpy, for every form of weights and instruction set."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("numba")

from support_kernels import load

from tokenmill.backends.cpu import isa
from tokenmill.backends.cpu import layout as t
from tokenmill.backends.cpu.forms import BLOCK_FORMS, DENSE_FORMS
from tokenmill.backends.cpu.pack import _pack_parts, gates, pack, pack_vector
from tokenmill.errors import ArgumentError, Unsupported
from tokenmill.quant import gguf
from tokenmill.quant.base import Coded, dense, stack
from tokenmill.quant.formats import FORMATS

HERE = isa.available()
BEST = HERE[:1]
PAIRED = any(i.pairs for i in HERE)
FORMS = tuple(form for form in (*BLOCK_FORMS, *DENSE_FORMS) if PAIRED or form != "bf16pairs")
FEW_FORMS = ("int4", "bf16pairs") if PAIRED else ("int4",)  # forms for the tests of other things than the product
WITHOUT_PAIRS = [i for i in HERE if not i.pairs]  # a set with pairs has the code of AVX-512 VNNI but for them
SETS = [(i.name, form) for i in HERE if i.pairs for form in FEW_FORMS] + [
    (i.name, form) for at, i in enumerate(WITHOUT_PAIRS) for number, form in enumerate(FORMS)
    if form != "bf16pairs" and (form in ("int4", "int8", "f32") or number % len(WITHOUT_PAIRS) == at)
]  # fmt: skip
"""Three forms with every set, the others with one of the sets each: compiling a product takes two seconds."""


K_TYPES = {
    "int2k": "Q2_K", "int3k": "Q3_K", "int4k": "Q4_K", "int5k": "Q5_K", "int6k": "Q6_K", "int8k": "IQ4_XS",
}  # fmt: skip


def random_matrix(form: str, rows: int, columns: int, rng: np.random.Generator):
    """Return a random matrix that is packed in that form."""
    if form in DENSE_FORMS:
        array = rng.standard_normal((rows, columns)).astype(np.float32)
        kinds = {"f32": array, "f16": array.astype(np.float16)}
        return dense(kinds[form] if form in kinds else bf16(array))
    kind = BLOCK_FORMS[form]
    if form == "int4group":
        codes = rng.integers(0, 256, (rows, columns // 32, 16), dtype=np.uint8)
        scale = np.ldexp(rng.integers(16, 32, (rows, columns // 128)), -12).astype(np.float16)
        zero = rng.integers(0, 17, scale.shape)  # products with these scales are numbers of float16
        return Coded(codes, "u4", scale, (1, 128), zero=zero)
    if kind.group > 1:
        return random_k_matrix(K_TYPES[form], rows, columns, rng)
    blocks = columns // 32
    scale = rng.uniform(0.001, 0.1, (rows, blocks)).astype({2: np.float16, 4: np.float32}[kind.scale])
    low = None
    if kind.low:
        low = rng.uniform(-1, 1, (rows, blocks)).astype({2: np.float16, 4: np.float32}[kind.low])
    if kind.bits == 4:
        codes = rng.integers(0, 256, (rows, blocks, 16), dtype=np.uint8)
        return Coded(codes, "u4", scale, (1, 32), zero=np.full((1, 1), kind.offset), low=low)
    first, last = {5: (0, 31) if kind.low else (-16, 15), 8: (-128, 127)}[kind.bits]
    codes = rng.integers(first, last + 1, (rows, blocks, columns // blocks)).astype(np.int8)
    codes[0], codes[1] = first, last  # the ends, where sums of pairs might overflow
    return Coded(codes, {5: "u5" if kind.low else "i5", 8: "i8"}[kind.bits], scale, (1, 32), low=low)


def bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even; flush subnormal numbers to zero."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    small = np.abs(x) < np.finfo(np.float32).tiny
    rounded = np.where(small, rounded & 0x8000, rounded)
    return np.where(np.isnan(x), (bits >> 16 | 0x40).astype(np.uint16), rounded).astype(np.uint16)


def widened(x: np.ndarray) -> np.ndarray:
    """Return bfloat16 as float32."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def random_k_matrix(kind: str, rows: int, columns: int, rng: np.random.Generator) -> Coded:
    """Return a random matrix of GGUF's types with superblocks: any bytes are valid but those of the factors."""
    size, factors = {
        "Q2_K": (84, (80, 82)), "Q3_K": (110, (108,)), "Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)),
        "Q6_K": (210, (208,)), "IQ4_XS": (136, (0,)),
    }[kind]  # fmt: skip
    raw = rng.integers(0, 256, (rows, columns // 256, size), dtype=np.uint8)
    raw[0, :, 16:] = 255  # the ends, where sums of pairs might overflow
    for at in factors:
        numbers = rng.uniform(0.001, 0.01, raw.shape[:2]).astype(np.float16)
        raw[..., at : at + 2] = numbers[..., None].view(np.uint8)
    return gguf.UNPACK[kind](raw)


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize to int8 in blocks of 32. Return the codes, and (s, s · sum) of each block."""
    blocks = x.reshape(len(x), -1, 32)
    s = np.abs(blocks).max(-1) / np.float32(127)
    q = np.rint(blocks / np.where(s, s, 1)[..., None]).astype(np.int8)
    s = (q * blocks).sum(-1) / np.maximum((q.astype(np.float32) ** 2).sum(-1), 1)
    scales = np.stack([s, s * q.sum(-1)], -1).astype(np.float32)
    return q.reshape(x.shape), scales


def activations(form: str, rows: int, columns: int, rng: np.random.Generator):
    """Return x in a kernel's format, its scales, and the represented numbers in float64."""
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    if form in DENSE_FORMS:
        exact = widened(bf16(x)) if form == "bf16pairs" else x
        return x, np.zeros((1, 2), np.float32), exact.astype(np.float64)
    x[0] = np.where(rng.integers(0, 2, columns), 3, -3)  # codes of ±127 only
    codes, scales = quantized(x)
    exact = codes.reshape(rows, -1, 32).astype(np.float64) * scales[..., :1]
    return codes, scales, exact.reshape(rows, columns)


def columns_of(form: str) -> int:
    """Return a number of columns with several blocks or groups; for floats, not whole vectors."""
    if form in DENSE_FORMS:
        return 99
    return 512 if BLOCK_FORMS[form].group > 1 else 160


@functools.cache
def code(set_name: str):
    """Compile the kernels of products that are tested."""
    names = [f"linear_{form}" for name, form in SETS if name == set_name]
    if set_name == BEST[0].name:
        names += [f"embed_{form}" for form in FORMS] + ["narrow"] * PAIRED
    return load(set_name, names)


def run(name: str, rows: int, words: dict[int, int], set_name: str = "", threads: int = 1, context_words=None) -> None:
    row, context, counter = np.zeros(t.COLUMNS, np.int64), np.zeros(t.CONTEXT, np.int64), np.zeros(8, np.int64)
    scratch, zeros = np.full(threads * rows * 256, np.nan, np.float32), np.zeros(1024, np.float32)
    for at, word in words.items():
        row[at] = word
    told = {
        t.TOKENS: rows, t.THREADS: threads, t.TILE: scratch.ctypes.data, t.TILE_SIZE: rows * 1024,
        t.ZEROS: zeros.ctypes.data,
    }  # fmt: skip
    for at, word in (told | (context_words or {})).items():
        context[at] = word
    kernel = code(set_name or BEST[0].name).function(name)
    for tid in range(threads):
        kernel(tid, row.ctypes.data, context.ctypes.data, counter.ctypes.data)


def packed_as(form: str, matrix, **options):
    """Pack the matrix in panels of a form."""
    return pack(matrix, pairs=form == "bf16pairs", **options)


def linear_words(packed, x, scales, out) -> dict[int, int]:
    return {
        t.X: x.ctypes.data, t.X_STRIDE: x.strides[0], t.X_SCALES: scales.ctypes.data, t.OUT: out.ctypes.data,
        t.OUT_STRIDE: out.strides[0], t.WIDTH: packed.columns, t.WEIGHT: packed.address,
        t.PANEL_BYTES: packed.panel_bytes, t.PANELS: packed.count,
    }  # fmt: skip


def run_linear(packed, rows: int, words: dict[int, int], set_name: str = "", threads: int = 1) -> None:
    """Run the kernel of a form, after the kernel that rounds its activations if there is one."""
    context = {}
    if packed.form == "bf16pairs":
        stride = t.narrow_stride(packed.columns)
        narrowed = np.full((max(rows, t.FEW * threads), stride), 255, np.uint8)  # NaN
        context = {t.NARROW: narrowed.ctypes.data, t.NARROW_SIZE: t.FEW * stride}
        run("narrow", rows, words | {t.OUT_STRIDE: stride}, set_name, threads, context)
        words = words | {t.X_STRIDE: stride}
    run(f"linear_{packed.form}", rows, words, set_name, threads, context)


def multiply(set_name: str, packed, x, scales, base) -> np.ndarray:
    """Return x · weightᵀ + base, by the kernel."""
    out = np.full((len(x), packed.count * 16), np.nan, np.float32)
    words = linear_words(packed, x, scales, out)
    words |= {t.RESIDUAL: base.ctypes.data, t.RESIDUAL_STRIDE: base.strides[0]}
    run_linear(packed, len(x), words, set_name)
    return out


@pytest.mark.parametrize("set_name, form", SETS)
def test_products_are_exact_and_a_row_does_not_depend_on_its_company(set_name, form):
    rng = np.random.default_rng(1)
    rows, columns, outputs = 19, columns_of(form), 40
    matrix = random_matrix(form, outputs, columns, rng)
    packed = packed_as(form, matrix)
    assert packed.form == form
    x, scales, exact = activations(form, rows, columns, rng)
    base = rng.standard_normal((rows, packed.count * 16)).astype(np.float32)
    got = multiply(set_name, packed, x, scales, base)
    wanted = exact @ matrix.floats().astype(np.float64).T
    # Products are exact. The two of a pair are added to a sum with one rounding or with two.
    error = np.abs(got[:, :outputs] - base[:, :outputs] - wanted).max() / np.abs(wanted).max()
    assert error < 1e-6
    assert np.array_equal(got[:, outputs:], base[:, outputs:])
    for company in (1, 2, 3, 5, 7, 8, 16):
        for first in range(0, rows - company + 1, company):
            some = slice(first, first + company)
            s = scales[some] if form in BLOCK_FORMS else scales
            alone = multiply(set_name, packed, x[some].copy(), s.copy(), base[some].copy())
            assert np.array_equal(alone.view(np.int32), got[some].view(np.int32))


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("form", FEW_FORMS)
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_a_linear_adds_bias_and_residual_and_writes_in_place(rows, form):
    rng = np.random.default_rng(2)
    matrix = random_matrix(form, 64 * 18, 96, rng)
    packed = packed_as(form, matrix)
    x, scales, exact = activations(form, rows, 96, rng)
    bias = pack_vector(rng.standard_normal(packed.rows).astype(np.float32))
    residual = rng.standard_normal((rows, packed.rows)).astype(np.float32)
    wanted = exact @ matrix.floats().T.astype(np.float64)
    for with_bias, with_residual in ((0, 0), (1, 0), (0, 1), (1, 1)):
        out = residual.copy()
        words = linear_words(packed, x, scales, out)
        words |= {t.BIAS: bias.ctypes.data} if with_bias else {}
        words |= {t.RESIDUAL: out.ctypes.data, t.RESIDUAL_STRIDE: out.strides[0]} if with_residual else {}
        run_linear(packed, rows, words, threads=2)
        np.testing.assert_allclose(out, wanted + with_bias * bias + with_residual * residual, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("form", FEW_FORMS)
def test_a_linear_with_an_activation_quantizes_what_it_writes(form):
    rng = np.random.default_rng(3)
    rows, outputs = 6, 96
    matrix = random_matrix(form, outputs, 64, rng)
    packed = packed_as(form, matrix)
    x, scales, exact = activations(form, rows, 64, rng)
    out, out_scales = np.zeros((rows, outputs), np.int8), np.zeros((rows, outputs // 32, 2), np.float32)
    words = linear_words(packed, x, scales, out) | {t.OUT_SCALES: out_scales.ctypes.data, t.ACT: t.SILU}
    run_linear(packed, rows, words)
    wanted = silu(exact @ matrix.floats().T.astype(np.float64))
    codes, their = quantized(wanted.astype(np.float32))
    assert np.abs(out.astype(int) - codes).max() <= 1
    np.testing.assert_allclose(out_scales[..., 0], their[..., 0], rtol=1e-5)
    sums = out.reshape(rows, -1, 32).sum(-1)
    np.testing.assert_allclose(out_scales[..., 1], out_scales[..., 0] * sums, rtol=1e-6)


@pytest.mark.parametrize("form", FEW_FORMS)
@pytest.mark.parametrize("to_int8", [False, True])
def test_a_gated_product_multiplies_gate_and_up_with_their_bias(to_int8, form):
    rng = np.random.default_rng(4)
    rows, half = 7, 96
    matrix = random_matrix(form, 2 * half, 64, rng)
    packed = packed_as(form, matrix, gated=True)
    x, scales, exact = activations(form, rows, 64, rng)
    bias = rng.standard_normal(2 * half).astype(np.float32)
    put = pack_vector(bias, gated=True)
    both = exact @ matrix.floats().T.astype(np.float64) + bias
    wanted = silu(both[:, :half]) * both[:, half:]
    out = np.zeros((rows, half), np.int8 if to_int8 else np.float32)
    out_scales = np.zeros((rows, half // 32, 2), np.float32)
    words = linear_words(packed, x, scales, out) | {t.ACT: t.SILU, t.GATED: 1, t.BIAS: put.ctypes.data}
    words |= {t.OUT_SCALES: out_scales.ctypes.data} if to_int8 else {}
    run_linear(packed, rows, words, threads=2)
    got = out.astype(np.float32)
    if to_int8:
        got = (got.reshape(rows, -1, 32) * out_scales[..., :1]).reshape(rows, half)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=np.abs(wanted).max() / (200 if to_int8 else 1e5))


def look_up(packed, ids: np.ndarray, factor: float = 1.0) -> np.ndarray:
    out = np.full((len(ids), packed.columns), np.nan, np.float32)
    words = {
        t.OUT: out.ctypes.data, t.OUT_STRIDE: out.strides[0], t.WIDTH: packed.columns, t.TABLE: packed.address,
        t.TABLE_SCALE: t.float_bits(factor), t.TABLE_PANEL_BYTES: packed.panel_bytes,
    }  # fmt: skip
    known, at = np.stack([np.full_like(ids, -1), ids]).astype(np.int32), np.arange(len(ids))
    context = {t.TOKEN_IDS: known.ctypes.data, t.TOKEN_IDS_STRIDE: known.strides[0]}
    slots = np.ones_like(at)
    context |= {t.POSITIONS: at.ctypes.data, t.SEQUENCES: slots.ctypes.data}
    run(f"embed_{packed.form}", len(ids), words, context_words=context, threads=2)
    return out


@pytest.mark.parametrize("form", FORMS)
def test_a_table_is_looked_up_from_the_same_panels(form):
    matrix = random_matrix(form, 50, columns_of(form) // 16 * 16, np.random.default_rng(5))
    ids = np.array([49, 0, 17, 17, 31], np.int64)
    wanted = matrix.floats()[ids] * np.float32(0.5)
    np.testing.assert_allclose(look_up(packed_as(form, matrix), ids, 0.5), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("gated, rows", [(False, (48, 16, 17)), (False, (17, 16)), (True, (64, 64)), (True, (32, 96))])
def test_parts_are_packed_as_if_they_were_stacked_before(gated, rows, pairs):
    rng = np.random.default_rng(9)
    for form, columns in (("bf16", 33), ("f16", 32), ("f32", 16)):
        parts = [random_matrix(form, n, columns, rng) for n in rows]
        got, want = _pack_parts(parts, gated, 0, pairs, np.zeros), pack(stack(parts), gated=gated, pairs=pairs)
        assert (got.form, got.rows, got.columns) == (want.form, want.rows, want.columns)
        assert np.array_equal(got.panels, want.panels)


@pytest.mark.parametrize("form", BLOCK_FORMS)
def test_a_large_matrix_is_packed_some_panels_at_a_time_as_if_at_once(form, monkeypatch):
    matrix = random_matrix(form, 75, 512, np.random.default_rng(4))
    want = pack(matrix)
    monkeypatch.setattr("tokenmill.backends.cpu.pack._AT_ONCE", 33 * 512)
    assert np.array_equal(pack(matrix).panels, want.panels)


@pytest.mark.parametrize("columns", [99, 96, 17, 1])
def test_pairs_of_an_odd_number_of_columns_end_with_zeros(columns):
    matrix = random_matrix("bf16", 33, columns, np.random.default_rng(7))
    packed = pack(matrix, pairs=True)
    panels = packed.panels.view(np.uint16).reshape(3, -1, 16, 2)
    assert packed.panel_bytes == panels[0].nbytes
    laid = panels.transpose(0, 2, 1, 3).reshape(48, -1)
    assert np.array_equal(laid[:33, :columns], matrix.codes)
    assert not laid[33:].any()
    assert not laid[:, columns:].any()


@pytest.mark.skipif(not PAIRED, reason="this machine does not multiply bfloat16")
@pytest.mark.parametrize("private", [0, 1])
@pytest.mark.parametrize("rows", [1, 4, 5, 41])
def test_activations_are_rounded_to_the_nearest_even_and_what_follows_them_is_not_looked_at(rows, private):
    rng = np.random.default_rng(8)
    columns, threads, room = 99, 2, max(rows, 8)
    x = (rng.standard_normal((room, 112)) * 10.0 ** rng.integers(-20, 20, (room, 112))).astype(np.float32)
    hard = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]
    x[:, : len(hard)] = x[:, 88 : 88 + len(hard)] = hard
    x[:, columns:] = np.nan
    out = np.full((room, t.narrow_stride(columns) // 2), 0xFFFF, np.uint16)
    context = {t.NARROW: out.ctypes.data, t.NARROW_SIZE: 4 * out.strides[0]}
    words = {
        t.X: x.ctypes.data, t.X_STRIDE: x.strides[0], t.WIDTH: columns, t.OUT_STRIDE: out.strides[0],
        t.PRIVATE_X: private,
    }  # fmt: skip
    run("narrow", rows, words, threads=threads, context_words=context)
    for tid in range(threads):
        first = 4 * tid if rows <= t.FEW else 0  # where few rows are, each thread has its own
        read = 4 * tid if rows <= t.FEW and private else 0
        np.testing.assert_array_equal(out[first : first + rows, :columns], bf16(x[read : read + rows, :columns]))
        assert not out[first : first + rows, columns].any()


@pytest.mark.skipif(not PAIRED, reason="this machine does not multiply bfloat16")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_of_bfloat16_what_is_no_number_stays_in_its_row(bad):
    rng = np.random.default_rng(9)
    matrix = random_matrix("bf16", 32, 99, rng)
    x, scales, exact = activations("bf16pairs", 9, 99, rng)
    x[3, 98] = bad
    got = multiply("", packed_as("bf16pairs", matrix), x, scales, np.zeros((9, 32), np.float32))
    assert not np.isfinite(got[3]).any()
    wanted = np.delete(exact, 3, 0) @ matrix.floats().astype(np.float64).T
    np.testing.assert_allclose(np.delete(got, 3, 0), wanted, atol=1e-6 * np.abs(wanted).max())


FIRST = {"u4": 0, "u5": 0, "i5": -16, "i6": -32, "i8": -128}


def coded(name: str, rows: int, columns: int, kind: type, block: tuple[int, int], rng: np.random.Generator) -> Coded:
    """Integers of a format with a scale for each block, one code an element, not packed."""
    bits = FORMATS[name].bits
    codes = rng.integers(FIRST[name], FIRST[name] + (1 << bits), (rows, columns)).astype(FORMATS[name].dtype)
    height, width = block[0] or rows, block[1] or columns
    shape = -(-rows // height), -(-columns // width)
    return Coded(codes, name, rng.uniform(0.01, 0.02, shape).astype(kind), block)


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("zero", [None, 3, 8, "each"])
@pytest.mark.parametrize("with_low", [False, True])
def test_blocks_of_any_scale_zero_and_low_are_packed_with_no_loss_but_that_of_a_zero_in_float16(
    name, kind, zero, with_low
):
    rng = np.random.default_rng(6)
    matrix = coded(name, 33, 64, kind, (1, 32), rng)
    low = rng.uniform(0.01, 0.02, (33, 2)).astype(kind) if with_low else None
    zeros = {"each": rng.integers(0, 16, (33, 2)), None: None}.get(zero, np.full((1, 1), zero))
    matrix = replace(matrix, zero=zeros, low=low)
    packed = pack(matrix)
    assert packed.quantized
    rounding = 16 * 0.02 * 2**-11 if packed.form == "int4" and zero == "each" else 0  # of scale · zero
    np.testing.assert_allclose(look_up(packed, np.arange(33)), matrix.floats(), rtol=1e-5, atol=1e-6 + rounding)


def test_groups_of_128_with_zeros_share_scales_and_lows_of_float16() -> None:
    rng = np.random.default_rng(6)
    group, alone = "int4group", "int4"
    for width, columns, form in ((128, 256, group), (256, 512, group), (64, 256, alone), (128, 192, alone)):
        matrix = coded("u4", 33, columns, np.float16, (1, width), rng)
        matrix = replace(matrix, zero=rng.integers(0, 17, matrix.scale.shape))
        packed = pack(matrix)
        assert packed.form == form
        np.testing.assert_allclose(look_up(packed, np.arange(33)), matrix.floats(), atol=17 * 0.02 * 2**-11)
        assert pack(replace(matrix, zero=np.full((1, 1), 8))).form == "int4even"
        assert pack(replace(matrix, scale=matrix.scale.astype(np.float32))).form == "int4wide"


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("block", [(1, 128), (128, 128), (8, 64), (1, 0), (0, 0)])
def test_larger_blocks_are_packed_as_blocks_of_32_columns(name, block):
    rng = np.random.default_rng(6)
    matrix = coded(name, 33, 192, np.float16, block, rng)
    packed = pack(replace(matrix, zero=rng.integers(0, 9, matrix.scale.shape)))
    assert packed.quantized
    matrix = replace(matrix, zero=np.full((1, 1), 2))
    np.testing.assert_allclose(look_up(pack(matrix), np.arange(33)), matrix.floats(), rtol=1e-5, atol=1e-6)


def test_what_no_panel_stores_as_codes_is_packed_as_floats():
    rng = np.random.default_rng(6)
    eights = coded("i8", 33, 64, np.float32, (1, 16), rng)
    ordered = replace(coded("i8", 33, 64, np.float32, (1, 32), rng), order=rng.permutation(64))
    table = Coded(rng.integers(0, 127, (33, 64), dtype=np.uint8), "e4m3", eights.scale, (1, 16))
    for matrix in (eights, ordered, table):
        packed = pack(matrix)
        assert packed.form == "f16"
        np.testing.assert_array_equal(look_up(packed, np.arange(33)), matrix.floats().astype(np.float16))
    large = replace(table, scale=table.scale * np.float32(1e5))
    assert pack(large).form == "f32"
    np.testing.assert_array_equal(look_up(pack(large), np.arange(33)), large.floats())


def test_halves_of_a_gated_product_are_whole_blocks():
    assert gates(128)
    with pytest.raises(Unsupported):
        pack(dense(np.zeros((96, 32), np.float32)), gated=True)


def test_an_instruction_set_is_forced_by_name():
    assert isa.detect() == HERE[0]
    assert isa.detect(HERE[-1].name) == HERE[-1]
    with pytest.raises(ArgumentError, match=r"sse9.*Known"):
        isa.detect("sse9")
    lacking = next(i for i in isa.ALL if i not in HERE)
    with pytest.raises(ArgumentError, match="lacks"):
        isa.detect(lacking.name)


def test_bfloat16_is_multiplied_as_such_only_where_the_machine_can(monkeypatch):
    vnni = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx2", "fma", "f16c"}
    monkeypatch.setattr(isa, "features", lambda: frozenset(vnni))
    assert isa.detect().name == "avx512vnni"
    with pytest.raises(ArgumentError, match=r"needs a CPU with avx512bf16, which .* It has: avx512vnni"):
        isa.detect("avx512bf16")
    monkeypatch.setattr(isa, "features", lambda: frozenset(vnni | {"avx512bf16"}))
    assert isa.detect().name == "avx512bf16"
    assert isa.target_features(isa.detect()) is None
    assert "-avx512bf16" in (isa.target_features(isa.detect("avx512vnni")) or "").split(",")
