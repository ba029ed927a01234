"""Products with FP8 matrices on a GPU: real shapes against float64; and a model through graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_cuda import DEVICE, ON_GPU, CudaDriver, torch, write_random
from support_fp8 import INEXACT, SCALES, assert_near, coded, decoded, made, rows_of, wanted

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda import backend
from tokenmill.backends.cuda.pack import pack
from tokenmill.backends.cuda.products.dense import Dense
from tokenmill.backends.cuda.products.fp8 import Fp8
from tokenmill.backends.cuda.products.fp8_codes import quantized

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")

ROWS = (1, 2, 9, 17, 32, 33, 64, 65, 128, 129, 301)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize(
    "outputs, columns, act", [(768, 1024, ""), (512, 2560, ""), (2048, 512, "silu"), (72, 200, "")]
)
def test_products_of_real_shapes(outputs: int, columns: int, act: str, kind: str, dtype: str) -> None:
    matrix = coded(outputs, columns, kind)
    x = rows_of(max(ROWS), columns).to(getattr(torch, dtype))
    product, out = made(matrix, x, act=act)
    failures = []
    for rows in ROWS:
        out.fill_(7)
        product._whole.fill_(7)
        product.run(rows)
        codes = decoded(x[:rows], kind) if product.reads_codes(rows) else x[:rows].double().cpu().numpy()
        applied = product.applies_act(rows)
        found = (out if applied else product._whole)[:rows]
        want = wanted(matrix, codes, act=applied)
        off = np.linalg.norm(found.double().cpu().numpy() - want) / np.linalg.norm(want)
        exact = not product.reads_codes(rows)
        if not off < (INEXACT if not exact else 4e-3 if dtype == "bfloat16" else 1.5e-3):
            failures.append((rows, float(off)))
        assert applied == (bool(act) and rows <= (64 if kind == "block" else 128))
    assert not failures, failures


@pytest.mark.parametrize("kind", ["row", "block"])
def test_products_without_scales_and_in_one_way(kind: str) -> None:
    x = rows_of(300, 512).bfloat16()
    product, out = made(coded(256, 512, kind), x, invariant=True)
    product.run(300)
    many = out.clone()
    for rows in (1, 16, 40, 64, 70, 128, 200):
        product.run(rows)
        assert torch.equal(out[:rows], many[:rows]), rows
    for dtype in (torch.bfloat16, torch.float16):
        matrix = coded(256, 512, "row")
        product, out = made(matrix, x.to(dtype))
        product.leaves = True
        for rows in (33, 300):
            product.run(rows)
            by_rows, by_columns = product.raw_scales
            scaled = out[:rows].float() * by_rows[:rows, None] * by_columns
            assert_near(scaled, wanted(matrix, decoded(x[:rows].to(dtype), "row")), INEXACT)


@pytest.mark.parametrize("kind, deterministic", [("row", False), ("block", True)])
def test_a_model_in_fp8_through_graphs(
    kind: str, deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "vocab_size": 8192}
    write_random(
        tmp_path, "llama", dtype=torch.bfloat16, num_attention_heads=8, num_key_value_heads=2, head_dim=128,
        max_position_embeddings=4096, spread=0.04, **sizes,
    )  # fmt: skip
    limits = StepLimits(4096, 140, 4096, 16)

    def driver(dense: bool) -> CudaDriver:
        def stored(*given: Any) -> Any:
            weights = pack(*given)
            for weight, matrix in weights.matrices.items():
                codes, scale = quantized(matrix._matrix)
                if weight.shard == "vocab":
                    continue
                if kind == "block":
                    scale = scale.view(-1, 128, 1).amax(1).repeat(1, matrix._matrix.shape[1] // 128)
                wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1) if kind == "block" else scale
                numbers = (codes.view(torch.float8_e4m3fn).float() * wide).bfloat16()
                weights.matrices[weight] = Dense(numbers) if dense else Fp8(codes, scale, SCALES[kind], torch.bfloat16)
            return weights

        monkeypatch.setattr(backend, "pack", stored)
        return CudaDriver(
            tmp_path, dtype="bfloat16", limits=limits, num_blocks=2048, warm=True, graphs=None,
            deterministic=deterministic,
        )  # fmt: skip

    fp8, dense, rng = driver(False), driver(True), np.random.default_rng(0)

    def ids(n: int) -> list[int]:
        return rng.integers(0, 8192, n).tolist()

    history = [[(0, ids(2500)), (1, ids(70))], [(0, ids(1))], [(1, ids(1)), (0, ids(1))], [(0, ids(30))]]
    history += [[(i, ids(i)) for i in range(2, 70)], [(i, ids(1)) for i in range(70)], [(i, ids(1)) for i in range(33)]]
    history += [[(0, ids(1)), (1, ids(300)), (2, ids(1))], [(i, ids(1)) for i in range(140)]]
    for rows in history:
        want, found = dense.feed(rows), fp8.feed(rows)
        off = np.linalg.norm(found - want, axis=-1) / np.linalg.norm(want, axis=-1)
        told = f"{len(rows)} rows, {sum(len(each) for _, each in rows)} tokens: {off.max():.3f}, {np.median(off):.3f}"
        assert off.max() < 0.25, told
        assert np.median(off) < 0.12, told
    assert DEVICE == "cuda"
