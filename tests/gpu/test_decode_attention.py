"""Attention of single tokens on a GPU: real heads and contexts, caches of every kind, beside torch in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support_cuda import ON_GPU, torch

from bench.gpu.layers import Heads, Layers
from tokenmill.backends.cuda.device import Device

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SLOPES = tuple(2.0 ** -(i / 4) for i in range(32))


@pytest.mark.parametrize("heads, rows, most, kind", [
    (Heads(32, 8, 128), 1, 3000, E4M3),
    (Heads(32, 8, 128), 8, 9000, E4M3),
    (Heads(32, 8, 128), 40, 2500, E4M3),
    (Heads(32, 8, 128), 64, 700, E4M3),
    (Heads(32, 8, 128), 150, 700, E4M3),
    (Heads(32, 8, 128), 150, 700, None),
    (Heads(14, 2, 64), 64, 900, E5M2),
    (Heads(32, 32, 96, {"window": 300}), 9, 900, E4M3),
    (Heads(48, 3, 64, {"sinks": True}), 64, 900, E4M3),
    (Heads(64, 1, 128), 20, 900, E5M2),
    (Heads(16, 4, 256, {"softcap": 30.0}), 100, 700, E4M3),
    (Heads(16, 4, 256, {"window": 256}), 5, 2100, None),
    (Heads(32, 2, 128, {"alibi": SLOPES}), 64, 600, None),
], ids=str)  # fmt: skip
def test_single_tokens_equal_torch(heads: Heads, rows: int, most: int, kind: Any) -> None:
    contexts = np.random.default_rng(0).integers(1, most + 1, rows).astype(np.int32)
    contexts[-1] = most
    with torch.inference_mode():
        assert Layers(heads, rows, contexts, 1, Device("cuda"), kind).check() < (6e-3 if kind is None else 1e-2)
