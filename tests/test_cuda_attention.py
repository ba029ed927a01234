"""Attention of the CUDA backend: splits by list, caches of 8-bit floats, batch-invariant results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_cuda import ON_GPU, CudaDriver, torch, write_random
from support_models import Driver, steps
from support_slow import mostly_slow

from bench.gpu.layers import Heads, Layers
from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.kernels.decode import list_splits
from tokenmill.backends.cuda.products.base import Operands
from tokenmill.backends.cuda.products.dense import Dense
from tokenmill.backends.torch import kinds

DEVICE = "cuda" if ON_GPU else "cpu"
KINDS = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def test_every_split_of_every_row_is_listed_once_and_whole_ones_come_first() -> None:
    rng = np.random.default_rng(0)
    for rows in (5, 8, 13):
        positions = rng.integers(0, 700, rows)
        pairs = torch.tensor([(0, p) for p in positions], dtype=torch.int32, device=DEVICE)
        items = torch.full((1 + rows * 8,), -7, dtype=torch.int32, device=DEVICE)
        list_splits[(1,)](items, pairs, pairs, rows, BN=16, SPLITS=8, LEAST=32, WINDOW=0, SOME=False, BLOCK=16)
        count, *listed = items.tolist()
        keys = [max(-(-int(p) // (8 * 16)) * 16, 32) for p in positions]
        active = [max(-(-int(p) // k), 1) for p, k in zip(positions, keys, strict=True)]
        assert count == sum(active)
        assert sorted(listed[:count]) == sorted(r * 256 + s for r in range(rows) for s in range(active[r]))
        last = [item % 256 == active[item // 256] - 1 for item in listed[:count]]
        assert last == sorted(last)
        assert set(listed[count:]) <= {-7}


def split_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split short contexts, too: long ones take the interpreter minutes."""
    monkeypatch.setattr("tokenmill.backends.cuda.attention.LEAST_KEYS", 32)
    monkeypatch.setattr("tokenmill.backends.cuda.shapes.LEAST_KEYS", 32)


@pytest.mark.slow
def test_many_rows_of_uneven_length_are_split_and_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        split_early(monkeypatch)
    window = 300 if ON_GPU else 70
    write_random(tmp_path, "mistral_window", num_hidden_layers=1, max_position_embeddings=2048, sliding_window=window)
    rng = np.random.default_rng(0)
    sizes = (1300, 40, 700, 1, 513, 260, 90) if ON_GPU else (130, 10, 75, 1, 33, 17)
    limits = StepLimits(4096, 8, 2048, 16)
    driver = CudaDriver(tmp_path, limits=limits, num_blocks=320)
    expected = Driver.of(tmp_path, limits=limits, num_blocks=320)
    first = [(i, rng.integers(0, 128, n).tolist()) for i, n in enumerate(sizes)]
    decode = [(i, [int(rng.integers(0, 128))]) for i in rng.permutation(len(sizes)).tolist()]
    mixed = [(i, rng.integers(0, 128, 3 if i == 1 else 1).tolist()) for i in range(len(sizes))]
    for rows in (first, decode, mixed):
        np.testing.assert_allclose(driver.feed(rows), expected.feed(rows), atol=3e-4, rtol=1e-3)


def test_keys_of_few_tiles_are_shared_by_several_programs_and_added_up(tmp_path: Path, monkeypatch: Any) -> None:
    split_early(monkeypatch)
    write_random(tmp_path, "mistral_window", num_hidden_layers=1, max_position_embeddings=1024, sliding_window=90)
    rng, limits = np.random.default_rng(3), StepLimits(1024, 4, 1024, 16)
    driver = CudaDriver(tmp_path, limits=limits, num_blocks=200)
    expected = Driver.of(tmp_path, limits=limits, num_blocks=200)
    found = driver._lowering._attention  # type: ignore[union-attr]
    found._tile_sums.zero_()
    for rows in ([(0, 120), (1, 7)], [(0, 5), (1, 1)], [(1, 40), (0, 3), (2, 33)], [(2, 2), (0, 20)]):
        step = [(slot, rng.integers(0, 128, count).tolist()) for slot, count in rows]
        np.testing.assert_allclose(driver.feed(step), expected.feed(step), atol=3e-4, rtol=1e-3)
    assert not found._tile_counts.any()
    assert found._tile_sums.any(), "some were split"


def assert_alike(some: Any, other: Any) -> None:
    """Assert equal bits; under the interpreter nearly equal numbers, as numpy's order of sums depends on shapes."""
    if ON_GPU:
        assert torch.equal(some, other)
    np.testing.assert_allclose(some.float().cpu(), other.float().cpu(), rtol=1e-4, atol=1e-4)


def rounded(kind: Any, scale: float) -> Any:
    def of(x: Any) -> Any:
        most = torch.finfo(kind).max
        return (x / scale).clamp(-most, most).to(kind).to(x.dtype) * scale

    return of


@pytest.mark.parametrize(
    "kind, scale",
    mostly_slow([("fp8_e4m3fn", 0.25), ("fp8_e4m3fn", 1.0), ("fp8_e5m2", 1.0)], [("fp8_e4m3fn", 0.25)]),
)
def test_a_cache_of_8_bit_floats_holds_rounded_keys_and_values(
    kind: str, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random(tmp_path, "llama", num_hidden_layers=1)
    own, fit = kinds.attend, rounded(KINDS[kind], scale)
    monkeypatch.setattr(kinds, "attend", lambda op, q, k, v, *rest: own(op, q, fit(k), fit(v), *rest))
    driver, expected = CudaDriver(tmp_path, kv_cache_dtype=kind, scale=scale), Driver.of(tmp_path)
    assert driver.block_bytes() * 4 == expected.block_bytes()
    off: list[float] = []
    for rows in steps()[: 5 if ON_GPU else 3]:
        wanted, made = expected.feed(rows), driver.feed(rows)
        off += (np.linalg.norm(made - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)).tolist()
    assert max(off) < 0.03, off  # half-way between two 8-bit numbers the last bit of float32 decides
    assert np.median(off) < 0.005, off


@pytest.mark.parametrize("family", ["llama", "mistral_window", "qwen3"] if ON_GPU else ["mistral_window"])
def test_logits_do_not_depend_on_chunks_nor_on_other_sequences_in_the_step(family: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_hidden_layers": 2 if ON_GPU else 1}
    if ON_GPU:
        sizes |= {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}
        sizes |= {"intermediate_size": 2816, "max_position_embeddings": 2048, "spread": 0.04, "dtype": torch.bfloat16}
    write_random(tmp_path, family, **sizes)
    rng = np.random.default_rng(4)
    length = 700 if ON_GPU else 37
    ids = rng.integers(0, 128, length).tolist()
    limits = StepLimits(2048, 40, 2048, 16)
    dtype = "bfloat16" if ON_GPU else "float32"
    seen: dict[int, list[Any]] = {}
    for trial in range(6 if ON_GPU else 3):
        driver = CudaDriver(tmp_path, dtype=dtype, limits=limits, num_blocks=1024, deterministic=True)
        done, others = 0, int(rng.integers(0, 39 if ON_GPU else 3))
        while done < length:
            count = length if trial == 0 else min(length - done, int(rng.choice([1, 2, 5, 16, 70, 300])))
            beside = [(1 + i, rng.integers(0, 128, int(rng.integers(1, 4))).tolist()) for i in range(others)]
            logits = driver.feed([*beside, (0, ids[done : done + count])])
            done += count
            seen.setdefault(done, []).append(torch.from_numpy(logits[-1]))
            others = int(rng.integers(0, 39 if ON_GPU else 3))
    assert len(seen[length]) == (6 if ON_GPU else 3)
    for first, *rest in seen.values():
        for other in rest:
            assert_alike(first, other)


@pytest.mark.parametrize("act", ["", "silu"])
def test_a_row_of_a_product_is_the_same_whatever_rows_are_beside_it(act: str) -> None:
    draw, dtype = torch.Generator().manual_seed(0), torch.bfloat16 if ON_GPU else torch.float32
    outputs, columns, most = (1408, 1024, 700) if ON_GPU else (96, 128, 140)
    x, weight = (torch.randn(s, generator=draw).to(dtype).to(DEVICE) for s in ((most, columns), (outputs, columns)))
    made = []
    for rows in (1, 2, 17, 33, 64, 65, most):
        out = torch.full((most, outputs // (2 if act else 1)), float("nan"), dtype=dtype, device=DEVICE)
        operands = Operands(x, out) if not act else Operands(x, x.new_empty(most, outputs), None, act, out)
        product = Dense(weight).product(operands, None, True)
        assert product.fits(rows)
        product.run(rows)
        assert torch.equal(out[rows:].isnan(), torch.ones_like(out[rows:], dtype=torch.bool))
        made.append(out[:rows].clone())
    for some in made:
        assert_alike(some, made[-1][: len(some)])
    expected = x.float() @ weight.float().T
    if act:
        gate, up = expected.chunk(2, -1)
        expected = torch.nn.functional.silu(gate) * up
    rough = 100 if ON_GPU else 1
    np.testing.assert_allclose(made[-1].float().cpu(), expected.cpu(), rtol=2e-4 * rough, atol=1e-3 * rough)


@pytest.mark.parametrize(
    "kind, head_dim", mostly_slow([("fp8_e4m3fn", 66), ("fp8_e5m2", 18), ("fp8_e5m2", 80)], [("fp8_e4m3fn", 66)])
)
def test_a_run_behind_a_context_reads_the_codes_of_a_cache(kind: str, head_dim: int) -> None:
    with torch.inference_mode():
        layers = Layers(Heads(4, 2, head_dim), 1, 41, 9, Device(DEVICE), KINDS[kind])
        assert layers.check() < (4e-2 if ON_GPU else 1e-5)
