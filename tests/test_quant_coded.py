"""Coded matrices: what codes, scales, zeros and orders stand for, parts of them, and stacks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tokenmill.quant.base import Coded, Levels, dense, stack
from tokenmill.quant.formats import FORMATS, nibbles
from tokenmill.quant.gguf import UNPACK
from tokenmill.weights.gguf_header import BLOCKS as BLOCKS_OF

BLOCKS = [(1, 32), (1, 128), (128, 128), (3, 64), (1, 0), (0, 0), (0, 32), (1, 48)]


def number(name: str, code: int) -> float:
    """The number of a code, one at a time."""
    table = FORMATS[name].table
    return float(code) if table is None else float(table[code])


def random(name: str, rows: int, columns: int, block: tuple[int, int], rng: np.random.Generator, **more: Any) -> Coded:
    """Codes of a format with random scales, one code an element."""
    kind, bits = FORMATS[name], FORMATS[name].bits
    first = -(1 << bits - 1) if name.startswith("i") else 0
    codes = rng.integers(first, first + (1 << bits), (rows, columns)).astype(kind.dtype)
    codes[codes == 127] = 0  # no number in e4m3
    codes[codes == 255] = 0
    shape = -(-rows // (block[0] or rows)), -(-columns // (block[1] or columns))
    return Coded(codes, name, rng.uniform(0.5, 2, shape).astype(np.float16), block, **more)


def by_definition(m: Coded) -> np.ndarray:
    """Every number by itself, in float32: scale · (number − zero) + low, in the columns that `order` names."""
    rows, columns = m.shape
    out = np.zeros((rows, columns), np.float32)
    height, width = m.block[0] or rows, m.block[1] or columns
    for r in range(rows):
        for c in range(columns):
            at = r // height, c // width
            x = np.float32(number(m.format, int(m.codes[r, c])))
            if m.zero is not None:
                x -= np.float32(m.zero[at] if m.zero.shape != (1, 1) else m.zero[0, 0])
            x *= np.float32(m.scale[at])
            if m.low is not None:
                x += np.float32(m.low[at])
            out[r, c if m.order is None else m.order[c]] = x
    return out


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", ["u4", "i8", "e4m3", "e2m1", "nf4"])
def test_numbers_are_those_of_the_definition_for_blocks_of_any_size(name: str, block: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    plain = random(name, 7, 160, block, rng)
    assert plain.scale is not None
    zero, low = rng.integers(0, 9, plain.scale.shape), rng.normal(size=plain.scale.shape).astype(np.float16)
    for m in (
        plain,
        replace(plain, zero=zero),
        replace(plain, zero=np.full((1, 1), 3), low=low, order=rng.permutation(160)),
    ):
        np.testing.assert_array_equal(m.floats(), by_definition(m))


@pytest.mark.parametrize("name", ["u4", "e2m1", "nf4"])
def test_packed_nibbles_stand_for_the_same_numbers(name: str) -> None:
    loose = random(name, 5, 96, (1, 32), np.random.default_rng(2))
    packed = replace(loose, codes=nibbles(loose.codes.reshape(5, 3, 32)))
    assert packed.shape == (5, 96)
    np.testing.assert_array_equal(packed.floats(), loose.floats())


@pytest.mark.parametrize("name, kind", [("e4m3", "float8_e4m3fn"), ("e5m2", "float8_e5m2")])
def test_every_code_of_eight_bit_floats_is_the_number_of_torch(name: str, kind: str) -> None:
    torch = pytest.importorskip("torch")
    want = torch.arange(256, dtype=torch.uint8).view(getattr(torch, kind)).float().numpy()
    np.testing.assert_array_equal(FORMATS[name].table, want)


def test_four_bit_floats_have_one_sign_two_exponents_and_one_fraction_and_nf4_is_sorted() -> None:
    four, normal = FORMATS["e2m1"].table, FORMATS["nf4"].table
    assert four is not None
    assert normal is not None
    for code in range(16):
        sign, exponent, fraction = 1 - 2 * (code >> 3), code >> 1 & 3, code & 1
        assert four[code] == sign * (2.0 ** (exponent - 1) * (1 + fraction / 2) if exponent else fraction / 2)
    assert (np.diff(normal) > 0).all()
    assert (normal[0], normal[7], normal[15]) == (-1, 0, 1)


def test_more_rows_than_are_converted_at_a_time_get_their_own_scales() -> None:
    rng = np.random.default_rng(3)
    m = random("i8", 300, 1024, (128, 128), rng)
    want = m.codes.astype(np.float32) * np.repeat(np.repeat(m.scale, 128, 0)[:300], 128, 1)
    np.testing.assert_array_equal(m.floats(), want)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("ordered", [False, True])
def test_a_part_has_the_numbers_of_the_whole(block: tuple[int, int], ordered: bool) -> None:
    rng = np.random.default_rng(4)
    m = random("u4", 9, 160, block, rng, order=rng.permutation(160) if ordered else None)
    assert m.scale is not None
    m = replace(m, zero=rng.integers(0, 9, m.scale.shape), low=rng.normal(size=m.scale.shape).astype(np.float16))
    packed = replace(m, codes=nibbles(m.codes.reshape(9, 5, 32)))
    for rows in (slice(0, 9), slice(2, 9), slice(3, 6), slice(4, 4)):
        for columns in (slice(None), slice(0, 32), slice(64, 160), slice(48, 96), slice(5, 7)):
            np.testing.assert_array_equal(m.take(rows, columns).floats(), m.floats()[rows, columns])
            np.testing.assert_array_equal(packed.take(rows, columns).floats(), m.floats()[rows, columns])


def test_a_part_of_whole_blocks_keeps_its_codes_without_a_copy() -> None:
    m = random("i8", 256, 256, (128, 128), np.random.default_rng(5), input_scale=0.5)
    part = m.take(slice(128, 256), slice(0, 128))
    assert (part.format, part.block, part.input_scale) == ("i8", (128, 128), 0.5)
    assert np.shares_memory(part.codes, m.codes)
    assert m.take(slice(0, 256), slice(0, 64)).block == (128, 64)
    assert m.take(slice(0, 256), slice(0, 72)).dense
    assert m.take(slice(3, 256), slice(0, 128)).block == (1, 128)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "MXFP4"])
@pytest.mark.parametrize("columns", [slice(0, 336), slice(336, 1024), slice(16, 48)])
def test_a_part_of_packed_blocks_keeps_its_codes(kind: str, columns: slice) -> None:
    """As with ranks whose border is within 32 columns."""
    elements, size = BLOCKS_OF[kind]
    raw = np.random.default_rng(9).integers(0, 60, (4, 1024 // elements, size), dtype=np.uint8)
    m = UNPACK[kind](raw)
    part = m.take(slice(1, 4), columns)
    assert part.format == m.format
    np.testing.assert_array_equal(part.floats(), m.floats()[1:4, columns])


@pytest.mark.parametrize("block", BLOCKS)
def test_a_stack_keeps_the_codes_and_has_the_numbers_of_its_parts(block: tuple[int, int]) -> None:
    rng = np.random.default_rng(6)
    a, b = (random("i8", n, 160, block, rng, zero=np.full((1, 1), z)) for n, z in ((5, 3), (6, 4)))
    for parts in ([a, a], [a, b], [b, a, replace(b, zero=np.zeros(b.scale.shape) if b.scale is not None else None)]):
        both = stack(parts)
        assert both.format == "i8"
        np.testing.assert_array_equal(both.floats(), np.concatenate([p.floats() for p in parts]))


def test_stacked_projections_share_the_larger_scale_of_the_activations() -> None:
    rng = np.random.default_rng(7)
    a, b = (random("e4m3", 4, 32, (0, 0), rng, input_scale=s) for s in (0.25, 0.5))
    assert stack([a, b]).input_scale == 0.5
    assert stack([a, replace(b, input_scale=None)]).dense


def test_matrices_of_another_format_order_or_block_are_stacked_as_floats() -> None:
    rng = np.random.default_rng(8)
    a = random("i8", 4, 64, (1, 32), rng)
    others = (random("u4", 4, 64, (1, 32), rng), random("i8", 4, 64, (1, 64), rng), replace(a, order=np.arange(64)))
    for b in (*others, replace(a, low=a.scale), dense(a.floats())):
        both = stack([a, b])
        assert both.dense
        np.testing.assert_array_equal(both.floats(), np.concatenate([a.floats(), b.floats()]))


def test_a_scale_is_missing_for_no_block() -> None:
    with pytest.raises(AssertionError):
        Coded(np.zeros((4, 64), np.int8), "i8", np.ones((4, 1), np.float32), (1, 32))


def test_factors_of_superblocks_stay_with_whole_superblocks_only() -> None:
    raw = np.zeros((3, 2, 144), np.uint8)
    m = UNPACK["Q4_K"](raw)
    assert isinstance(m.take(slice(0, 2), slice(256, 512)).levels, Levels)
    part = m.take(slice(0, 2), slice(32, 64))
    assert (part.format, part.levels) == ("u4", None)
