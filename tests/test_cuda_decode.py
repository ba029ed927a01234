"""The kernel of single tokens' attention beside torch: 8-bit codes, sizes of heads and groups, splits."""

from __future__ import annotations

import numpy as np
import pytest
from support_cuda import DEVICE, ON_GPU, torch
from support_slow import mostly_slow

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from bench.gpu.layers import Heads, Layers  # noqa: E402
from tokenmill.backends.cuda.device import Device  # noqa: E402
from tokenmill.backends.cuda.kernels.codes8 import numbers  # noqa: E402
from tokenmill.backends.cuda.kernels.decode import list_rows  # noqa: E402
from tokenmill.backends.cuda.shapes import (  # noqa: E402
    LONG,
    Contexts,
    DecodeShape,
    contexts_of,
    decode_shape,
    variant_of,
    variants,
)  # fmt: skip

KINDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@triton.jit
def convert(elements_ptr, out_ptr, SLICE: tl.constexpr, CODES: tl.constexpr, ASM: tl.constexpr):
    i = tl.arange(0, 128)
    tl.store(out_ptr + i, numbers(tl.load(elements_ptr + i), SLICE, CODES, out_ptr.dtype.element_ty, ASM))


@pytest.mark.parametrize("codes, scale", [("e4m3", 256), ("e5m2", 1)])
def test_every_code_of_8_bits_becomes_its_number(codes: str, scale: int) -> None:
    kind = KINDS[codes]
    every = torch.arange(256, dtype=torch.uint8).view(kind)
    finite = every.float().isfinite()
    for order in (torch.arange(256), torch.randperm(256, generator=torch.Generator().manual_seed(0))):
        elements = every.view(torch.uint8)[order].view(torch.int16).to(DEVICE)
        made = torch.empty(2, 128, dtype=torch.float16, device=DEVICE)
        for part in (0, 1):
            convert[(1,)](elements, made[part], SLICE=part, CODES=codes, ASM=ON_GPU)
        found = (made.t().reshape(-1).float().cpu() * scale)[finite[order]]
        assert torch.equal(found, every.float()[order][finite[order]])


@pytest.mark.parametrize("some", [False, True])
def test_rows_are_listed_once_and_the_longest_first(some: bool) -> None:
    rng = np.random.default_rng(0)
    for rows in (1, 16, 37):
        tokens = rng.permutation(40)[:rows] if some else np.arange(rows)
        positions = np.zeros(40, int)
        positions[tokens] = rng.integers(0, 12, rows)
        pairs = torch.tensor([(0, p) for p in positions], dtype=torch.int32, device=DEVICE)
        which = torch.tensor(tokens, dtype=torch.int32, device=DEVICE)
        items = torch.full((60,), -7, dtype=torch.int32, device=DEVICE)
        list_rows[(-(-rows // 16),)](items, pairs, which, rows, SOME=some, BM=16, BLOCK=64)
        count, *listed = items.tolist()
        assert count == rows
        assert listed[:rows] == sorted((r * 256 for r in range(rows)), key=lambda i: (-positions[tokens[i // 256]], i))
        assert set(listed[rows:]) == {-7}


CASES = {
    "7 heads a group": (Heads(7, 1, 16), ""),
    "heads of 24": (Heads(4, 2, 24), "e4m3"),
    "17 heads a group, e5m2": (Heads(17, 1, 16), "e5m2"),
    "a part is rotated in pairs, a window": (Heads(4, 2, 40, {"window": 9}), "e4m3"),
    "heads of 18": (Heads(2, 2, 18, {"softcap": 2.0}), "e4m3"),
    "sinks": (Heads(3, 1, 32, {"sinks": True, "alibi": (0.5, 0.1, 0.02)}), "e5m2"),
}


@pytest.mark.parametrize("name", mostly_slow(list(CASES), ["heads of 24", "17 heads a group, e5m2"]))
@pytest.mark.parametrize("splits", [1, 3])
def test_single_tokens_of_uneven_contexts_equal_torch(name: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, codes = CASES[name]
    shape = DecodeShape(16, splits, 16, 2, 1)
    monkeypatch.setattr("tokenmill.backends.cuda.attention.decode_shape", lambda *_, **__: shape)
    monkeypatch.setattr("tokenmill.backends.cuda.attention.CLASSES", (2, 3, 1 << 30))  # rows or splits are listed
    with torch.inference_mode():
        layers = Layers(heads, 5, [34, 1, 16, 17, 70], 1, Device(DEVICE), KINDS.get(codes))
        assert layers.check() < ((4e-2 if codes else 5e-3) if ON_GPU else 1e-5)  # a rounded key may get another code


def test_sizes_fit_the_registers_of_a_warp_and_the_pages() -> None:
    for rows in (1, 8, 32, 64, 256):
        for head_dim in (16, 64, 96, 128, 256):
            for shared in (1, 4, 8, 16, 64):
                for coded in (False, True):
                    for contexts in Contexts:
                        shape = decode_shape(rows, head_dim, shared, contexts, coded=coded)
                        numbers_of_result = max(head_dim, 16) * max(8, shared)
                        assert numbers_of_result <= shape.warps * 1024 or shape.warps == 8
                        assert shape.keys % 16 == 0 == shape.least % shape.keys


@pytest.mark.parametrize("starts, kv_heads, kind", [
    ([], 8, "ALIKE"), ([LONG - 1] * 64, 8, "ALIKE"), ([LONG], 8, "LONG"), ([LONG] * 48, 8, "LONG"),
    ([LONG] * 64, 8, "ALIKE"), ([LONG] * 64, 1, "LONG"), ([LONG] * 63 + [8 * LONG], 8, "LONG"),
    ([100] * 63 + [LONG], 8, "LONG"), ([8 * LONG] * 64, 8, "LONG"), ([100] * 63 + [200], 8, "UNEVEN"),
    ([0], 8, "ALIKE"),
    ([LONG] * 32 + [LONG // 2] * 32, 8, "UNEVEN"),
])  # fmt: skip
def test_contexts_are_long_if_there_are_few_programs_or_one_is_far_longer_than_the_others(
    starts: list[int], kv_heads: int, kind: str
) -> None:
    assert contexts_of(np.array(starts, np.int32), kv_heads).name == kind


@pytest.mark.parametrize("coded", [False, True])
def test_steps_are_captured_once_for_all_contexts_with_the_same_sizes(coded: bool) -> None:
    for rows in (1, 8, 32, 64, 256):
        found = variants(rows, coded)
        shapes = [decode_shape(rows, 128, 4, kind, coded=coded) for kind in found]
        assert len(set(shapes)) == len(shapes)
        for kind in Contexts:
            assert variant_of(rows, kind, coded) in found
            assert decode_shape(rows, 128, 4, kind, coded=coded) in shapes
