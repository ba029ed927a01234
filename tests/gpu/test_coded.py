"""Products with packed codes on a GPU, of real sizes: against torch's with the dequantized matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_cuda import ON_GPU, CudaDriver, torch, write_random
from test_cuda_coded import FORMS, drawn, product, upload, x_of

from tokenmill.backends.base import StepLimits
from tokenmill.backends.cuda.products.pack import packed

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def off(found: Any, want: Any) -> float:
    return float((found.double() - want).norm() / want.norm())


def wanted(coded: Any, x: Any, act: str = "") -> Any:
    weight = torch.from_numpy(coded.floats()).cuda().double()
    y = x.double() @ weight.t()
    return torch.nn.functional.silu(y[:, : y.shape[1] // 2]) * y[:, y.shape[1] // 2 :] if act else y


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_every_form_and_any_number_of_rows(name: str, dtype: Any) -> None:
    kind, group, zero, more = FORMS[name]
    coded = drawn(kind, 1056, 2048, group, zero, **more)
    matrix = packed([coded], upload, dtype)
    for rows in (1, 7, 16, 31, 64, 100, 128, 300, 700):
        x = x_of(rows, 2048, dtype)
        assert off(product(matrix, x), wanted(coded, x)) < 4e-3, rows


@pytest.mark.parametrize("name", ["int4, groups of 128", "int8, a scale a row", "nf4, groups of 64"])
def test_gated_products_and_columns_that_are_no_whole_blocks(name: str) -> None:
    kind, group, zero, more = FORMS[name]
    coded = drawn(kind, 2 * 2872, 2880, group, zero, **more)
    matrix = packed([coded], upload, torch.bfloat16)
    for rows in (1, 9, 33, 65, 200, 600):
        x = x_of(rows, 2880, torch.bfloat16)
        found = product(matrix, x, "silu")
        if found.shape[1] != 2872:
            found = torch.nn.functional.silu(found[:, :2872].float()) * found[:, 2872:]
        assert off(found, wanted(coded, x, "silu")) < 6e-3, rows


@pytest.mark.parametrize("name", ["int4, groups of 128", "int4, groups of 64 with zero points", "int8, groups of 32"])
def test_batch_invariant_products_are_the_same_bits_for_any_number_of_rows(name: str) -> None:
    kind, group, zero, more = FORMS[name]
    matrix = packed([drawn(kind, 1024, 4096, group, zero, **more)], upload, torch.bfloat16)
    x = x_of(600, 4096, torch.bfloat16)
    whole = product(matrix, x, batch_invariant=True)
    for rows in (1, 8, 16, 17, 64, 65, 128, 129, 400):
        assert torch.equal(product(matrix, x[:rows].contiguous(), batch_invariant=True), whole[:rows]), rows


@pytest.mark.parametrize("quantize", ["int4", "int8"])
def test_a_quantized_model_through_graphs_has_the_logits_of_its_dequantized_matrices(
    quantize: str, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "vocab_size": 8192}
    write_random(
        tmp_path, "qwen2", dtype=torch.bfloat16, num_attention_heads=16, num_key_value_heads=4, head_dim=64,
        max_position_embeddings=2048, spread=0.04, **sizes,
    )  # fmt: skip
    limits = StepLimits(4096, 70, 2048, 16)
    given: dict[str, Any] = {"dtype": "bfloat16", "limits": limits, "num_blocks": 1024}
    coded, dense = CudaDriver(tmp_path, **given, quantize=quantize, graphs=None), CudaDriver(tmp_path, **given)
    for weight, matrix in coded._weights.matrices.items():
        matrix.unpack(dense._weights.matrices[weight]._matrix)
    for weight, tensor in coded._weights.tensors.items():
        dense._weights.tensors[weight].copy_(tensor)
    coded.warm_up()
    assert coded._batch_one
    draw = np.random.default_rng(0)

    def ids(n: int) -> list[int]:
        return draw.integers(0, 8192, n).tolist()

    history = [[(0, ids(900)), (1, ids(70))], [(0, ids(1))], [(1, ids(1)), (0, ids(1))], [(0, ids(1))]]
    history += [[(i, ids(i)) for i in range(2, 70)], [(i, ids(1)) for i in range(70)], [(i, ids(1)) for i in range(40)]]
    for rows in history:
        wanted, made = dense.feed(rows), coded.feed(rows)
        error = np.linalg.norm(made - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
        assert error.max() < 3e-2, (len(rows), error.argmax(), error.max())
