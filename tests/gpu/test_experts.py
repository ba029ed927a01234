"""Mixtures of experts on a GPU in bfloat16: real sizes against torch, through graphs, the same bits in every run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support_cuda import ON_GPU, CudaDriver, torch, write_random
from support_models import Driver

from tokenmill.backends.base import StepLimits
from tokenmill.models.base import program_of
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source

if ON_GPU:
    from bench.gpu.experts import Layer, Shape, off
    from tokenmill.backends.cuda.device import Device

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def check_layer(layer: Layer) -> None:
    """Check that any number of rows equals torch, writes no other rows, and repeats to the bit."""
    for rows in (1, 2, 17, 64, 256, 1500):
        layer.out.fill_(float("nan"))
        layer.run(rows)
        first = layer.out[:rows].clone()
        assert off(first, layer.wanted(rows)) < 2e-2, rows
        assert layer.out[rows:].isnan().all()
        layer.run(rows)
        assert torch.equal(first, layer.out[:rows]), rows


@pytest.mark.parametrize(
    "sizes",
    [
        (2048, 768, 128, 8), (1024, 1408, 60, 4), (4096, 2048, 8, 2), (7168, 256, 256, 8), (512, 96, 512, 10),
        (2880, 2880, 32, 4, "quick_gelu", True, {"limit": 7.0, "up_offset": 1.0}),
    ],
)  # fmt: skip
def test_layers_of_real_sizes_equal_torch_and_repeat_to_the_bit(sizes: tuple[object, ...]) -> None:
    layer = Layer(Shape(*sizes), 0, 1500, Device("cuda"))  # type: ignore[arg-type]
    check_layer(layer)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_models_with_experts_have_torchs_logits_through_graphs(
    family: str, deterministic: bool, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 768, "moe_intermediate_size": 256, "vocab_size": 4096}
    write_random(
        tmp_path, family, dtype=torch.bfloat16, head_dim=64, num_attention_heads=8, num_key_value_heads=2,
        num_hidden_layers=2, max_position_embeddings=2048, spread=0.05, **sizes,
    )  # fmt: skip
    limits = StepLimits(2048, 70, 2048, 16)
    driver = CudaDriver(
        tmp_path, dtype="bfloat16", limits=limits, num_blocks=1024, warm=True, graphs=None, deterministic=deterministic
    )
    source = open_checkpoint(local_source(tmp_path))
    expected = Driver(program_of(source.config), source, limits=limits, num_blocks=1024)
    rng = np.random.default_rng(0)

    def ids(n: int) -> list[int]:
        return rng.integers(0, 4096, n).tolist()

    history = [[(0, ids(1100)), (1, ids(70))], [(0, ids(1))], [(1, ids(1)), (0, ids(1))]]
    history += [[(i, ids(i)) for i in range(2, 60)], [(i, ids(1)) for i in range(70)], [(i, ids(1)) for i in range(9)]]
    for rows in history:
        wanted, made = expected.feed(rows), driver.feed(rows)
        off_by = np.linalg.norm(made - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
        assert np.median(off_by) < 2e-2, (len(rows), off_by.max())  # A near tie of experts may go another way.


def test_with_deterministic_a_row_is_the_same_to_the_bit_in_any_batch(tmp_path: Path) -> None:
    write_random(
        tmp_path, "qwen3_moe", dtype=torch.bfloat16, head_dim=64, num_attention_heads=8, num_key_value_heads=2,
        hidden_size=512, moe_intermediate_size=256, num_hidden_layers=2, max_position_embeddings=2048, spread=0.05,
    )  # fmt: skip
    limits = StepLimits(2048, 70, 2048, 16)
    prompt = np.random.default_rng(0).integers(0, 128, 40).tolist()
    found = []
    for others in ([], [(1, prompt[:9])], [(1, prompt * 25)], [(i, prompt) for i in range(1, 30)]):
        driver = CudaDriver(
            tmp_path, dtype="bfloat16", limits=limits, num_blocks=1024, warm=True, graphs=None, deterministic=True
        )
        later = [(0, [5]), *((i, [6]) for i, _ in others)]
        found.append([driver.feed([(0, prompt), *others])[0], driver.feed(later)[0]])
        driver.close()
    for again in found[1:]:
        for a, b in zip(found[0], again, strict=True):
            np.testing.assert_array_equal(a, b)
